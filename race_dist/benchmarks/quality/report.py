"""A page and a plot of a protocol's results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from race_dist.files import write_text


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per variant, best first: at its best learning rate, mean and range over seeds, parameters, state, time."""
    rows = []
    for name, settings in data["variants"].items():
        runs = [r for r in data["runs"] if r["variant"] == name and "failed" not in r]
        if not runs:
            continue
        metric = "bits_per_byte" if "bits_per_byte" in runs[0] else "accuracy"
        seeds = settings["seeds"] or data["protocol"]["seeds"]
        first = [r for r in runs if r["seed"] == seeds[0]] or runs
        best = (min if metric == "bits_per_byte" else max)(first, key=lambda r: r[metric])
        at_best_rate = [r for r in runs if r["rate"] == best["rate"]]
        values = [r[metric] for r in at_best_rate]
        rows.append(
            {
                "variant": name,
                "metric": metric,
                "mean": statistics.fmean(values),
                "low": min(values),
                "high": max(values),
                "seeds": sorted(r["seed"] for r in at_best_rate),
                "rate": best["rate"],
                "rates": sorted({r["rate"] for r in first}),
                "parameters": best["parameters"],
                "state_bytes": best["state_bytes"],
                "seconds": statistics.fmean(r["seconds"] for r in at_best_rate),
                "runs": at_best_rate,
                "note": settings["note"],
            }
        )
    return sorted(rows, key=lambda r: r["mean"] if r["metric"] == "bits_per_byte" else -r["mean"])


def markdown(data: dict[str, Any]) -> str:
    """The page as Markdown."""
    protocol, rows = data["protocol"], summary(data)
    lines = [f"# {protocol['name']}", "", protocol["about"].strip(), ""]
    for machine in data["machines"]:
        hardware = machine.get("gpu") or machine["processor"]
        lines.append(
            f"Made {machine['date'][:10]} on {hardware} (torch {machine['torch']}, triton {machine['triton']}), "
            f"{machine['side_by_side']} runs side by side: `{machine['command']}`"
        )
    lines += ["", *_texts(data)]
    lines += [
        f"{protocol['steps']} steps of {protocol['batch_size']} sequences. The learning rate is the best one with "
        "the first seed. State: two bytes per number. Seconds were measured with concurrent runs: only a hint.",
        "",
    ]
    metric = "bits per byte" if rows and rows[0]["metric"] == "bits_per_byte" else "accuracy"
    lines += [
        f"| variant | {metric} | lowest to highest | seeds | learning rate (tried) | parameters, M | state, KiB | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tried = ", ".join(f"{rate:g}" for rate in row["rates"])
        lines.append(
            f"| {row['variant']} | {row['mean']:.4f} | {row['low']:.4f} to {row['high']:.4f} | {len(row['seeds'])} | "
            f"{row['rate']:g} ({tried}) | {row['parameters'] / 1e6:.2f} | {row['state_bytes'] / 1024:.0f} | "
            f"{row['seconds']:.0f} |"
        )
    lines += _kinds(rows)
    failed = [r for r in data["runs"] if "failed" in r]
    if failed:
        lines += ["", "Failed:", ""] + [f"- {r['variant']}, lr {r['rate']:g}, seed {r['seed']}: {r['failed']}" for r in failed]
    return "\n".join(lines) + "\n"


def _texts(data: dict[str, Any]) -> list[str]:
    """The texts of the runs: results on different texts, or with different numbers of passes, are not comparable."""
    texts = {
        (t["digest"], t["training_bytes"], t.get("passes"))
        for r in data["runs"]
        if "failed" not in r and "digest" in (t := r["task"])
    }
    lines = [
        f"Text: {size:,} bytes to train on (digest {digest[:12]})"
        + (f", read {passes:.2f} times." if passes is not None else ".")
        for digest, size, passes in sorted(texts, key=str)
    ]
    if len({digest for digest, *_ in texts}) > 1:
        lines.append("These are different texts: their figures are not comparable.")
    return [*lines, ""] if lines else []


def _kinds(rows: list[dict[str, Any]]) -> list[str]:
    """Recall by kind of sequence, one row per variant."""
    rows = [row for row in rows if row["metric"] == "accuracy"]
    if not rows:
        return []
    kinds = [(k["length"], k["pairs"]) for k in rows[0]["runs"][0]["by_kind"]]
    lines = [
        "",
        "Accuracy by length / pairs:",
        "",
        "| variant | " + " | ".join(f"{t}/{n}" for t, n in kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for row in rows:
        means = [statistics.fmean(r["by_kind"][n]["accuracy"] for r in row["runs"]) for n in range(len(kinds))]
        lines.append(f"| {row['variant']} | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    return lines


def write_report(data: dict[str, Any], path: Path) -> list[Path]:
    """Write the page and the plot next to the results; returns their paths."""
    rows = summary(data)
    page = path.with_suffix(".md")
    write_text(page, markdown(data))
    if not rows:
        return [page]
    picture = path.with_suffix(".png")
    (_draw_bits if rows[0]["metric"] == "bits_per_byte" else _draw_recall)(data, rows, picture)
    return [page, picture]


def _draw_bits(data: dict[str, Any], rows: list[dict[str, Any]], picture: Path) -> None:
    """Bits per byte of each variant with every seed, and by position in the context for the best and the worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 0.26 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["variant"] for row in rows]
    left.barh(names, [row["mean"] for row in rows], color="#9bbbd9")
    for y, row in enumerate(rows):
        left.plot([r["bits_per_byte"] for r in row["runs"]], [y] * len(row["runs"]), "k.", markersize=4)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    left.set(
        xlim=(low - 0.1 * (high - low) - 0.01, high + 0.02), xlabel="bits per byte, held out", title=data["protocol"]["name"]
    )
    left.invert_yaxis()
    left.tick_params(labelsize=7)
    for row in rows[:: max(1, len(rows) // 8)]:
        parts = row["runs"][0]["by_position"]
        right.plot([(n + 0.5) / len(parts) for n in range(len(parts))], parts, marker=".", label=row["variant"])
    right.set(xlabel="position in the context", ylabel="bits per byte")
    right.legend(fontsize=7)
    right.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def _draw_recall(data: dict[str, Any], rows: list[dict[str, Any]], picture: Path) -> None:
    """Accuracy against bytes of state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot([row["state_bytes"] / 1024], [row["mean"]], "o")
        axes.annotate(
            row["variant"], (row["state_bytes"] / 1024, row["mean"]), fontsize=7, xytext=(4, 2), textcoords="offset points"
        )
    axes.set(
        xscale="log",
        xlabel="state, KiB at two bytes per number",
        ylabel="accuracy over all kinds",
        title=data["protocol"]["name"],
    )
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
