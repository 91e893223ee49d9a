"""The exchange overlaps local work, and the call works in compiled and checkpointed code."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.utils.checkpoint import checkpoint

from race_dist import SketchState, race_attention
from race_dist.distributed import communication
from race_dist.ops import chunked
from race_dist.parallel import scan
from race_dist.parallel.attention import context_parallel_attention


class Recorder:
    """The chunked backend, which records the order of its calls."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.__name__ = "recorder"

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.events.append(name)
            return getattr(chunked, name)(*args, **kwargs)

        return call


def order_of_events(group):
    events: list[str] = []
    start, wait = scan.start_all_gather, communication.PendingCollective.wait
    scan.start_all_gather = lambda *a: events.append("send") or start(*a)
    communication.PendingCollective.wait = lambda self: events.append("wait " + self._op) or wait(self)
    try:
        q = torch.randn(1, 8, 2, 4, requires_grad=True)

        def recorded(p, *_, **options):
            return context_parallel_attention(p, group, "contiguous", Recorder(events), **options)

        with mock.patch("race_dist.parallel.attention.context_parallel_attention", recorded):
            out = race_attention(q, q, q, torch.ones(1, 1, 4), 1.0, group=group)
        forward, events[:] = [e for e in events if e != "wait all_reduce"], []
        out.sum().backward()
    finally:
        scan.start_all_gather, communication.PendingCollective.wait = start, wait
    return forward[1:], [
        e for e in events if e != "wait all_reduce"
    ]  # the first wait is for the header of the consistency check


def test_one_half_is_sent_while_the_other_computes() -> None:
    for forward, backward in run_ranks(2, order_of_events):
        assert forward == [
            "start_forward",
            "send",
            "start_forward",
            "send",
            "wait all_gather",
            "finish_forward",
            "wait all_gather",
            "finish_forward",
        ]
        assert backward == [
            "start_backward",
            "send",
            "start_backward",
            "send",
            "wait all_gather",
            "finish_backward",
            "wait all_gather",
            "finish_backward",
        ]


def arrives_without_waiting(group):
    carry = SketchState.empty(4, 4, 64, 64)
    pending = communication.start_all_gather(communication.pack(carry.tensors()), group)
    (work,) = pending._works
    deadline = time.monotonic() + 20
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.01)
    done = work.is_completed()
    pending.wait()
    return done


def test_the_exchange_needs_nobody_to_wait_for_it() -> None:
    assert all(run_ranks(3, arrives_without_waiting))


def layer(q, k, planes, group):
    out, final = race_attention(torch.sin(q), k, k * 2, planes, 1.5, group=group, output_final_state=True)
    return out.cos().sum() + final.mass.sum()


def wrapped(group, how):
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    results = []
    planes = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    q, k = (torch.randn(1, 10, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    for wrap in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        if not wrap:
            loss = layer(*leaves, planes, group)
        elif how == "compile":
            loss = torch.compile(layer, backend="aot_eager")(*leaves, planes, group)
        else:
            loss = checkpoint(layer, *leaves, planes, group, use_reentrant=False)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_compiled_and_checkpointed(how: str) -> None:
    for plain, other in run_ranks(2, wrapped, how):
        for a, b in zip(plain, other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
