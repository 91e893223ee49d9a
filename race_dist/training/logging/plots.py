"""Plots of runs: bits per byte over the steps and by position in the context; gradient norm, speed, MFU and memory."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from race_dist.files import has_json_type, read_checksummed_json
from race_dist.output_paths import atomic_write
from race_dist.training.logging.metrics import UNIFORM_BITS, nats_to_bits

COLOURS = ("#2b6cb0", "#c8502d", "#2f855a", "#805ad5", "#b7791f", "#0f766e", "#b83280", "#4a5568")
QUIET = "#8a8a8a"
FADED = 0.35  # opacity of the training curve


@dataclass(frozen=True)
class RunCurves:
    """The data of one run's plots.

    Attributes:
        name: for the legend.
        records: its metrics.
        positions: its losses by position, one entry per context length.
    """

    name: str
    records: Sequence[dict[str, Any]]
    positions: Sequence[dict[str, Any]] = field(default_factory=tuple)

    def of(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one kind of record. Of a step that was repeated after a rollback, the last value."""
        found = {r["step"]: r[key] for r in self.records if r["kind"] == kind and r.get(key) is not None}
        return list(found), list(found.values())


def draw_loss(runs: Sequence[RunCurves], title: str = "") -> Figure:
    """Bits per byte over the steps, on training batches (faint) and held-out text; and the learning rate below."""
    figure = _figure(5.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    lines: list[tuple[Line2D, str]] = []
    for colour, run in zip(_colours(runs), runs):
        top.plot(*run.of("train", "bpb"), color=colour, alpha=FADED, linewidth=1)
        steps, values = run.of("eval", "bpb")
        several = f": {values[-1]:.3f}" if steps and len(runs) > 1 else ""
        lines.append(
            (top.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=2)[0], f"{run.name}, held out{several}")
        )
        if steps and len(runs) == 1:
            top.annotate(
                f"{values[-1]:.3f}",
                (steps[-1], values[-1]),
                textcoords="offset points",
                xytext=(0, 9),
                ha="right",
                color=colour,
                fontsize=10,
                fontweight="bold",
            )
        bottom.plot(*run.of("train", "lr"), color=colour)
    lines.append((top.plot([], [], color=QUIET, alpha=FADED)[0], "training batches"))
    top.axhline(UNIFORM_BITS, color=QUIET, linewidth=0.8, linestyle=":")
    top.text(1.0, UNIFORM_BITS, "uniform ", color=QUIET, fontsize=8, ha="right", va="top", transform=top.get_yaxis_transform())
    top.set(ylabel="bits per byte", ylim=(0, None))
    _title(top, title)
    _legend(top, lines, loc="upper right", bbox_to_anchor=(1, 0.8))
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return _plain(figure, top, bottom)


def draw_positions(runs: Sequence[RunCurves], title: str = "") -> Figure:
    """Bits per byte by position in the context, one line per run, context length, text and checkpoint."""
    figure = _figure(4)
    axes = figure.subplots()
    lines: list[tuple[Line2D, str]] = []
    for colour, run in zip(_colours(runs), runs):
        for style, found in zip(itertools.cycle(("-", "--", ":", "-.")), run.positions):
            edges = [max(1, b["start"]) for b in found["buckets"]] + [b["stop"] for b in found["buckets"][-1:]]
            values = [nats_to_bits(b["loss"]) / found.get("bytes_per_token", 1.0) for b in found["buckets"]]
            drawn = axes.step(edges, [*values, *values[-1:]], where="post", color=colour, linestyle=style, linewidth=2)
            lines.append((drawn[0], f"{run.name}, windows of {found['context']:,}{_text_measured(found)}"))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set(xlabel="position in the context", ylabel="bits per byte")
    _title(axes, title)
    if lines:
        _legend(axes, lines)
    return _plain(figure, axes)


def _text_measured(found: dict[str, Any]) -> str:
    """The text and checkpoint of an evaluation, for the legend."""
    text = "held out" if found.get("held_out", True) else str(found.get("text"))
    return f", {text}" + ("" if found.get("step") is None else f", step {found['step']:,}")


def draw_progress(runs: Sequence[RunCurves], title: str = "") -> Figure:
    """Gradient norm, tokens per second, and MFU and memory if they are known, over the steps."""
    candidates = [
        ("grad_norm", "gradient norm", 1.0),
        ("tokens_per_second", "tokens per second", 1.0),
        ("mfu", "of the peak, %", 100.0),
        ("peak_bytes", "memory, GiB", 2.0**-30),
    ]
    shown = [w for w in candidates if any(run.of("train", w[0])[0] for run in runs)] or candidates[:1]
    figure = _figure(1.6 * len(shown) + 0.6)
    rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, label, scale) in zip(rows, shown):
        for colour, run in zip(_colours(runs), runs):
            steps, values = run.of("train", key)
            axes.plot(steps, [v * scale for v in values], color=colour, linewidth=1.2)
        axes.set(ylabel=label)
        if key == "grad_norm":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
    _title(rows[0], title)
    rows[-1].set(xlabel="step")
    return _plain(figure, *rows)


def _title(axes: Axes, title: str) -> None:
    """A title as it is: no name is a formula."""
    axes.set_title(shown(title), parse_math=False)


def _legend(axes: Axes, lines: Sequence[tuple[Line2D, str]], **where: Any) -> None:
    """A legend with literal text: matplotlib would read "$" as a formula and hide names that begin with an underscore."""
    legend = axes.legend([line for line, _ in lines], [str(n) for n in range(len(lines))], frameon=False, **where)
    for text, (_, label) in zip(legend.get_texts(), lines, strict=True):
        text.set(text=shown(label), parse_math=False)


def shown(name: str) -> str:
    """A name in printable characters: control characters and lone surrogates, as in undecodable file names, become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises OSError."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as partial, _any_glyph():
        figure.savefig(partial, format="png", dpi=120)


@contextmanager
def _any_glyph() -> Iterator[None]:
    """Draw characters that no font has as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for an HTML page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "race-dist"}), _any_glyph():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def read_positions(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read losses by position. Raises ValueError, naming the file, if a file does not hold any."""
    found = []
    for file in files:
        try:
            stored = read_checksummed_json(file, {"context": int, "buckets": list}, required=False)
            valid = (
                stored["context"] >= 1
                and has_json_type(stored.get("bytes_per_token", 1.0), float)
                and (0 < stored.get("bytes_per_token", 1.0) < math.inf)
                and bool(stored["buckets"])
            )
            valid = valid and all(_is_bucket(bucket) for bucket in stored["buckets"])
            valid = valid and all(
                has_json_type(stored.get(key, none), (kind, type(None)))
                for key, kind, none in (("text", str, ""), ("held_out", bool, True), ("step", int, None))
            )
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise ValueError(f"{file} does not hold losses by position; remove it")
        found.append(stored)
    return sorted(found, key=lambda stored: (int(stored["context"]), not stored.get("held_out", True), stored.get("step") or 0))


def _is_bucket(bucket: Any) -> bool:
    """Whether a JSON value is a range of positions with a loss."""
    if not isinstance(bucket, dict) or not all(has_json_type(bucket.get(key), int) for key in ("start", "stop")):
        return False
    if not has_json_type(bucket.get("targets", 0), int) or bucket.get("targets", 0) < 0:
        return False
    loss: Any = bucket.get("loss")
    return 0 <= bucket["start"] < bucket["stop"] < 2**53 and has_json_type(loss, float) and 0 <= loss < math.inf


def _figure(height: float) -> Figure:
    return Figure(figsize=(8, height), layout="constrained")


def _colours(runs: Sequence[RunCurves]) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(runs))]


def _plain(figure: Figure, *all_axes: Axes) -> Figure:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure
