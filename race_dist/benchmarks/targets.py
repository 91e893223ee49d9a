"""One GPU's figures for the attention: times by device events, peak memory, baselines in the same run.

    python -m race_dist.benchmarks.targets --out docs/benchmarks/attention-h100.json

Each measurement is written as soon as it is done, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from race_dist.attention import race_attention
from race_dist.benchmarks.attention import Shape, inputs
from race_dist.benchmarks.baselines import baselines_for, linear_attention_baseline
from race_dist.benchmarks.decode import time_decode
from race_dist.benchmarks.timing import time_in_turn
from race_dist.hashing import sample_planes
from race_dist.machine import machine_info
from race_dist.ops.inputs import Normalization

BASE = Shape(length=2**20, heads=8, head_dim=128, tables=4, planes=4, dtype="bfloat16")
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_call(
    shape: Shape,
    device: torch.device,
    *,
    normalization: Normalization = "global",
    decay: bool = False,
    planes: Tensor | None = None,
) -> Call:
    """The attention as README calls it, with planes as ``sample_planes`` returns them unless given."""
    if planes is None:
        planes = sampled(shape, device)
    log_decay = None
    if decay:
        generator = torch.Generator(device).manual_seed(1)
        log_decay = -0.01 * torch.rand(1, shape.length, shape.heads, device=device, generator=generator)
    return lambda q, k, v: race_attention(
        q, k, v, planes, 2.0, causal=shape.causal, log_decay=log_decay, normalization=normalization
    )


def sampled(shape: Shape, device: torch.device, **options: Any) -> Tensor:
    """Sampled planes of a shape."""
    return sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=device, **options)


def measure(
    shape: Shape, calls: dict[str, Call], device: torch.device, *, repeats: int = 5, also: tuple[Tensor, ...] = ()
) -> dict[str, Any]:
    """Forward, and forward + backward, of each call in turn; peak memory of the first over q, k, v, o and gradients.
    ``also``: further tensors that get a gradient."""
    q, k, v = inputs(shape, device)
    gradient = torch.randn_like(q)

    def forward(call: Call) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                call(q, k, v)

        return run

    def both(call: Call) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(q, k, v), (q, k, v, *also), gradient)

    forwards = time_in_turn({n: forward(c) for n, c in calls.items()}, device, repeats=repeats)
    whole = time_in_turn({n: both(c) for n, c in calls.items()}, device, repeats=repeats)
    result: dict[str, Any] = {
        **asdict(shape),
        "tensor_bytes": shape.tensor_bytes,
        "rows": {name: {"forward_ms": forwards[name].json(), "forward_backward_ms": whole[name].json()} for name in calls},
    }
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    both(next(iter(calls.values())))()
    torch.cuda.synchronize(device)
    result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    result["peak_ratio"] = round(result["peak_bytes"] / shape.tensor_bytes, 3)
    return result


def measures(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every measurement by name."""
    race_only = lambda shape: {"race": attention_call(shape, device)}
    few_features, many_features = replace(BASE, tables=2, planes=2), replace(BASE, tables=1, planes=8)
    tables = {f"P=4 L={n}": replace(BASE, tables=n) for n in (8, 16)}
    non_causal, four_heads = replace(BASE, causal=False), replace(BASE, length=2**22, heads=4)
    longest = replace(BASE, length=8_912_896, heads=4)
    result: dict[str, Callable[[], dict[str, Any]]] = {
        "P=4 L=4": lambda: measure(
            BASE,
            {
                **race_only(BASE),
                "race, bfloat16 planes": attention_call(BASE, device, planes=sampled(BASE, device, dtype=torch.bfloat16)),
            },
            device,
        ),
        "trained planes": partial(_trained, device),
        "P=2 L=2": lambda: measure(few_features, race_only(few_features), device),
        "decay per token, none": lambda: measure(
            BASE, {"race none decay": attention_call(BASE, device, normalization="none", decay=True), **race_only(BASE)}, device
        ),
        "not causal": lambda: measure(non_causal, race_only(non_causal), device),
        "decode, 64 heads": lambda: time_decode(device),
        "4 heads, T = 2**22": lambda: measure(four_heads, race_only(four_heads), device, repeats=3),
        "longest, 4 heads": lambda: measure(longest, race_only(longest), device, repeats=1),
    }
    for length in (4096, 8192, 16384, 131072):
        result[f"softmax, T = {length}"] = partial(_next_to_softmax, replace(BASE, length=length), device)
    result["linear attention, T = 2**20"] = lambda: measure(
        BASE, {**race_only(BASE), "compiled features + fla": linear_attention_baseline(BASE, device)}, device, repeats=3
    )
    result["P=8 L=1"] = lambda: measure(many_features, race_only(many_features), device, repeats=3)
    grouped = replace(BASE, kv_heads=2)
    result["grouped 4:1"] = lambda: measure(grouped, race_only(grouped), device)
    # Kernel families without a pipelined version.
    for name, shape in {
        **tables,
        "P=8 L=1, not causal": replace(many_features, causal=False),
        "P=8 L=1, grouped 4:1": replace(many_features, kv_heads=2),
        "float16": replace(BASE, dtype="float16"),
        "D = 256": replace(BASE, heads=4, head_dim=256),
    }.items():
        result[name] = partial(_plain, shape, device)
    result["bucket"] = lambda: measure(
        BASE, {"race, bucket": attention_call(BASE, device, normalization="bucket")}, device, repeats=1
    )
    return result


def _trained(device: torch.device) -> dict[str, Any]:
    planes = sampled(BASE, device).requires_grad_()
    return measure(BASE, {"race, trained planes": attention_call(BASE, device, planes=planes)}, device, also=(planes,))


def _plain(shape: Shape, device: torch.device) -> dict[str, Any]:
    return measure(shape, {"race": attention_call(shape, device)}, device, repeats=1)


def _next_to_softmax(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Times of single calls, launched while the device is idle, and of the same calls captured in CUDA graphs, which leaves
    device time only."""
    baselines = {
        baseline.name: baseline.call
        for baseline in baselines_for(shape, device)
        if baseline.call is not None and baseline.name.startswith(("sdpa", "flash"))
    }
    calls, repeats = {"race": attention_call(shape, device), **baselines}, 10 if shape.length < 2**17 else 2
    result = measure(shape, calls, device, repeats=repeats)
    graphs = {name: _captured(call, shape, device) for name, call in calls.items()}
    for name, timing in time_in_turn({n: graph.replay for n, graph in graphs.items()}, device, repeats=repeats).items():
        result["rows"][name]["graph_forward_backward_ms"] = timing.json()
    return result


def _captured(call: Call, shape: Shape, device: torch.device) -> torch.cuda.CUDAGraph:
    """Forward + backward of a call as a CUDA graph."""
    q, k, v = inputs(shape, device)
    gradient = torch.randn_like(q)
    step = lambda: torch.autograd.grad(call(q, k, v), (q, k, v), gradient)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles kernels and initializes autograd outside the capture
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def main() -> None:
    """Run the selected measurements and write each result at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="measurements whose name contains this")
    parser.add_argument("--skip", default="", help="skip measurements whose name contains one of these, separated by commas")
    options = parser.parse_args()
    device = torch.device("cuda")
    report: dict[str, Any] = {"machine": machine_info(device), "measures": {}}
    for name, run in measures(device).items():
        if options.only not in name or any(part in name for part in options.skip.split(",") if part):
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            report["measures"][name] = run()
        except (RuntimeError, ImportError, ValueError) as error:  # out of memory, a missing baseline
            report["measures"][name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(name, _summary(report["measures"][name]), flush=True)
    draw(report, options.out.with_suffix(".png"))


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot forward + backward times by length, RACE and softmax, from the measurements at BASE's sizes."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for name, measure in report["measures"].items():
        if name == "P=4 L=4" or name.startswith("softmax"):
            for candidate, row in measure.get("rows", {}).items():
                lines.setdefault(candidate, []).append((measure["length"], row["forward_backward_ms"]["p50"]))
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for candidate, points in lines.items():
        axes.loglog(*zip(*sorted(points)), marker="o", label=candidate)
    axes.set(
        xlabel="tokens",
        ylabel="forward + backward, ms (median)",
        title=f"{report['machine'].get('gpu', '')}, bfloat16, H = {BASE.heads}, D = {BASE.head_dim}, L = 4, P = 4, causal",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _summary(result: dict[str, Any]) -> str:
    if "rows" not in result:
        return str(result)
    rows = (
        f"{name}: forward {row['forward_ms']['p50']:.2f}, both {row['forward_backward_ms']['p50']:.2f} ms"
        for name, row in result["rows"].items()
    )
    return "; ".join(rows) + f"; peak {result['peak_ratio']}"


if __name__ == "__main__":
    main()
