"""The scaling benchmark at small sizes over gloo: every part runs, baselines are exact, the time limit leaves a JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup

from race_dist.benchmarks.scaling.softmax import ring, ulysses
from race_dist.parallel import Layout, shard_sequence
from tests.distributed.harness import run_ranks

ROOT = Path(__file__).parents[2]


def scaling(out: Path, *options: str) -> dict[str, Any]:
    """Run the benchmark on two ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "race_dist.benchmarks.scaling",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--config",
        str(ROOT / "configs/streaming-cpu.toml"),
        "--tokens",
        "4000",
        "--chunk",
        "512",
        "-o",
        "model.dim=32",
        "-o",
        "model.ffn_dim=64",
        *options,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=200, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_every_part_measures(tmp_path: Path) -> None:
    report = scaling(tmp_path / "scaling.json")
    assert report["exactness"]["all_ok"]
    assert {row["algorithm"] for row in report["exchange"]["rows"]} == {"all_gather", "recursive_doubling"}
    for row in report["exchange"]["rows"]:
        assert row["sent"]["bytes"] >= row["state_bytes"] == 4 * 4 * 8 * (16 + 1)  # float32, 4 heads, 8 features, 16 values
    for row in (*report["strong"]["rows"], *report["weak"]["attention"], *report["weak"]["layer"]):
        assert row["both_ms"] > 0
        assert row["efficiency"] == pytest.approx(1.0) or row["ranks"] == 2
    step = report["streamed_step"]
    assert step["shared"]["tokens"] == 4096  # 4000, rounded up to whole chunks of both ranks
    assert step["efficiency"] == pytest.approx(step["speedup"] / 2)
    assert step["predicted_seconds"] > 0
    assert [row["name"] for row in report["baselines"]["rows"] if "both_ms" in row] == ["race", "ulysses", "ring"]


def test_a_limit_leaves_a_json_of_what_was_measured(tmp_path: Path) -> None:
    report = scaling(tmp_path / "scaling.json", "--parts", "exactness,weak,peers", "--seconds", "1")
    assert report["exactness"]["all_ok"]
    assert "limit had passed" in report["baselines"]["skipped"]


def baseline_errors(group: ProcessGroup, length: int, heads: int, name: str, layout: Layout) -> tuple[float, ...]:
    """Relative errors of output and gradients against one rank."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, length, heads, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    leaves = [t.clone().requires_grad_() for t in whole[:3]]
    wanted = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=True)
    wanted = wanted.transpose(1, 2)
    cut = lambda x: shard_sequence(x, group, dim=1, layout=layout)
    expected = [cut(t) for t in (wanted.detach(), *torch.autograd.grad(wanted, leaves, whole[3]))]
    shards = [cut(t).clone().requires_grad_() for t in whole[:3]]
    out = {"ring": ring, "ulysses": ulysses}[name](*shards, group)
    got = [out.detach(), *torch.autograd.grad(out, shards, cut(whole[3]))]
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("world", "length", "heads", "name", "layout"),
    [
        (2, 32, 2, "ring", "zigzag"),
        (3, 48, 2, "ring", "zigzag"),
        (4, 64, 1, "ring", "zigzag"),
        (2, 30, 4, "ulysses", "contiguous"),
        (3, 33, 3, "ulysses", "contiguous"),
    ],
)
def test_softmax_baselines_are_exact(world: int, length: int, heads: int, name: str, layout: Layout) -> None:
    for errors in run_ranks(world, baseline_errors, length, heads, name, layout):
        assert max(errors) <= 1e-6  # ring attention adds its blocks in float32
