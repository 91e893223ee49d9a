"""A RACE core with some heads of a layer computes exactly what the whole layer computes for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.nn import HeadPartition, HeadRange, RaceAttention, RaceConfig, RaceCore, Sequence

F64 = torch.float64
HEADS, KV_HEADS, DIM = 8, 4, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "all trained": {"train_planes": True, "conv_values": True, "beta_init": (1.0, 2.0, 3.0, 4.0)},
    "shared planes": {"train_planes": True, "share_planes": True, "short_conv": 0},
    "fixed": {"train_beta": False, "decay": "multiscale", "normalization": "global", "beta_init": (1.0, 2.0, 3.0, 4.0)},
    "bare": {"qk_norm": False, "decay": "none", "normalization": "bucket", "share_planes": True, "rope_base": 100.0},
}


def config(name: str) -> RaceConfig:
    options = {"num_tables": 2, "num_planes": 2, **OPTIONS[name]}
    return RaceConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, seed=5, **options)


def partition(rank: int, ranks: int) -> HeadPartition:
    """As under tensor parallelism: with more ranks than key/value heads, several ranks share one."""
    query = HeadRange(rank * HEADS // ranks, HEADS // ranks, HEADS)
    key_value = HeadRange(rank * KV_HEADS // ranks, max(1, KV_HEADS // ranks), KV_HEADS)
    return HeadPartition(query, key_value, kv_replicated=ranks > KV_HEADS)


def run(core: RaceCore, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    sequence = Sequence.of(q.shape[1])
    (q, k, v), _ = core.convolve(q, k, v, None, sequence)
    out, sketch = core(q, k, v, None, sequence, log_decay=decay)
    return out, sketch.values


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_parts_are_the_whole(name: str, ranks: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 11, heads, DIM, generator=g, dtype=F64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    decay = -torch.rand(2, 11, KV_HEADS, generator=g, dtype=F64) if config(name).decay == "token" else None
    whole = RaceCore(config(name), 3, short_conv=True, dtype=F64)
    expected, state = run(whole, q, k, v, decay)
    gradient = torch.randn(expected.shape, generator=g, dtype=F64)
    (expected * gradient).sum().backward()
    found = {name: torch.zeros_like(p) for name, p in whole.named_parameters()}
    for rank in range(ranks):
        part = partition(rank, ranks)
        core = RaceCore(config(name), 3, partition=part, short_conv=True, dtype=F64)
        own = [part.query.narrow(q, 2), *(part.key_value.narrow(x, 2) for x in (k, v))]
        out, values = run(core, *own, None if decay is None else part.key_value.narrow(decay, 2))
        torch.testing.assert_close(out, part.query.narrow(expected, 2))
        torch.testing.assert_close(values, part.key_value.narrow(state, 1))
        (out * part.query.narrow(gradient, 2)).sum().backward()
        assert core.head_axes().keys() == dict(core.named_parameters()).keys()
        for path, axis in core.head_axes().items():
            parameter, full = core.get_parameter(path), whole.get_parameter(path)
            assert torch.equal(parameter, part.stored(full, axis))
            part.stored(found[path], axis).add_(parameter.grad)
    for path, total in found.items():
        torch.testing.assert_close(total, whole.get_parameter(path).grad)


def test_a_core_has_the_numbers_of_the_layer() -> None:
    layer = RaceAttention(config("all trained").model_copy(update={"dim": 32}), 3)
    core = RaceCore(config("all trained"), 3, short_conv=True)
    for name, parameter in core.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name))


def test_constants_stay_those_of_the_heads() -> None:
    part = partition(1, 2)
    core = RaceCore(config("fixed"), partition=part, short_conv=True).to(torch.bfloat16)
    whole = RaceCore(config("fixed"), short_conv=True)
    core.reset_constants(core.q_scale)
    assert core.beta is not None
    assert whole.beta is not None
    assert torch.equal(core.planes, whole.planes[2:])
    assert torch.equal(core.beta, whole.beta[2:])
    assert torch.equal(core.log_decay, whole.log_decay[2:])
