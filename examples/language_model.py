#!/usr/bin/env python3
"""A character-level language model: RigL in a training loop of your own, then cheap tickets and their superposition.

python examples/language_model.py              # some minutes of a CPU
python examples/language_model.py --steps 50   # a look, in seconds

The text is Python's own language reference, which comes with every Python. Three transformers start from the same
weights and see the same batches for as many steps: one is dense, one is sparse all the time, and one is sparse and
spends the last third of its steps on tickets. Losses are of the last tenth of the text, which nothing is trained on.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from sparselearning import Masking, caa_factor, cyclic_lr, prune_to_density, superpose

WIDTH, HEADS, BLOCKS, CONTEXT, BATCH = 128, 4, 2, 64, 32
LR, TICKETS = 3e-3, 3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of each network (default: %(default)s)")
parser.add_argument("--density", type=float, default=0.1, help="share of active weights (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of weights, masks and batches (default: %(default)s)")
args = parser.parse_args()
if args.steps < 3 * TICKETS or not 0 < args.density <= 1:
    parser.error(f"--steps is at least {3 * TICKETS}, and --density lies in (0, 1]")
cycle_steps = args.steps // (3 * TICKETS)
pretrain_steps = args.steps - TICKETS * cycle_steps

text = "\n".join(topics.values())
alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
encoded = torch.tensor([alphabet[character] for character in text])
training, held_out = encoded.tensor_split([len(encoded) * 9 // 10])


class Transformer(nn.Module):
    """From characters [batch, CONTEXT] to logits of each next one [batch, CONTEXT, alphabet]."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options) for _ in range(BLOCKS)]
        self.characters, self.places = nn.Embedding(len(alphabet), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(alphabet))
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:  # noqa: D102
        hidden = self.characters(characters) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.future, is_causal=True)
        return self.head(self.norm(hidden))


def loss(model: nn.Module, stretches: Tensor) -> Tensor:
    """Mean loss in nats of predicting each next character of texts [batch, CONTEXT + 1]."""
    return F.cross_entropy(model(stretches[:, :-1]).flatten(0, 1), stretches[:, 1:].flatten())


def train(model: nn.Module, stepper: torch.optim.AdamW | Masking, steps: range, lr: Callable[[float], float]) -> None:
    """Train for these steps; ``lr`` is a function of the share of them that is done."""
    optimizer = stepper.optimizer if isinstance(stepper, Masking) else stepper
    model.train()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr((step - steps.start) / len(steps))
        random = torch.Generator().manual_seed(args.seed + 1_000_003 * step)
        starts = torch.randint(len(training) - CONTEXT, (BATCH, 1), generator=random)
        optimizer.zero_grad()
        loss(model, training[starts + torch.arange(CONTEXT + 1)]).backward()
        stepper.step()


def decayed(t: float) -> float:
    """A short warm-up, then a cosine from LR to a tenth of it."""
    return LR * min(20 * t, 0.55 + 0.45 * math.cos(math.pi * t))


def start(sparse: bool) -> tuple[nn.Module, torch.optim.AdamW | Masking]:
    """The same first weights for every network, and what makes the steps."""
    torch.manual_seed(args.seed)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    if not sparse:
        return model, optimizer
    masking = Masking(
        optimizer, method="DST", growth="gradient", init_density=args.density, final_density=args.density,
        prune_rate=0.3, decay_schedule="cosine", total_steps=args.steps, update_frequency=max(1, args.steps // 40),
        seed=args.seed,
    )  # fmt: skip
    masking.add_module(model)  # all weights but those of embeddings, which stay dense, and of LayerNorm
    return model, masking


@torch.no_grad()
def show(name: str, model: nn.Module, density: float) -> None:
    """Print the loss on the held-out text, cut into stretches that share one character at each cut."""
    model.eval()
    print(f"{name:<30} {density:7.4f} {loss(model, held_out.unfold(0, CONTEXT + 1, CONTEXT)):11.4f}", flush=True)


print("network                        density   loss [nats per character]")
model, optimizer = start(sparse=False)
train(model, optimizer, range(args.steps), decayed)
show("dense", model, 1.0)

model, masking = start(sparse=True)
train(model, masking, range(args.steps), decayed)
show("RigL", model, masking.density())

model, masking = start(sparse=True)
train(model, masking, range(pretrain_steps), decayed)
show("RigL, two thirds of the steps", model, masking.density())

superposition = copy.deepcopy(model.state_dict())
superposed = Transformer()
masking.updates_enabled = False  # from here on, only the start of a cycle moves the topology
for ticket in range(1, TICKETS + 1):
    masking.truncate_weights(0.2)  # explore: prune and grow a fifth of the active weights
    first = pretrain_steps + (ticket - 1) * cycle_steps
    train(model, masking, range(first, first + cycle_steps), lambda t: cyclic_lr(t, lr_1=LR / 10, lr_2=LR / 2))
    show(f"ticket {ticket}", model, masking.density())
    averaged = superpose(superposition, model.state_dict(), caa_factor(ticket))
    superposition, masks = prune_to_density(averaged, masking.masks, args.density)
    superposed.load_state_dict(superposition)
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    show(f"superposition {ticket}", superposed, kept)
