"""Context parallelism in one process: packing, folding, shard partitions, a world of one, errors."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from race_dist import SketchState
from race_dist.distributed.collectives import tree_sum
from race_dist.distributed.communication import pack, packed_size, unpack
from race_dist.ops.inputs import AttentionInputs
from race_dist.parallel import (
    RankFailure,
    all_reduce_sum,
    build_mesh,
    check_same_on_all_ranks,
    exclusive_scan,
    exclusive_sum,
    fold,
    init_distributed,
    shard_positions,
    shard_sequence,
    shutdown,
    unshard_sequence,
)
from race_dist.parallel.shard_partition import ShardPartition


def test_pack_and_unpack() -> None:
    tensors = [
        torch.randn(2, 3),
        torch.tensor(7),
        torch.randn(0, 4, dtype=torch.float64),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.randn(4, 2, dtype=torch.float64).T,
    ]
    buffer = pack(tensors)
    assert buffer.numel() == packed_size(tensors)
    for before, after in zip(tensors, unpack(buffer, tensors), strict=True):
        assert after.dtype == before.dtype
        assert after.equal(before)
    rows = [torch.randn(5, 2), torch.randn(5, 3, 2, dtype=torch.float64)]
    for before, after in zip(rows, unpack(pack(rows, rows=5), [r[0] for r in rows]), strict=True):
        assert after.equal(before)


def test_sums_by_pairs_keep_their_digits() -> None:
    assert tree_sum(torch.arange(7.0)[:, None]).item() == 21.0
    ones = [
        SketchState(torch.full((1, 1, 1), 2.0**24), torch.zeros(1, 1, 1, 1)),
        *(SketchState(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1)) for _ in range(15)),
    ]
    assert fold(ones).mass.item() >= 2**24 + 14  # added one by one they would stay at 2**24


def test_a_group_of_none_is_one_rank() -> None:
    x = torch.randn(4, 6)
    for layout in ("contiguous", "zigzag"):
        assert shard_sequence(x, None, dim=1, layout=layout) is x
        assert unshard_sequence(x, None, dim=1, layout=layout) is x
    assert shard_positions(5, None, cu_seqlens=torch.tensor([0, 2, 5])).tolist() == [0, 1, 0, 1, 2]
    assert all_reduce_sum(x, None).equal(x)
    check_same_on_all_ranks({"anything": 1}, None)
    carry = SketchState(torch.ones(1, 1, 4), torch.ones(1, 1, 4, 2))
    assert not exclusive_scan(carry, None).mass.any()
    assert not exclusive_sum(carry, None).values.any()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_zigzag_halves_are_views(batch: int, strided: bool) -> None:
    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(8, batch, heads, 4).transpose(0, 1)
        return x if strided else x.contiguous()

    mask, decay = torch.rand(batch, 8) > 0.5, torch.zeros(2).expand(batch, 8, 2)
    p = AttentionInputs(
        draw(4), draw(2), draw(2), torch.randn(2, 1, 2, 4), torch.ones(2), decay, mask, None, None, True, "global"
    )
    partition = ShardPartition.zigzag(p)
    assert partition.mode == ("two_calls" if strided and batch > 1 else "halves_as_rows")
    calls = partition.calls(p, [None, None])
    for call in calls:
        assert call.q.untyped_storage().data_ptr() == p.q.untyped_storage().data_ptr()
        assert call.q.shape[1] == 4
    assert partition.merge([call.q for call in calls]).equal(p.q)
    states = [SketchState(torch.randn(batch, 2, 4), torch.randn(batch, 2, 4, 4)) for _ in range(2)]
    for before, after in zip(states, partition.to_pieces(partition.from_pieces(states)), strict=True):
        assert after.mass.equal(before.mass)
    half = partition.split(p.q)
    second = half[0][1] if partition.mode == "halves_as_rows" else half[1][0]
    assert second.equal(p.q[0, 4:])


def test_a_plain_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"call race_dist\.parallel\.init_distributed"):
        build_mesh(1, 1)
    assert init_distributed(device="cpu") == torch.device("cpu")
    try:
        mesh = build_mesh(1, 1)
        assert mesh.mesh_dim_names == ("dp", "sp")
        assert dist.get_world_size(mesh["sp"].get_group()) == 1
        carry = SketchState(torch.ones(1, 1, 4), torch.ones(1, 1, 4, 2))
        assert not exclusive_scan(carry, mesh["sp"].get_group()).mass.any()
        with pytest.raises(ValueError, match="dp=2 times sp=3 is 6, but there is 1 rank"):
            build_mesh(2, 3)
        with pytest.raises(ValueError, match="sp must be an integer of at least 1; got 0"):
            build_mesh(1, 0)
    finally:
        shutdown()
    shutdown()  # a second call has no effect


def test_errors_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds of at most 1,000,000; got 0"):
        init_distributed(device="cpu", timeout=0)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'; got 'meta'"):
        init_distributed(device="meta")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE in the environment must be an integer; got 'two'"):
        init_distributed(device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK=2 and WORLD_SIZE=2"):
        init_distributed(device="cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        init_distributed(device="cpu")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_ranks_that_do_not_join_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(RankFailure, match=r"rank 0: ranks 1, 2 of 3 did not join the job at 127.0.0.1:\d+ within 1 s") as error:
        init_distributed(device="cpu", timeout=1)
    assert error.value.ranks == (1, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(RankFailure, match=r"rank 1: no job found at MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ within 1 s"):
        init_distributed(device="cpu", timeout=1)
