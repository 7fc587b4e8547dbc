"""Networks to take away: the last superposition of a finished run, packed, and a card that says what it is."""

from pathlib import Path
from string import Template
from typing import NamedTuple

import torch

from sparselearning import export, predict
from sparselearning.process.files import check_output, write_text
from sparselearning.reporting.runs import Run
from sparselearning.reporting.tables import final_accuracy, machines
from sparselearning.training.builders import build_network
from sparselearning.training.networks import SavedNetwork

CARD = Template("""\
# $name, seed $seed: $model at density $density

`$file` is the last superposition of a run of [the study]($results), packed by
`python -m sparselearning.export`: the weights that are not zero and a bitmap of where they are, $bytes bytes. From the
top of a clone,

```bash
$prepare
$predict
```

ends with `$prints`. $rounding

| | |
| --- | --- |
| weights | $active of $maskable maskable ones are active; $parameters parameters in all |
| test set | $data |
| accuracy there | $accuracy %, as the run says itself |
| command | `$command` |
| ran on | $machine |

The pictures are of CIFAR-100 (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009,
<https://www.cs.toronto.edu/~kriz/cifar.html>). Its page asks for this report to be cited, and names no licence. The
pictures come from the 80 Million Tiny Images, gathered on the web and withdrawn by their makers since; the rights in
them are their owners'. No picture is in this file, which has the licence of this repository.
""")


class Agreement(NamedTuple):
    """How a packed network predicts, beside PyTorch's dense one.

    Attributes:
        hits: images that the packed one predicts right.
        images: all of them.
        apart: largest difference between the logits of the two.
        nearest: least difference between the two largest logits of an image.
    """

    hits: int
    images: int
    apart: float
    nearest: float

    def sentence(self, hits: int) -> str:
        """Whether rounding can change a prediction, and how ``hits``, the run's own count, compares."""
        bounds = f"of dense PyTorch by at most {self.apart:.1e}, and no image's two likeliest classes are nearer than "
        found = f"Its logits differ from those {bounds}{self.nearest:.1e}"
        verdict = "rounding changes no prediction" if 2 * self.apart < self.nearest else "rounding may change one"
        counted = "" if self.hits == hits else f" The run itself counted {hits:,} hits, this command {self.hits:,}."
        return f"{found}: {verdict}.{counted}"


def keep(run: Run, folder: Path, images: Path, prepare: str, data: str) -> None:
    """Write a finished run's network and its card.

    Args:
        run: whose folder has its networks.
        folder: to write into.
        images: ``.npz`` file of the test set.
        prepare: command that makes it.
        data: what it holds, for people.

    Raises:
        UsageError: if there are no images, or other files are where these go.
        FaultError: if a file is damaged or cannot be written.
    """
    packed, card = folder / "network.safetensors", folder / "README.md"
    command = f"python -m sparselearning.predict {packed} {images} --out predictions.csv"
    check_output(card, "the last superposition of a run of")
    pictures = predict.open_images(images)  # or say that there are none, before anything is written
    export.main([str(run.folder.path), str(packed)])
    saved, summary = SavedNetwork.read(run.folder.previous), run.summary
    assert summary is not None
    found = agreement(packed, run, saved, pictures)
    accuracy = final_accuracy(run)
    write_text(
        card,
        CARD.substitute(
            name=run.name,
            seed=run.seed,
            model=run.flags["model"],
            density=f"{summary.density:.3g}",
            file=packed.name,
            results="/".join([".."] * len(folder.parts)) + "/RESULTS.md",
            bytes=f"{packed.stat().st_size:,}",
            prepare=prepare,
            predict=command,
            prints=predict.accuracy_line(found.hits, found.images),
            rounding=found.sentence(round(accuracy / 100 * found.images)),
            active=f"{sum(int(mask.sum()) for mask in saved.masks.values()):,}",
            maskable=f"{sum(mask.numel() for mask in saved.masks.values()):,}",
            parameters=f"{summary.parameters:,}",
            data=data,
            accuracy=f"{accuracy:.2f}",
            command=run.folder.read_config()["command"],
            machine=machines(run.environments),
        ),
    )


def agreement(packed: Path, run: Run, saved: SavedNetwork, pictures: predict.ImageArray) -> Agreement:
    """Predict with a packed network and with the dense one."""
    sparse, preparation = predict.load_network(packed)
    dense = build_network(run.folder.read_config()["network"], saved.state_dict, run.folder.previous)
    with torch.no_grad():
        logits = [(sparse(batch), dense(batch)) for _, batch in predict.batches(pictures, preparation)]
    found, expected = map(torch.cat, zip(*logits, strict=True))
    first, second = found.topk(2, dim=1).values.unbind(dim=1)
    hits = int((found.argmax(dim=1) == torch.from_numpy(pictures.labels)).sum())
    return Agreement(hits, len(found), (found - expected).abs().max().item(), (first - second).min().item())
