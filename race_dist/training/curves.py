"""The picture of a run: its loss and its learning rate over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from race_dist.training.metrics import UNIFORM_BITS

TRAIN, HELD_OUT, QUIET = "#9bb8d3", "#c8502d", "#8a8a8a"


def draw_curves(records: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of bits per byte over the steps, in training and held out, above the learning rate."""
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([r["step"] for r in train], [r["bpb"] for r in train], color=TRAIN, label="training batch")
    top.plot([r["step"] for r in held_out], [r["bpb"] for r in held_out], color=HELD_OUT, marker="o", markersize=4,
             linewidth=2, label="held out")
    top.axhline(UNIFORM_BITS, color=QUIET, linewidth=0.8, linestyle=":")
    top.text(1.0, UNIFORM_BITS, "uniform ", color=QUIET, fontsize=8, ha="right", va="top",
             transform=top.get_yaxis_transform())
    if held_out:
        last = held_out[-1]
        top.annotate(f"{last['bpb']:.3f}", (last["step"], last["bpb"]), textcoords="offset points", xytext=(0, 9),
                     ha="right", color=HELD_OUT, fontsize=10, fontweight="bold")
    top.set(ylabel="bits per byte", ylim=(0, None), title=title)
    top.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.8))
    bottom.plot([r["step"] for r in train], [r["lr"] for r in train], color=QUIET)
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path)
