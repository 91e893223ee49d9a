"""The report: an HTML page that compares runs: curves, losses by position, configurations, events and machines.

The page is self-contained; the plots are also written as PNGs beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from race_dist.files import has_json_type, write_text
from race_dist.training.config import TrainConfig
from race_dist.training.logging.metrics import nats_to_bits
from race_dist.training.logging.metrics_file import read_records
from race_dist.training.logging.plots import (
    COLOURS,
    RunCurves,
    draw_loss,
    draw_positions,
    draw_progress,
    read_positions,
    save_png,
    shown,
    to_svg,
)
from race_dist.training.run_directory import RunDirectory

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.note, figcaption { color: #5a6472; } figure { margin: 0; } svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e2e8f0; vertical-align: top; }
td { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; } td.n { text-align: right; white-space: nowrap; }
table.numbers th:not(:first-child) { text-align: right; }
tr.differs td { background: #fff7e6; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
pre { background: #f7fafc; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class _Run:
    """The data of one run."""

    name: str
    config: TrainConfig
    curves: RunCurves
    machine: dict[str, Any]
    sample: str
    damaged: int  # damaged lines of its metrics

    @classmethod
    def read(cls, path: Path, name: str) -> _Run:
        directory = RunDirectory(path)
        config = directory.load_config()
        if not directory.metrics.is_file():
            raise FileNotFoundError(f"{path} has no {directory.metrics.name}: the run has not begun yet")
        sample = directory.sample.read_text(encoding="utf-8", errors="replace") if directory.sample.is_file() else ""
        records, damaged = read_records(directory.metrics)
        curves = RunCurves(name, records, read_positions(directory.positions))
        return cls(name, config, curves, directory.read_machine(), sample, damaged)

    def last(self, kind: str, key: str) -> float | None:
        values = self.curves.of(kind, key)[1]
        return values[-1] if values else None


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write ``report.html`` and its pictures into the folder ``out``; returns the page.

    Args:
        runs: folders of runs, in the order in which they are shown.
        out: created if it does not exist.

    Raises:
        FileNotFoundError: a path is not the folder of a run.
        ValueError: a file in a folder is damaged.
    """
    read = [_Run.read(path, name) for path, name in zip(runs, _names(runs))]
    curves = [run.curves for run in read]
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"loss": draw_loss(curves), "progress": draw_progress(curves)}
    if any(run.positions for run in curves):
        pictures["positions"] = draw_positions(curves)
    for name, figure in pictures.items():
        save_png(figure, out / f"{name}.png")
    page = out / "report.html"
    write_text(page, _page(read, {name: to_svg(figure) for name, figure in pictures.items()}))
    return page


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as distinguish them."""
    parts = [path.resolve().parts for path in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = [shown("/".join(p[-count:])) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in runs]


def _page(runs: Sequence[_Run], pictures: Mapping[str, str]) -> str:
    title = "race-dist: " + ", ".join(run.name for run in runs)
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p class=note>Bits per byte of held-out text, lower is better. Uniform guessing: 8.</p>",
        _summary(runs),
        _figure("Loss", pictures["loss"], "Faint: batches in training. Strong: held out. Below: the learning rate."),
    ]
    if "positions" in pictures:
        body.append(
            _figure(
                "Loss by position in the context",
                pictures["positions"],
                "Whether more context helps: the loss at each position of a window, for the texts in the legend.",
            )
        )
        body.append(_measurements(runs))
    body += [
        _figure("How it went", pictures["progress"], "Before clipping; over all ranks together."),
        _events(runs),
        _configuration(runs),
        _machines(runs),
        *_samples(runs),
    ]
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _measurements(runs: Sequence[_Run]) -> str:
    """The evaluated texts, with the means over all positions."""
    rows = []
    for run in runs:
        for found in run.curves.positions:
            targets = sum(int(bucket.get("targets", 0)) for bucket in found["buckets"])
            nats = sum(bucket["loss"] * bucket.get("targets", 0) for bucket in found["buckets"]) / max(1, targets)
            text = str(found.get("text", "?")) + (" (held out)" if found.get("held_out", True) else "")
            cells = [
                run.name,
                text,
                f"{found['context']:,}",
                "" if found.get("step") is None else f"{found['step']:,}",
                f"{targets:,}",
                f"{nats_to_bits(nats) / found.get('bytes_per_token', 1.0):.3f}" if targets else "?",
            ]
            rows.append(_row(cells[0], cells[1:]))
    return _table(("run", "text", "tokens per window", "checkpoint of step", "targets", "bits per byte"), rows)


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<h2>{title}</h2>\n<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _summary(runs: Sequence[_Run]) -> str:
    head = ("run", "steps", "held out", "parameters", "ranks", "tokens per step", "tokens/s", "of peak", "memory", "time")
    rows = []
    for n, run in enumerate(runs):
        data, step = run.config.data, max(run.curves.of("train", "loss")[0], default=0)
        mfu, memory, seconds = run.last("train", "mfu"), run.last("train", "peak_bytes"), run.last("train", "seconds")
        dot = f'<span class=dot style="background:{COLOURS[n % len(COLOURS)]}"></span>'
        cells = (
            f"{step:,} of {run.config.steps:,}",
            _number(run.last("eval", "bpb"), ".3f"),
            _number(run.machine.get("parameters"), ",.0f"),
            f"dp {run.machine['dp']} x sp {run.machine.get('sp', '?')}" if "dp" in run.machine else "?",
            f"{data.batch_size:,} x {data.context:,}",
            _number(run.last("train", "tokens_per_second"), ",.0f"),
            _number(mfu, ".1%"),
            "?" if memory is None else f"{memory / 2**30:.2f} GiB",
            _number(seconds, ",.0f", " s"),
        )
        numbers = "".join(f"<td class=n>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{dot}{escape(run.name)}</td>{numbers}</tr>")
    return _table(head, rows).replace("<table>", "<table class=numbers>")


def _number(value: Any, form: str, unit: str = "") -> str:
    """A formatted number; any other value (the file may come from another program) as it is."""
    if value is None:
        return "?"
    return f"{value:{form}}{unit}" if has_json_type(value, float) else str(value)


def _events(runs: Sequence[_Run]) -> str:
    rows = [
        f"<tr><td>{escape(run.name)}</td><td class=n>{r['step']:,}</td><td>{escape(r['what'])}</td>"
        f"<td>{escape(r.get('text', ''))}</td></tr>"
        for run in runs
        for r in run.curves.records
        if r["kind"] == "event" and r["what"] != "checkpoint"
    ]
    rows += [
        f"<tr><td>{escape(run.name)}</td><td></td><td>damaged metrics</td><td>{run.damaged} lines left out</td></tr>"
        for run in runs
        if run.damaged
    ]
    return "<h2>Events</h2>\n" + (
        _table(("run", "after step", "what", ""), rows)
        if rows
        else "<p class=note>Nothing was skipped, rolled back or alarmed.</p>"
    )


def _configuration(runs: Sequence[_Run]) -> str:
    flat = [_flat(run.config.model_dump(mode="json")) for run in runs]
    keys = sorted({key for config in flat for key in config})
    differing = [key for key in keys if len({config.get(key) for config in flat}) > 1]
    parts = ["<h2>Configuration</h2>"]
    if len(runs) > 1:
        rows = [_row(key, [config.get(key, "") for config in flat], " class=differs") for key in differing]
        parts.append(_table(("key", *(run.name for run in runs)), rows))
    same = [_row(key, [flat[0][key]]) for key in keys if key not in differing]
    parts.append(
        f"<details{'' if len(runs) > 1 else ' open'}><summary>{'the same in all' if len(runs) > 1 else 'all keys'}"
        f"</summary>{_table(('key', 'value'), same)}</details>"
    )
    return "\n".join(parts)


def _machines(runs: Sequence[_Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.machine))
    rows = [_row(key, [str(run.machine.get(key, "")) for run in runs]) for key in keys]
    return "<h2>Machine</h2>\n" + (
        _table(("", *(run.name for run in runs)), rows) if rows else "<p class=note>Not recorded.</p>"
    )


def _samples(runs: Sequence[_Run]) -> list[str]:
    return [f"<h2>Sample of {escape(run.name)}</h2>\n<pre>{escape(run.sample)}</pre>" for run in runs if run.sample]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def _row(key: str, values: Sequence[str], mark: str = "") -> str:
    return f"<tr{mark}><td>{escape(key)}</td>" + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
