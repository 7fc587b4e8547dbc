"""Reads the files of runs and shows what is in them: tables and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_table(summary: Mapping[str, Any], folder: Path) -> str:
    """The table that ends a run: every network that it made, what superposing gained, and where the files are."""
    rows = [("pre-trained", summary["pretrain_acc"])]
    for number, (ticket, superposed) in enumerate(
        zip(summary["ticket_acc"], summary["superposed_acc"], strict=True), start=1
    ):
        rows += [(f"ticket {number}", ticket), (f"superposition {number}", superposed)]
    rows.append(("final", summary["final_acc"]))
    if "test_acc" in summary:
        rows.append(("final, on the test set", summary["test_acc"]))
    lines = [f"{'network':<24}accuracy", *(f"{name:<24}{accuracy:8.2%}" for name, accuracy in rows), ""]
    lines.append(f"density {summary['density']:.4f}   gain over pre-training {summary['gain']:+.2f} points")
    if summary["gain_over_ticket"] is not None:
        lines[-1] += f", over the last ticket {summary['gain_over_ticket']:+.2f} points"
    lines.append(f"{summary['total_seconds']:.0f} s; files in {folder}")
    return "\n".join(lines)
