"""The Triton backend over a group, in the interpreter: a pass that starts without its initial state ends exactly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from race_dist import race_attention, sample_planes
from race_dist.parallel.sharding import shard_rows
from tests.ops.cases import relative_error

pytest.importorskip("triton")
LENGTHS = (37, 13)
CALLS = {
    "global": {},
    "decay": {"decay": True, "normalization": "none"},
    "decay, global": {"decay": True},
    "zigzag": {"layout": "zigzag"},
    "bucket": {"normalization": "bucket"},
    "not causal": {"causal": False},
    "documents": {"documents": (20, 0, 30), "decay": True},
    "one row": {"lengths": (1, 49)},
}


def attend(call: dict, rows: Tensor | None, group) -> dict[str, Tensor]:
    """Output, final state and gradients of some rows of the sequence; float32 on ranks, float64 on one."""
    g = torch.Generator().manual_seed(1)
    dtype, total = torch.float64 if group is None else torch.float32, 50
    normal = lambda *shape: torch.randn(*shape, generator=g)
    q, k, v, do, rate = (
        normal(1, total, 4, 16),
        normal(1, total, 2, 16),
        normal(1, total, 2, 16),
        normal(1, total, 4, 16),
        (-0.1 * torch.rand(1, total, 2, generator=g)),
    )
    rows = torch.arange(total) if rows is None else rows
    take = lambda x: x[:, rows].to(dtype)
    leaves = {"q": take(q), "k": take(k), "v": take(v), "beta": torch.full((2,), 1.5, dtype=dtype)}
    if "decay" in call:
        leaves["log_decay"] = take(rate)
    for x in leaves.values():
        x.requires_grad_()
    cu_seqlens = torch.tensor([0, *call["documents"]]).cumsum(0) if "documents" in call else None
    planes = sample_planes(2, 2, 16, num_heads=2, seed=0, dtype=dtype)
    where = (
        {"backend": "chunked"}
        if group is None
        else {"backend": "triton", "group": group, "layout": call.get("layout", "contiguous")}
    )
    out, final = race_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        planes,
        leaves["beta"],
        causal=call.get("causal", True),
        normalization=call.get("normalization", "global"),
        log_decay=leaves.get("log_decay"),
        cu_seqlens=cu_seqlens,
        output_final_state=True,
        **where,
    )
    share = 1 if group is None else 1 / dist.get_world_size(group)
    grads = torch.autograd.grad((out * take(do)).sum() + share * final.values.sum(), tuple(leaves.values()))
    return {
        "out": out.detach(),
        "final": final.values.detach(),
        **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)},
    }


def rows_of(call: dict, rank: int) -> Tensor:
    if call.get("layout") == "zigzag":
        return shard_rows(50 - 50 % 4, rank, 2, layout="zigzag")
    return torch.arange(50).split(list(call.get("lengths", LENGTHS)))[rank]


def on_rank(group, call: dict) -> dict[str, Tensor]:
    return attend(call, rows_of(call, dist.get_rank(group)), group)


@pytest.mark.parametrize("name", CALLS)
def test_two_ranks_compute_what_one_does(name: str) -> None:
    call = CALLS[name]
    shared = run_ranks(2, on_rank, call)
    rows = [rows_of(call, rank) for rank in range(2)]
    whole = attend(call, torch.cat(rows).sort().values, None)
    place = torch.cat(rows).argsort()
    for part, wanted in whole.items():
        if part == "final":
            assert all(relative_error(one[part], wanted) <= 1e-5 for one in shared)
            continue
        got = sum(one[part] for one in shared) if part == "dbeta" else torch.cat([one[part] for one in shared], 1)[:, place]
        assert relative_error(got, wanted) <= (1e-4 if part == "dbeta" else 1e-5), part
