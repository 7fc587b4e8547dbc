#!/usr/bin/env python3
"""Fine-tune a trained network of torchvision while GraNet makes it sparse, beside the same fine-tuning without masks.

python examples/finetune.py                                           # ResNet18 on digits: nothing is downloaded
python examples/finetune.py --pretrained --data DIR --arch resnet50   # ImageNet's weights on images of your own

DIR holds train/CLASS/* and val/CLASS/*; without it, images are the 1,797 handwritten digits of scikit-learn. Without
--pretrained, the network is first trained on these images from random weights. Then two copies are fine-tuned for as
many epochs on the same batches: one dense, one pruned gradually to the density. Accuracies are of held-out images.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model, list_models
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from sparselearning import Masking

BATCH, FIRST_LR, LR = 64, 0.05, 0.01
OTHERS = "googlenet", "inception", "squeezenet"  # those of further outputs in training, or without a linear layer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--arch", default="resnet18", metavar="NAME",
                    choices=[name for name in list_models(torchvision.models) if not name.startswith(OTHERS)],
                    help="network of torchvision that ends with a linear layer (default: %(default)s)")  # fmt: skip
parser.add_argument("--pretrained", action="store_true", help="start from torchvision's weights, which it downloads")
parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images (default: digits)")
parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning, and of training before (default: 10)")
parser.add_argument("--density", type=float, default=0.1, help="share of weights that stay (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of weights, masks and batches (default: %(default)s)")
args = parser.parse_args()
if args.epochs < 1 or not 0 < args.density <= 1:
    parser.error("--epochs is at least 1, and --density lies in (0, 1]")
if args.data and not all((args.data / part).is_dir() for part in ("train", "val")):
    parser.error(f"{args.data} has no folders train and val")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digits() -> tuple[Dataset, Dataset, int]:
    """Digits as images of 3x32x32, two thirds for training and the others for evaluation; number of classes."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    parts = train_test_split(torch.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=args.seed)
    train, val = (TensorDataset(images[part], torch.tensor(labels)[part]) for part in parts)
    return train, val, 10


def folder(path: Path) -> tuple[Dataset, Dataset, int]:
    """Images of a folder, cropped and normalised as torchvision's weights expect; number of classes."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    to_tensor += [v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    train = ImageFolder(path / "train", v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *to_tensor]))
    val = ImageFolder(path / "val", v2.Compose([v2.Resize(256), v2.CenterCrop(224), *to_tensor]))
    return train, val, len(train.classes)


train_set, val_set, classes = folder(args.data) if args.data else digits()
workers = min(4, os.cpu_count() or 1) if args.data else 0


def train(model: nn.Module, lr: float, density: float = 1.0) -> float:
    """Train for ``--epochs``, with GraNet if the density at the end is below 1; return that density, measured."""
    random = torch.Generator().manual_seed(args.seed)
    full = len(train_set) > BATCH  # batches, one of a single image among them that BatchNorm cannot normalise
    loader = DataLoader(train_set, BATCH, shuffle=True, drop_last=full, num_workers=workers, generator=random)
    steps = args.epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    masking = None
    if density < 1:
        pruned_at = steps * 3 // 4  # what remains of the steps trains a topology that stays
        masking = Masking(
            optimizer, method="GraNet", growth="gradient", init_density=1.0, final_density=density, prune_rate=0.2,
            decay_schedule="cosine", total_steps=steps, update_frequency=max(1, steps // 20), prune_end_step=pruned_at,
            final_update_step=pruned_at, seed=args.seed,
        )  # fmt: skip
        masking.add_module(model, sparse_init="GMP")  # all weights are active at first
    model.train()
    for _ in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            (masking or optimizer).step()
            scheduler.step()
    return masking.density() if masking else 1.0


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the held-out images that the network classifies correctly."""
    model.eval()
    hits = [model(x.to(device)).argmax(1).eq(y.to(device)) for x, y in DataLoader(val_set, 256, num_workers=workers)]
    return torch.cat(hits).float().mean().item()


torch.manual_seed(args.seed)
model = get_model(args.arch, weights="DEFAULT" if args.pretrained else None)
side = 224 if args.data else 32
try:
    copy.deepcopy(model).to("meta").eval()(torch.empty(1, 3, side, side, device="meta"))
except (AssertionError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    parser.error(f"{args.arch} takes no images of {side} x {side} pixels ({reason}); those of --data have 224 x 224")
name, head = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
model.set_submodule(name, nn.Linear(head.in_features, classes))
model.to(device)

print("network                density   accuracy")
if not args.pretrained:
    train(model, FIRST_LR)
    print(f"trained                 1.0000 {accuracy(model):10.2%}", flush=True)
for label, density in (("fine-tuned, dense", 1.0), ("fine-tuned, GraNet", args.density)):
    tuned = copy.deepcopy(model)
    density = train(tuned, LR, density)
    print(f"{label:<22} {density:7.4f} {accuracy(tuned):10.2%}", flush=True)
