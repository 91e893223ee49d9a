"""Streaming over several ranks: super-chunks sharded over the group have the gradients of one rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from race_dist.parallel import build_mesh
from race_dist.streaming import StepCheckpoint, StepInterrupted, streamed_backward, streamed_prompt
from tests.distributed.harness import run_ranks, spawn_ranks
from tests.streaming.test_streamed_gradients import assert_same, gradients, model, text


def step(group: ProcessGroup, pattern: str, length: int, chunk_size: int, bounds: list[int] | None) -> tuple[Any, ...]:
    net, (ids, labels) = model(pattern), text(1, length)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    loss = streamed_backward(net, ids, labels, chunk_size=chunk_size, group=group, cu_seqlens=cu_seqlens)
    return float(loss), gradients(net)


@pytest.mark.parametrize(
    ("world", "pattern", "length", "chunk_size", "bounds"),
    [
        (2, "RW", 41, 8, None),
        (3, "R", 40, 5, None),
        (4, "W", 37, 4, None),
        (3, "RW", 41, 5, [0, 4, 15, 30, 41]),
        (4, "R", 3, 5, None),
    ],
)
def test_equals_one_rank(world: int, pattern: str, length: int, chunk_size: int, bounds: list[int] | None) -> None:
    net, (ids, labels) = model(pattern), text(1, length)
    wanted_loss: Tensor = net(ids, labels, cu_seqlens=None if bounds is None else torch.tensor(bounds))
    wanted_loss.backward()
    for loss, got in run_ranks(world, step, pattern, length, chunk_size, bounds):
        assert abs(loss - float(wanted_loss.detach())) <= 1e-12
        assert_same(got, gradients(net))


def stopped(group: ProcessGroup, folder: str) -> tuple[Any, ...]:
    """One rank stops; then the step resumes. With uneven shards and a document boundary inside."""
    ids, labels = text(1, 41)
    options: dict[str, Any] = {"chunk_size": 5, "group": group, "cu_seqlens": torch.tensor([0, 17, 41])}
    asked = iter(range(100))
    on_one = StepCheckpoint(folder, stop=lambda: next(asked) >= 4 and dist.get_rank(group) == 1)
    said = ""
    try:
        streamed_backward(model("RW"), ids, labels, **options, checkpoint=on_one)
    except StepInterrupted as error:
        said = str(error).split(";")[0]
    net = model("RW")
    loss = streamed_backward(net, ids, labels, **options, checkpoint=StepCheckpoint(folder))
    return said, float(loss), gradients(net)


def test_all_ranks_stop_at_the_same_chunk_and_resume(tmp_path: Path) -> None:
    net, (ids, labels) = model("RW"), text(1, 41)
    expected: Tensor = net(ids, labels, cu_seqlens=torch.tensor([0, 17, 41]))
    expected.backward()
    for said, loss, got in run_ranks(2, stopped, str(tmp_path)):
        assert said == "interrupted after 1 of 5 chunks of the backward phase"
        assert abs(loss - float(expected.detach())) <= 1e-12
        assert_same(got, gradients(net))


def one_rank_lost(group: ProcessGroup, folder: str) -> list[str]:
    """Without the files of rank 1 all ranks begin anew; with other weights on rank 1 all ranks raise."""
    ids, labels = text(1, 41)
    seen: list[str] = []
    for change in ("files", "weights"):
        store = StepCheckpoint(folder, key=change, stop=iter([False, False, True]).__next__)
        net = model()
        try:
            streamed_backward(net, ids, labels, chunk_size=5, group=group, checkpoint=store)
        except StepInterrupted as error:
            seen.append(type(error).__name__)
        net = model()
        if dist.get_rank(group) == 1:
            if change == "files":
                store.clear()
            else:
                with torch.no_grad():
                    net.norm.weight += 1
        try:
            count: list[int] = []
            streamed_backward(
                net,
                ids,
                labels,
                chunk_size=5,
                group=group,
                checkpoint=StepCheckpoint(folder, key=change),
                progress=lambda p: count.append(p.chunk),
            )
            seen.append(f"{len(count)} chunks")
        except ValueError as error:
            seen.append(str(error).split("in progress of ")[1].split(":")[0])
    return seen


def test_ranks_compare_what_is_stored(tmp_path: Path) -> None:
    first, second = run_ranks(2, one_rank_lost, str(tmp_path))
    assert first == ["StepInterrupted", "9 chunks", "StepInterrupted", "something else, as another rank has found"]
    assert second == ["StepInterrupted", "9 chunks", "StepInterrupted", "another set of weights"]


def recovered(group: ProcessGroup) -> dict[str, Tensor]:
    net, (ids, labels) = model("RW", decay="none"), text(1, 41)
    streamed_backward(net, ids, labels, chunk_size=5, group=group, keep="subtract")
    return gradients(net)


def test_subtraction_over_ranks() -> None:
    net, (ids, labels) = model("RW", decay="none"), text(1, 41)
    net(ids, labels).backward()
    for got in run_ranks(2, recovered):
        assert_same(got, gradients(net))


def damaged(group: ProcessGroup, folder: str, how: str) -> tuple[Any, ...]:
    """A step is stopped, the files of one rank are damaged, and it resumes: the repeated chunks, the gradients."""
    ids, labels = text(1, 41)
    options: dict[str, Any] = {"chunk_size": 5, "group": group}
    rank, asked, seen = dist.get_rank(group), iter(range(1, 100)), list[Any]()
    mine = Path(folder) / f"rank-{rank}"
    if how == "an attempt before":  # whole, of the same step, with the same numbers, but stopped elsewhere
        with pytest.raises(StepInterrupted):
            streamed_backward(
                model("RW"), ids, labels, **options, checkpoint=StepCheckpoint(folder, every=0, stop=lambda: next(asked) == 3)
            )
        if rank == 1:
            shutil.copytree(mine, mine.with_name("kept"))
        asked = iter(range(1, 100))
        shutil.rmtree(mine)
        dist.barrier(group)
    store = StepCheckpoint(folder, every=0, stop=lambda: next(asked) == 6)
    with pytest.raises(StepInterrupted):
        streamed_backward(model("RW"), ids, labels, **options, checkpoint=store)
    newest = max((file for file in mine.glob("[0-9]*.safetensors")), key=lambda file: int(file.stem))
    if rank == 1 and how == "a bit":
        data = bytearray(newest.read_bytes())
        data[-9] ^= 4
        newest.write_bytes(data)
    elif rank == 1 and how == "all":
        shutil.rmtree(mine)
    elif rank == 1 and how == "an attempt before":
        shutil.rmtree(mine)
        mine.with_name("kept").rename(mine)
    dist.barrier(group)
    net = model("RW")
    streamed_backward(net, ids, labels, **options, checkpoint=StepCheckpoint(folder), progress=seen.append)
    return len(seen), gradients(net)


@pytest.mark.parametrize(("how", "again"), [("a bit", 9 - 5), ("all", 9), ("an attempt before", 9)])
def test_ranks_go_on_together_from_what_all_have_whole(how: str, again: int, tmp_path: Path) -> None:
    net, (ids, labels) = model("RW"), text(1, 41)
    net(ids, labels).backward()
    for chunks, got in run_ranks(2, damaged, str(tmp_path), how):
        assert chunks == again
        assert_same(got, gradients(net))


def full_on_one(group: ProcessGroup, folder: str) -> tuple[Any, ...]:
    """Rank 1 cannot write after the third chunk; the step is stopped after the sixth chunk and resumes."""
    ids, labels = text(1, 41)
    rank, asked, seen = dist.get_rank(group), iter(range(1, 100)), list[Any]()

    def fill(progress: Any) -> None:
        if rank == 1 and (progress.phase, progress.chunk) == ("forward", 3):
            mock.patch("race_dist.checkpoint_files.save_file", side_effect=OSError(28, "No space left on device")).start()

    said = ""
    try:
        streamed_backward(
            model("RW"),
            ids,
            labels,
            chunk_size=5,
            group=group,
            progress=fill,
            checkpoint=StepCheckpoint(folder, every=0, stop=lambda: next(asked) == 6),
        )
    except StepInterrupted as error:
        said = str(error)
    mock.patch.stopall()
    net = model("RW")
    streamed_backward(net, ids, labels, chunk_size=5, group=group, checkpoint=StepCheckpoint(folder), progress=seen.append)
    return said, len(seen), gradients(net)


def test_a_full_disk_of_one_rank_costs_what_was_done_since(tmp_path: Path) -> None:
    net, (ids, labels) = model("RW"), text(1, 41)
    net(ids, labels).backward()
    for rank, (said, chunks, got) in enumerate(run_ranks(2, full_on_one, str(tmp_path))):
        reason = "No space left on device" if rank else "another rank could not store its part of the step"
        assert reason in said
        assert "the same call resumes from what was stored before" in said
        assert chunks == 9 - 3
        assert_same(got, gradients(net))


def prompt(group: ProcessGroup, length: int) -> Tensor:
    return streamed_prompt(model("RW"), text(1, length)[0], chunk_size=5, group=group)[0]


@pytest.mark.parametrize("length", [31, 40, 2])
def test_a_prompt_over_ranks(length: int) -> None:
    with torch.no_grad():
        expected = model("RW")(text(1, length)[0])[:, -1]
    for got in run_ranks(3, prompt, length):
        assert float((got - expected).norm() / expected.norm()) <= 1e-12


def wrapped(world: ProcessGroup, sp: int) -> list[tuple[str, dict[str, Tensor], int]]:
    """Each row of ``sp`` ranks streams its own text. For each wrapper: the gradients and the number of reductions by FSDP2."""
    mesh = build_mesh(dist.get_world_size() // sp, sp)
    group = mesh["sp"].get_group() if sp > 1 else None
    ids, labels = text(1, 37, seed=dist.get_rank() // sp)
    full = lambda g: g.full_tensor() if isinstance(g, DTensor) else g
    results = []
    for how in ("DDP", "FSDP2", "FSDP2 over replicas"):
        net: Any = model("RW")
        if how == "DDP":
            net = DistributedDataParallel(net)
        else:
            for part in (*net.blocks, net):
                fully_shard(part, mesh=mesh["dp"] if how == "FSDP2 over replicas" else DeviceMesh.from_group(world, "cpu"))
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        with mock.patch.object(dist, name, wraps=getattr(dist, name)) as reduce:
            streamed_backward(net, ids, labels, chunk_size=4, group=group)
        got = {name.removeprefix("module."): full(p.grad).clone() for name, p in net.named_parameters()}
        results.append((how, got, reduce.call_count))
    return results


@pytest.mark.parametrize(("world", "sp"), [(2, 1), (4, 2)])
def test_replicas_are_averaged_once(world: int, sp: int) -> None:
    net, replicas = model("RW"), world // sp
    for seed in range(replicas):
        (net(*text(1, 37, seed=seed)) / replicas).backward()
    for outcome in spawn_ranks(world, wrapped, sp, timeout=30.0):
        assert outcome.error is None, outcome.error
        for how, got, reduced in outcome.value:
            assert_same(got, gradients(net))
            assert reduced == (0 if how == "DDP" else 3)  # two blocks and what stands outside them, in the last chunk alone


def compiled(group: ProcessGroup, pattern: str, race: dict[str, Any], length: int) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the number of graphs; a graph break raises."""
    torch.compiler.reset()
    counters.clear()
    net, (ids, labels) = model(pattern, **race), text(1, length)
    for block in net.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    streamed_backward(net, ids, labels, chunk_size=36, group=group)
    return gradients(net), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("world", "pattern", "race"),
    [
        (2, "R", {}),
        (3, "R", {"decay": "none", "normalization": "global"}),
        (2, "R", {"short_conv": 0, "normalization": "bucket"}),
        (2, "W", {}),
    ],
)
def test_compiled_blocks_stay_one_graph_under_a_group(world: int, pattern: str, race: dict[str, Any]) -> None:
    length = 3 * 36 * world
    net, (ids, labels) = model(pattern, **race), text(1, length)
    net(ids, labels).backward()
    for got, graphs in run_ranks(world, compiled, pattern, race, length):
        assert_same(got, gradients(net))
        assert graphs == 1
