"""Streaming over several ranks: super-chunks sharded over the group have the gradients of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.streaming import streamed_backward
from tests.distributed.harness import run_ranks
from tests.test_streaming import assert_same, gradients, model, text


def step(group: ProcessGroup, pattern: str, length: int, chunk_size: int, bounds: list[int] | None) -> tuple[Any, ...]:
    net, (ids, labels) = model(pattern), text(1, length)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    loss = streamed_backward(net, ids, labels, chunk_size=chunk_size, group=group, cu_seqlens=cu_seqlens)
    return float(loss), gradients(net)


@pytest.mark.parametrize(("world", "pattern", "length", "chunk_size", "bounds"), [
    (2, "RW", 41, 8, None), (3, "R", 40, 5, None), (4, "W", 37, 4, None), (3, "RW", 41, 5, [0, 4, 15, 30, 41]),
    (4, "R", 3, 5, None)])
def test_equals_one_rank(world: int, pattern: str, length: int, chunk_size: int, bounds: list[int] | None) -> None:
    net, (ids, labels) = model(pattern), text(1, length)
    wanted_loss: Tensor = net(ids, labels, cu_seqlens=None if bounds is None else torch.tensor(bounds))
    wanted_loss.backward()
    for loss, got in run_ranks(world, step, pattern, length, chunk_size, bounds):
        assert abs(loss - float(wanted_loss.detach())) <= 1e-12
        assert_same(got, gradients(net))
