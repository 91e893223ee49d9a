"""Sharding and unsharding: every layout, uneven and empty shards, documents, gradients, positions."""

from __future__ import annotations

import pytest
import torch
from harness import RankError, run_ranks

from race_dist.parallel.sharding import (
    check_layout,
    local_segments,
    shard_lengths,
    shard_positions,
    shard_rows,
    shard_sequence,
    unshard_sequence,
)


def documents(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def round_trip(group, total, layout, cu, dim):
    x = torch.randn(2, total, 3, dtype=torch.float64).movedim(1, dim).requires_grad_()
    shard = shard_sequence(x, group, dim=dim, layout=layout, cu_seqlens=cu)
    whole = unshard_sequence(shard, group, dim=dim, layout=layout, cu_seqlens=cu)
    rank = torch.distributed.get_rank(group)
    (whole * (rank + 1)).square().sum().backward()
    positions = shard_positions(shard.shape[dim], group, layout=layout, cu_seqlens=cu)
    return whole.detach().equal(x.detach()), shard.shape[dim], x.grad, x.detach(), positions


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_round_trip(world: int, layout: str, packed: bool) -> None:
    lengths = [2 * world, 0, 6 * world, 4 * world] if layout == "zigzag" else [3, 0, 7, 1]
    cu = documents(lengths) if packed else None
    total = sum(lengths)
    results = run_ranks(world, round_trip, total, layout, cu, 1)
    assert all(same for same, *_ in results)
    if layout == "contiguous":
        assert [n for _, n, *_ in results] == shard_lengths(total, world)
    x = results[0][3]
    scale = sum((r + 1.0) ** 2 for r in range(world))
    assert torch.allclose(sum(g for *_, g, _, _ in results), 2 * scale * x)
    starts = torch.zeros(total, dtype=torch.int64) if cu is None else cu[:-1].repeat_interleave(cu.diff())
    for rank, (*_, positions) in enumerate(results):
        rows = shard_rows(total, rank, world, layout=layout, cu_seqlens=cu)
        assert positions.equal(rows - starts[rows])


def test_fewer_rows_than_ranks_and_other_dimensions() -> None:
    for dim in (0, 2, -1):
        results = run_ranks(5, round_trip, 3, "contiguous", None, dim)
        assert all(same for same, *_ in results)
        assert [n for _, n, *_ in results] == [1, 1, 1, 0, 0]


def test_no_rows_at_all() -> None:
    assert all(same and length == 0 for same, length, *_ in run_ranks(2, round_trip, 0, "contiguous", None, 0))


def uneven(group, lengths):
    rank = torch.distributed.get_rank(group)
    x = torch.arange(sum(lengths)).split(lengths)[rank].double().requires_grad_()
    whole = unshard_sequence(x, group, dim=0)
    (whole * torch.arange(sum(lengths))).sum().backward()
    return whole.detach(), x.grad, shard_positions(lengths[rank], group)


def test_shards_of_any_length() -> None:
    lengths = [0, 5, 0, 2]
    results = run_ranks(4, uneven, lengths)
    rows = torch.arange(7)
    for (whole, grad, positions), mine in zip(results, rows.split(lengths)):
        assert whole.equal(rows.double())
        assert grad.equal(4.0 * mine)
        assert positions.equal(mine)


def test_every_row_is_held_once() -> None:
    for world in range(1, 6):
        for layout, lengths in (("contiguous", [5, 0, 1, 11]), ("zigzag", [4 * world, 0, 2 * world, 2 * world])):
            for cu in (None, documents(lengths)):
                rows = [shard_rows(sum(lengths), r, world, layout=layout, cu_seqlens=cu) for r in range(world)]
                assert torch.cat(rows).sort().values.equal(torch.arange(sum(lengths)))


def test_zigzag_is_the_order_of_context_parallelism() -> None:
    assert shard_rows(12, 1, 3, layout="zigzag").tolist() == [2, 3, 8, 9]
    cu = documents([6, 12])
    assert shard_rows(18, 0, 3, layout="zigzag", cu_seqlens=cu).tolist() == [0, 5, 6, 7, 16, 17]


def test_segments_of_contiguous_documents() -> None:
    runs = local_segments(4, 1, 3, cu_seqlens=documents([3, 0, 4, 5]), offset=4)
    assert runs.cu_seqlens.tolist() == [0, 0, 0, 3, 4]
    assert runs.starts[2:].tolist() == [1, 0]
    assert runs.positions(4).tolist() == [1, 2, 3, 0]


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="'contiguous', 'zigzag'; got 'spiral'"):
        check_layout("spiral")
    with pytest.raises(ValueError, match="10 rows do not divide by 4"):
        shard_rows(10, 0, 2, layout="zigzag")
    with pytest.raises(ValueError, match="document 1 has 2 rows, which do not divide by 4"):
        shard_rows(8, 0, 2, layout="zigzag", cu_seqlens=documents([4, 2, 2]))
    with pytest.raises(ValueError, match=r"dim = 3 is no dimension of a tensor of shape \[5\]"):
        shard_sequence(torch.zeros(5), None, dim=3)
    with pytest.raises(TypeError, match=r"must be a torch.Tensor; got list"):
        shard_sequence([1, 2], None, dim=0)
    with pytest.raises(RankError, match="holds 3 of 6 rows under the contiguous layout, but was given 2"):
        run_ranks(2, wrong_total)
    with pytest.raises(RankError, match=r"layout is contiguous on ranks 0, 2, but zigzag on rank 1"):
        run_ranks(3, different_layouts)


def wrong_total(group):
    unshard_sequence(torch.zeros(2), group, dim=0, total=6)


def different_layouts(group):
    layout = "zigzag" if torch.distributed.get_rank(group) == 1 else "contiguous"
    unshard_sequence(torch.zeros(2, 6), group, dim=1, layout=layout)
