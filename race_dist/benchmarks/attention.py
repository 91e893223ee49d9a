"""``race-dist bench attention``: one attention call, forward and forward + backward, next to baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_dist.attention import race_attention
from race_dist.benchmarks.baselines import Baseline, baselines_for
from race_dist.benchmarks.timing import Timing, time_in_turn
from race_dist.files import write_json
from race_dist.hashing import sample_planes
from race_dist.machine import machine_info, peak_resident_bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call with B = 1; ``kv_heads = None``: as many key/value heads as query heads."""

    length: int
    heads: int = 2
    head_dim: int = 64
    tables: int = 4
    planes: int = 4
    causal: bool = True
    dtype: str = "float32"
    kv_heads: int | None = None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v, out and their gradients."""
        heads = 4 * (self.heads + (self.kv_heads or self.heads))
        return heads * self.length * self.head_dim * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Row:
    """One line of the table: the candidate, the sizes, and the times."""

    name: str
    shape: Shape
    forward: Timing
    forward_backward: Timing

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            **asdict(self.shape),
            "forward_ms": self.forward.json(),
            "forward_backward_ms": self.forward_backward.json(),
        }


def inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    """Random q, k, v ``[1, T, H, D]`` that require gradients."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(0)
    kv_heads = shape.kv_heads or shape.heads
    sizes = [(1, shape.length, heads, shape.head_dim) for heads in (shape.heads, kv_heads, kv_heads)]
    return [torch.randn(size, device=device, dtype=dtype, generator=generator).requires_grad_() for size in sizes]


def race(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention under test."""
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32  # sampled planes are bfloat16 numbers
    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=device, dtype=dtype)
    return lambda q, k, v: race_attention(q, k, v, planes, 2.0, causal=shape.causal)


def compare(shape: Shape, device: torch.device, *, repeats: int, slowest: float, skip: set[str]) -> Iterator[Row]:
    """Rows of RACE and of every baseline, timed in turn.

    Args:
        slowest: seconds; a baseline whose forward + backward takes longer is added to ``skip`` for longer sequences.
        skip: names of baselines that are not timed; the function adds to it.
    """
    q, k, v = inputs(shape, device)
    gradient = torch.randn(1, shape.length, shape.heads, shape.head_dim, device=device, dtype=q.dtype)
    candidates: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"race": race(shape, device)}
    for baseline in baselines_for(shape, device):
        if baseline.call is not None and baseline.name not in skip:
            candidates[baseline.name] = baseline.call

    def forward(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                call(q, k, v)

        return run

    def both(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(q, k, v), (q, k, v), gradient)

    forwards = time_in_turn({n: forward(c) for n, c in candidates.items()}, device, repeats=repeats)
    whole = time_in_turn({n: both(c) for n, c in candidates.items()}, device, repeats=repeats)
    for name in candidates:
        if whole[name].p50 > 1e3 * slowest:
            skip.add(name)
        yield Row(name, shape, forwards[name], whole[name])


def peak_added_bytes(shape: Shape) -> int:
    """Resident bytes that a forward + backward pass adds on the CPU: q, k, v, out, their gradients and temporaries.

    Measured in a separate process, whose peak includes nothing else.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, shape).result()


def _peak(shape: Shape) -> int:
    device = torch.device("cpu")

    def step(part: Shape) -> None:
        call, tensors = race(part, device), inputs(part, device)
        out = call(*tensors)
        out.backward(torch.ones_like(out))

    step(replace(shape, length=256))  # loads libraries and starts thread pools
    before = peak_resident_bytes()
    step(shape)
    return peak_resident_bytes() - before


def run(
    base: Shape,
    lengths: list[int],
    device: torch.device,
    *,
    repeats: int = 5,
    slowest: float = 5.0,
    memory_length: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the comparison; the result is the JSON that is stored.

    Args:
        base: the sizes, without the length.
        lengths: of the sequences.
        slowest: seconds; baselines slower than this are not timed at longer lengths.
        memory_length: also measure the resident memory that a pass adds at this length (CPU).
        say: receives one line per row.
    """
    rows: list[Row] = []
    skip: set[str] = set()
    absent: dict[str, str] = {p.name: p.absent for p in _all_baselines(base, device) if p.absent}
    for name, reason in absent.items():
        say(f"{name}: left out, {reason}")
    say(f"{'':24}{'T':>9}{'forward ms':>13}{'both ms':>12}{'times RACE':>12}")
    for length in lengths:
        start = len(rows)
        for row in compare(replace(base, length=length), device, repeats=repeats, slowest=slowest, skip=skip):
            rows.append(row)
            ratio = row.forward_backward.p50 / rows[start].forward_backward.p50
            say(f"{row.name:24}{length:>9}{row.forward.p50:>13.2f}{row.forward_backward.p50:>12.2f}{ratio:>12.2f}")
    report: dict[str, Any] = {"machine": machine_info(device), "absent": absent, "rows": [row.json() for row in rows]}
    if memory_length is not None:
        shape = replace(base, length=memory_length)
        added = peak_added_bytes(shape)
        report["memory"] = {
            **asdict(shape),
            "tensor_bytes": shape.tensor_bytes,
            "peak_added_bytes": added,
            "ratio": round(added / shape.tensor_bytes, 3),
        }
        say(
            f"memory at T = {memory_length}: q, k, v, out and gradients {shape.tensor_bytes / 2**20:.0f} MiB, "
            f"peak added {added / 2**20:.0f} MiB ({added / shape.tensor_bytes:.2f} times)"
        )
    return report


def _all_baselines(base: Shape, device: torch.device) -> list[Baseline]:
    return baselines_for(replace(base, length=256), device)


def store(report: dict[str, Any], path: Path) -> Path:
    """Write the JSON and a plot next to it; returns the plot's path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(row["name"] for row in report["rows"]):
            own_rows = [row for row in report["rows"] if row["name"] == name]
            axes.plot(
                [row["length"] for row in own_rows],
                [row["forward_backward_ms"]["p50"] for row in own_rows],
                marker="o",
                label=name,
            )
        first = report["rows"][0]
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens",
            ylabel="forward + backward, ms (median)",
            title=f"{report['machine'].get('gpu') or report['machine']['processor']}, {first['dtype']}, "
            f"H = {first['heads']}, D = {first['head_dim']}, L = {first['tables']}, P = {first['planes']}",
        )
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend()
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=150)
    return picture
