"""The attention benchmark: its report, its baselines, and a bound on the memory of a pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from race_dist.benchmarks.attention import Shape, peak_added_bytes, run, store
from race_dist.benchmarks.baselines import baselines_for
from race_dist.benchmarks.timing import Timing


def test_a_report_holds_every_candidate_at_every_length(tmp_path: Path) -> None:
    said: list[str] = []
    report = run(Shape(0, heads=1, head_dim=8, tables=1, planes=2), [64, 128], torch.device("cpu"), repeats=2, say=said.append)
    picture = store(report, tmp_path / "docs" / "attention.json")
    stored = json.loads((tmp_path / "docs" / "attention.json").read_text())
    names = {"race", "sdpa", "elu linear attention"}
    assert {(row["name"], row["length"]) for row in stored["rows"]} == {(n, t) for n in names for t in (64, 128)}
    assert all(row["forward_backward_ms"]["calls"] == 2 and row["forward_ms"]["p50"] > 0 for row in stored["rows"])
    assert stored["machine"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(said) == 7


def test_a_slow_baseline_is_not_timed_at_longer_sequences() -> None:
    report = run(
        Shape(0, heads=1, head_dim=8, tables=1, planes=2),
        [64, 128],
        torch.device("cpu"),
        repeats=1,
        slowest=0.0,
        say=lambda line: None,
    )
    assert [row["name"] for row in report["rows"] if row["length"] == 128] == ["race"]


@pytest.mark.parametrize("causal", [True, False])
def test_the_linear_baseline_computes_linear_attention(causal: bool) -> None:
    """A baseline that computes something cheaper would falsify the comparison."""
    shape = Shape(128, heads=1, head_dim=8, causal=causal)
    q, k, v = torch.randn(3, 1, 128, 1, 8).double().unbind(0)
    score = (torch.nn.functional.elu(q[0, :, 0]) + 1) @ (torch.nn.functional.elu(k[0, :, 0]) + 1).mT
    score = score.tril() if causal else score
    wanted = score @ v[0, :, 0] / score.sum(-1, keepdim=True)
    call = next(p.call for p in baselines_for(shape, torch.device("cpu")) if p.name == "elu linear attention")
    assert call is not None
    assert torch.allclose(call(q, k, v)[0, :, 0], wanted)


def test_quantiles() -> None:
    assert Timing.of([float(i) for i in range(1, 12)]) == Timing(6.0, 2.0, 10.0, 11)


def test_a_pass_adds_little_beside_its_tensors() -> None:
    shape = Shape(2**16, heads=1, head_dim=64)
    assert 0.9 * shape.tensor_bytes <= peak_added_bytes(shape) <= 2 * shape.tensor_bytes


@pytest.mark.slow
def test_a_pass_over_a_million_tokens_adds_little_beside_its_tensors() -> None:
    shape = Shape(2**20, heads=2, head_dim=64)
    assert 0.9 * shape.tensor_bytes <= peak_added_bytes(shape) <= 1.2 * shape.tensor_bytes
