"""Folders as runs leave them, written without training, with figures that can be checked in the head."""

import csv
import io
import json

import torch

from sparselearning.reporting.runs import group_runs, read_run

FIGURES = ("train_loss", "train_acc", "eval_loss", "eval_acc", "density")
FLAGS = {
    "indicate_method": "Results", "seed": 1, "data": "digits", "model": "lenet5", "epochs": 4, "lr": 0.1,
    "sparse": True, "fix": False, "method": "GraNet", "growth": "gradient", "final_density": 0.1,
    "pre_train": True, "cyclic_train": True, "cycle": 1, "cycle_rate": 0.5, "cyc_lr": True, "lr_1": 0.001,
    "lr_2": 0.01, "save": "somewhere",
}  # fmt: skip


def write_run(folder, final=0.9, tickets=2, epochs=4, finished=True, explored=None, summary=(), **flags):
    """Pre-training to 80 %, then tickets of one epoch and 85 % each; what they superpose into ends at ``final``."""
    folder.mkdir(parents=True)
    plain = {} if tickets else {"cycle_rate": 0.0}
    config = FLAGS | plain | {"device": "cpu", "versions": {"torch": "2.11"}} | flags
    (folder / "config.json").write_text(json.dumps(config))
    first_cycle = epochs - tickets
    rows = [
        {
            "phase": "pretrain" if epoch < first_cycle else "cycle", "epoch": epoch,
            "ticket": None if epoch < first_cycle else epoch - first_cycle + 1, "lr": 0.1,
            "train_loss": 2.0 / (epoch + 1), "train_acc": 0.7, "eval_loss": 1.0, "eval_acc": 0.8, "density": 0.1,
            **({} if explored is None else {"explored": explored}),
        }
        for epoch in range(epochs)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    superposed = [0.88] * (tickets - 1) + [final] * (tickets > 0)
    ends = [{"ticket": n, "ticket_acc": 0.85, "superposed_acc": s} for n, s in enumerate(superposed, start=1)]
    if tickets:
        (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ends))
    if finished:
        pretrained = 0.8 if tickets else final
        content = {
            "pretrain_acc": pretrained, "ticket_acc": [0.85] * tickets, "superposed_acc": superposed,
            "final_acc": final, "density": 0.1, "gain": 100 * (final - pretrained),
            "gain_over_ticket": 100 * (final - 0.85) if tickets else None, "total_seconds": 90.0,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(content | dict(summary)))
    return folder


def groups_of(*folders):
    return group_runs([read_run(folder) for folder in folders])


def rows_of(text):
    return {row.pop("method"): row for row in csv.DictReader(io.StringIO(text))}


def write_analysis(
    folder, shift, tickets=(0, 1, 2), share=0.5, part="test set", more=lambda accuracy: {}, moving_average=None
):
    """Tickets of 80, 85 and 84 %, superpositions of 90 and 89 %, an ensemble of 90 %, and two averages.

    All of them are higher by ``shift``. ``more`` makes of an accuracy what else is known of a network.
    """
    far = 0.3 + 3 * shift
    accuracies = {
        "ticket 0": 0.80, "ticket 1": 0.85, "ticket 2": 0.84, "superposition 1": 0.9, "superposition 2": 0.89,
        "logit ensemble": 0.90, **({"moving average": moving_average} if moving_average else {}),
    }  # fmt: skip
    content = {
        "run": str(folder),
        "settings": {
            "tickets": list(tickets), "superposing_method": "CIMA", "CIMA_factor": 0.5, "final_density": 0.1,
            "update_bn": True, "line_bn": False,
        },
        "same_as_run": True,
        "evaluated_on": {"part": part, "images": 100},
        "networks": [
            {"name": name, "accuracy": accuracy + shift, "loss": 1.0, "density": 0.1, "forward_passes": 1}
            | more(accuracy + shift)
            for name, accuracy in accuracies.items()
        ],
        "grid": [
            {
                "superposing_method": method, "CIMA_factor": factor,
                "bn_re_estimated": {"accuracy": accuracy + shift, "loss": 1.0} | more(accuracy + shift),
                "bn_averaged": {"accuracy": accuracy - 0.1, "loss": float("nan")} | more(0.1),  # one that overflows
            }
            for method, factor, accuracy in (("CAA", None, 0.88), ("CIMA", 0.25, 0.87))
        ],
        "pairs": {
            "names": ["ticket 0", "ticket 1", "ticket 2", "superposition 1"],
            "disagreement": [[0, 0.1, 0.2, 1], [0.1, 0, far, 1], [0.2, far, 0, 1], [1, 1, 1, 0]],
            "overlap": [[1, 0.5, 0.25, 0], [0.5, 1, 0.75, 0], [0.25, 0.75, 1, 0], [0, 0, 0, 1]],
            "kl": [[0.0] * 4] * 4,
        },
        "layers": [
            {
                "name": "fc.weight", "weights": 10, "densities": [0.1] * 3, "overlap": [[1.0] * 3] * 3,
                "mean_overlap": 1.0, "chance": 0.1,
            }
        ],
        "lines": [
            {
                "from": a, "to": b, "share": [0.0, share, 1.0], "accuracy": accuracy, "loss": [1.0] * 3,
                "accuracy_barrier": barrier, "loss_barrier": 0.0,
            }
            for a, b, accuracy, barrier in (
                ("ticket 0", "ticket 1", [0.80, 0.86, 0.85], 0.0),
                ("ticket 1", "ticket 2", [0.85, 0.82 + shift, 0.84], 0.025 - shift),
                ("ticket 0", "ticket 2", [0.80, 0.2, 0.84], 0.62),
                ("ticket 2", "superposition 1", [0.84, 0.1, 0.9], 0.77),
            )
        ],
    }  # fmt: skip
    (folder / "analysis").mkdir()
    (folder / "analysis" / "analysis.json").write_text(json.dumps(content))


def save_networks(folder):
    """Two layers of 4 and 16 weights: the ticket has 2 and 2 of them, the superposition 1 and 3."""
    for name, active in (("model_current.pth", (2, 2)), ("model_previous.pth", (1, 3))):
        state = {}
        for layer, (shape, count) in zip(
            ("a.weight", "b.weight"), (((2, 2), active[0]), ((4, 4), active[1])), strict=True
        ):
            state[layer] = torch.zeros(shape)
            state[layer].view(-1)[:count] = 1.5
        torch.save({"state_dict": state, "masks": {k: v != 0 for k, v in state.items()}, "epoch": 4}, folder / name)
