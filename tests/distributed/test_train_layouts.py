"""The same loss curve on every mesh of up to four ranks, with sharding, accumulation and activation checkpointing; and
checkpoints that one arrangement writes and another one reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankError, spawn_ranks
from torch.distributed import ProcessGroup

from race_dist.parallel import build_mesh
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.logging.metrics import read_metrics
from race_dist.training.loop import Hooks, run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Trainer

LAYOUTS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
OPTIONS = [(sharding, parts, again) for sharding in ("none", "fsdp") for parts in (1, 2) for again in (False, True)]
STEPS = 50
Case = tuple[int, int, str, int, bool]  # dp, sp, sharding, parts, activations computed again


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(" ".join(f"{n} squared is {n * n}." for n in range(3000)))
    tree: dict[str, Any] = {
        "runs": str(folder),
        "steps": STEPS,
        "log_every": 1,
        "model": {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "layer_pattern": "RW",
            "window": 8,
            "race": {"num_tables": 2, "num_planes": 2},
        },
        "data": {"path": str(text), "context": 24, "batch_size": 24},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "eval": {"tokens": 480, "every": 1000},
        "checkpoint": {"minutes": 1000},
        "sample": {"tokens": 0},
    }
    return tree | changes


def start(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``fn(group, *args)`` on new ranks that form a job; for one rank, in this process."""
    if world == 1:
        return [fn(None, *args)]
    outcomes = spawn_ranks(world, fn, *args, timeout=120.0)
    if any(o.error for o in outcomes):
        raise RankError([o.error for o in outcomes])
    return [o.value for o in outcomes]


def place(group: ProcessGroup | None, dp: int, sp: int) -> RankMesh:
    if group is None:
        return RankMesh(torch.device("cpu"))
    mesh = build_mesh(dp, sp)
    return RankMesh(torch.device("cpu"), group, mesh["sp"].get_group() if sp > 1 else None)


def curve(group: ProcessGroup | None, dp: int, sp: int, tree: dict[str, Any]) -> list[float]:
    trainer = Trainer(parse_config(tree), place(group, dp, sp))
    return [trainer.train_step().loss for _ in range(STEPS)] + [trainer.evaluate().loss]


def curves(group: ProcessGroup | None, tree: dict[str, Any], cases: list[Case]) -> list[list[float]]:
    return [curve(group, dp, sp, changed(tree, *options)) for dp, sp, *options in cases]


def changed(tree: dict[str, Any], sharding: str, parts: int, again: bool) -> dict[str, Any]:
    return {
        **tree,
        "parallel": {"sharding": sharding},
        "optim": {**tree["optim"], "accumulate": parts},
        "model": {**tree["model"], "activation_checkpointing": again},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    losses = curve(None, 1, 1, settings(folder))
    assert losses[-1] < losses[0] - 1.5
    return losses


# every mesh, and every option on several meshes; all 64 cases are slow
ALL = [(*layout, *options) for layout in LAYOUTS for options in OPTIONS]
SOME = [ALL[8 * n + (5 * n + 3) % 8] for n in range(len(LAYOUTS))]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "chosen", [SOME, pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["some", "all"]
)
def test_the_loss_curve_is_that_of_one_process(folder: Path, alone: list[float], chosen: list[Case], world: int) -> None:
    cases = [case for case in chosen if case[0] * case[1] == world]
    assert cases
    for rank in start(world, curves, settings(folder), cases):
        for case, losses in zip(cases, rank, strict=True):
            assert losses == pytest.approx(alone, abs=1e-5, rel=0), case


def leg(group: ProcessGroup | None, dp: int, sp: int, config: TrainConfig, until: int) -> bool:
    """Resume from the newest checkpoint until step ``until``, save and stop."""
    trainer, directory = Trainer(config, place(group, dp, sp)), RunDirectory(config.directory)
    if trainer.mesh.rank == 0:
        directory.reopen(config)
    asked = lambda: trainer.mesh.rank == trainer.mesh.dp * trainer.mesh.sp - 1 and trainer.step + 1 == until
    return run(trainer, directory, resume=True, hooks=Hooks(stop_requested=asked)).stopped


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_is_read_on_any_mesh(folder: Path, alone: list[float], sharded: bool) -> None:
    tree = settings(folder, name=f"legs-{sharded}")
    directory = RunDirectory(parse_config(tree).directory)
    legs = [((2, 1), "none"), ((1, 2), "none"), ((1, 1), "none"), ((2, 1), "none")]
    if sharded:
        legs = [((2, 2), "fsdp"), ((1, 1), "none"), ((2, 1), "fsdp")]
    for n, ((dp, sp), sharding) in enumerate(legs, 1):
        config = parse_config({**tree, "parallel": {"sharding": sharding}})
        until = STEPS if n == len(legs) else n * STEPS // len(legs)
        stopped = start(dp * sp, leg, dp, sp, config, until)
        assert stopped == [until < STEPS] * (dp * sp)
    losses = [r["loss"] for r in read_metrics(directory.metrics) if r["kind"] == "train"]
    assert losses == pytest.approx(alone[:STEPS], abs=1e-5, rel=0)
    assert {n.shape for n in directory.load_model().parameters()}
