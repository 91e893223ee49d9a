"""``race-dist bench decode``: device time of decoding one token with one attention layer, at any context length."""

from __future__ import annotations

import time
from typing import Any

import torch

from race_dist.attention import race_attention
from race_dist.benchmarks.timing import Timing
from race_dist.hashing import sample_planes
from race_dist.sketch import SketchState


def time_decode(
    device: torch.device,
    *,
    heads: int = 64,
    head_dim: int = 128,
    tables: int = 4,
    planes: int = 4,
    contexts: tuple[int, ...] = (1_000, 1_000_000, 1_000_000_000),
    steps: int = 50,
) -> dict[str, Any]:
    """Microseconds of one decode step after each context: on a GPU, device time of replays of a CUDA graph of ``steps`` steps.

    The state stands for n random tokens: its mass sums to n in every table.
    """
    dtype = torch.bfloat16
    hyperplanes = sample_planes(tables, planes, head_dim, seed=0, device=device, dtype=dtype)
    q, k, v = (torch.randn(1, 1, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    beta = torch.tensor(2.0, device=device)
    rows = {}
    for context in contexts:
        mass = torch.full((1, heads, tables * 2**planes), context / 2**planes, device=device)
        state = SketchState(mass, torch.randn(*mass.shape, head_dim, device=device) * context**0.5)

        def step(state: SketchState = state) -> None:
            with torch.no_grad():
                race_attention(q, k, v, hyperplanes, beta, initial_state=state, output_final_state=True)

        rows[context] = Timing.of(
            _graph_microseconds(step, device, steps) if device.type == "cuda" else _wall_microseconds(step, steps)
        ).json()
    return {"heads": heads, "head_dim": head_dim, "tables": tables, "planes": planes, "microseconds": rows}


def _wall_microseconds(step: Any, steps: int) -> list[float]:
    """Microseconds of each of ``steps`` calls, wall-clock time."""
    step()
    samples = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        samples.append(1e6 * (time.perf_counter() - start))
    return samples


def _graph_microseconds(step: Any, device: torch.device, steps: int) -> list[float]:
    """Microseconds per step, by CUDA events around replays of a graph of ``steps`` steps."""
    for _ in range(3):
        step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            step()
    samples = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(1e3 * begin.elapsed_time(end) / steps)
    return samples[2:]
