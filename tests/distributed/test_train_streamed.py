"""Streamed training equals unstreamed training: losses, weights and evaluations, on every mesh, also when it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from race_dist.parallel import build_mesh
from race_dist.training import loop
from race_dist.training.config import parse_config
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Trainer
from tests.distributed.harness import spawn_ranks

STEPS = 4


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "steps": STEPS,
        "precision": "float64",
        "log_every": 1,
        "runs": str(text.parent / "runs"),
        "model": {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "layer_pattern": "RW",
            "window": 8,
            "ffn_dim": 24,
            "race": {"num_tables": 2, "num_planes": 2},
        },
        "data": {"path": str(text), "context": 50, "batch_size": 4},
        "optim": {"lr": 1e-2, "warmup_steps": 1, "clip": 0.5},
        "eval": {"tokens": 400, "every": 100},
        "sample": {"tokens": 0},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tree[table] = {**tree.get(table, {}), name: value} if name else value
    return tree


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}." for n in range(800)))
    return path


def losses(tree: dict[str, Any], ranks: RankMesh) -> list[float]:
    trainer = Trainer(parse_config(tree), ranks)
    steps = [trainer.train_step() for _ in range(STEPS)]
    return [*(s.loss for s in steps), *(s.grad_norm for s in steps), trainer.evaluate().loss]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__accumulate": 2},
        {"model__race": {"num_tables": 2, "num_planes": 2, "decay": "none"}, "stream__keep": "subtract"},
        {"data__documents": "separate", "data__held_out": "documents"},
    ],
)
def test_streamed_training_equals_unstreamed(text: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    if "data__documents" in changes:  # a folder of files that are shorter than a window
        for n in range(40):
            (tmp_path / f"{n:02}.txt").write_text(text.read_text()[90 * n : 90 * n + 20 + 3 * n])
        changes = {**changes, "data__path": str(tmp_path)}
    alone = RankMesh(torch.device("cpu"))
    whole = {key: value for key, value in changes.items() if not key.startswith("stream")}
    wanted = losses(settings(text, **whole), alone)
    assert losses(settings(text, stream__chunk_size=16, **changes), alone) == pytest.approx(wanted, rel=1e-9)


def layouts(world: ProcessGroup, tree: dict[str, Any]) -> list[list[float]]:
    """dp 2 x sp 2, replicated and sharded."""
    mesh = build_mesh(2, 2)
    ranks = RankMesh(torch.device("cpu"), world, mesh["sp"].get_group(), "contiguous")
    return [losses(tree | {"parallel": {"sharding": sharding}}, ranks) for sharding in ("none", "fsdp")]


def test_every_mesh_equals_one_process(text: Path) -> None:
    wanted = losses(settings(text), RankMesh(torch.device("cpu")))
    for outcome in spawn_ranks(4, layouts, settings(text, stream__chunk_size=7), timeout=60.0):
        assert outcome.error is None, outcome.error
        for got in outcome.value:
            assert got == pytest.approx(wanted, rel=1e-9)


def stopped_run(world: ProcessGroup, tree: dict[str, Any], moment: int) -> list[Any]:
    """A run of dp 2 that one rank stops in the middle of a step, then the resumed run: outcomes and weights."""
    config, ranks = parse_config(tree), RankMesh(torch.device("cpu"), world, None, "contiguous")
    asked, results = iter(range(10_000)), []
    for resume in (False, True):
        stop = loop.never if resume else lambda: dist.get_rank() == 1 and next(asked) == moment
        trainer, directory = Trainer(config, ranks), RunDirectory(config.directory)
        if ranks.rank == 0:
            directory.reopen(config) if resume else directory.create(config, overwrite=False)
        outcome = loop.run(trainer, directory, resume=resume, hooks=loop.Hooks(stop))
        weights = [float(p.detach().norm()) for p in trainer.model.parameters()]
        dist.barrier(world)  # each rank stores, and removes, its own
        results.append(
            (
                outcome.stopped,
                trainer.step,
                outcome.evaluation.loss,
                weights,
                [p.name for p in (config.directory / "step-in-progress").glob("rank-*")],
            )
        )
    return results


def test_a_run_stopped_inside_a_step_resumes_inside_it(text: Path) -> None:
    tree = settings(text, stream__chunk_size=7, data__batch_size=2)
    trainer = Trainer(parse_config(tree), RankMesh(torch.device("cpu")))
    for _ in range(STEPS):
        trainer.train_step()
    wanted = [float(p.detach().norm()) for p in trainer.model.parameters()]
    # a step of 8 chunks calls it once before the step, 7 times forward and 8 times backward: this is inside the second step
    for outcome in spawn_ranks(2, stopped_run, tree, 16 + 1 + 9, timeout=60.0):
        assert outcome.error is None, outcome.error
        (stopped, step, _, _, stored), (again, end, loss, weights, left) = outcome.value
        assert (stopped, step) == (True, 1)
        assert sorted(stored) == ["rank-0", "rank-1"]
        assert (again, end, left) == (False, STEPS, [])
        assert loss == pytest.approx(trainer.evaluate().loss, rel=1e-9)
        assert weights == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__layer_pattern": "RS"}, "does not go with the full-softmax layers"),
        ({"parallel__layout": "zigzag"}, 'leave parallel.layout = "contiguous"'),
        ({"stream__keep": "subtract"}, 'needs model.race.decay = "none", but it is "token"'),
        (
            {"stream__keep": "subtract", "data__documents": "separate", "model__race": {"decay": "none"}},
            'does not go with data.documents = "separate"',
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(text: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_config(settings(text, **{"stream__chunk_size": 16, **changes}))
