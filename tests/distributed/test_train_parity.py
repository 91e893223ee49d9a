"""A training run does not depend on how its ranks are arranged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankError, run_ranks
from torch.distributed import ProcessGroup

from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.trainer import Trainer

STEPS = 20


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """A tiny model with every kind of layer, with a learning rate at which a wrong gradient shows at once."""
    tree: dict[str, Any] = {
        "steps": STEPS,
        "precision": "float64",
        "model": {
            "dim": 16,
            "num_layers": 3,
            "num_heads": 2,
            "num_kv_heads": 1,
            "layer_pattern": "RWS",
            "window": 8,
            "race": {"num_tables": 2, "num_planes": 3},
        },
        "data": {"path": str(text), "context": 48, "batch_size": 4},
        "optim": {"lr": 1e-2, "warmup_steps": 5, "clip": 0.5},
        "eval": {"tokens": 500},
    }
    return tree | changes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}." for n in range(3000)))
    return path


def place(group: ProcessGroup | None, dp: int, layout: str) -> RankMesh:
    """All ranks of ``group`` as data parallelism (dp) or context parallelism (sp)."""
    return RankMesh(torch.device("cpu"), group, None if dp > 1 else group, layout)


def losses(config: TrainConfig, ranks: RankMesh) -> dict[str, list[float]]:
    trainer = Trainer(config, ranks)
    steps = [trainer.train_step() for _ in range(config.steps)]
    return {
        "loss": [s.loss for s in steps],
        "norm": [s.grad_norm for s in steps],
        "held out": [trainer.evaluate().loss],
        "weights": [float(p.detach().double().norm()) for p in trainer.model.parameters()],
    }


def case(group: ProcessGroup, tree: dict[str, Any], dp: int, layout: str) -> dict[str, list[float]]:
    return losses(parse_config(tree), place(group, dp, layout))


@pytest.fixture(scope="module")
def alone(text: Path) -> dict[str, list[float]]:
    return losses(parse_config(settings(text)), place(None, 1, "contiguous"))


def test_one_process_learns(alone: dict[str, list[float]]) -> None:
    assert alone["loss"][-1] < alone["loss"][0] - 1.5
    assert alone["held out"][0] < alone["loss"][0] - 1.5


@pytest.mark.parametrize(
    ("dp", "sp", "layout"),
    [
        (1, 2, "contiguous"),
        (1, 2, "zigzag"),
        (1, 3, "zigzag"),
        (1, 5, "contiguous"),
        (2, 1, "contiguous"),
        (4, 1, "contiguous"),
    ],
)
def test_every_arrangement_has_the_losses_of_one_process(
    text: Path, alone: dict[str, list[float]], dp: int, sp: int, layout: str
) -> None:
    for rank in run_ranks(dp * sp, case, settings(text), dp, layout):
        for name, values in alone.items():
            assert rank[name] == pytest.approx(values, abs=1e-9, rel=1e-9), name


def test_float32_losses_stay_close(text: Path) -> None:
    tree = settings(text, precision="float32", steps=50, optim={"lr": 3e-3, "warmup_steps": 5})
    expected = losses(parse_config(tree), place(None, 1, "contiguous"))
    exact = losses(parse_config({**tree, "precision": "float64"}), place(None, 1, "contiguous"))
    assert expected["loss"][-1] < expected["loss"][0] - 1.5
    # The float32 error after so many steps depends on the processor; ranks round in yet another order.
    rounding = max(abs(a - b) for a, b in zip(expected["loss"], exact["loss"], strict=True))
    limit = max(1e-5, 2 * rounding)
    assert limit < 1e-3
    for dp in (1, 2):
        for rank in run_ranks(2, case, tree, dp, "contiguous"):
            for name in ("loss", "held out"):
                assert rank[name] == pytest.approx(expected[name], abs=limit, rel=0), name


def differing(group: ProcessGroup, text: Path, seeds: list[int]) -> None:
    Trainer(parse_config(settings(text, seed=seeds[torch.distributed.get_rank(group)])), place(group, 1, "contiguous"))


def test_ranks_with_another_configuration_are_named(text: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(3, differing, text, [4, 4, 5])
    for error in caught.value.errors:
        assert error is not None
        assert "the ranks do not agree on the run" in error
        assert "the configuration is" in error
        assert "the initial weights is" in error
        assert "on rank 2" in error


def uneven(group: ProcessGroup, text: Path) -> None:
    Trainer(parse_config(settings(text)), place(group, 3, "contiguous"))


def test_a_batch_that_does_not_divide_is_refused(text: Path) -> None:
    with pytest.raises(RankError, match=r"data.batch_size is 4, which does not divide over parallel.dp = 3"):
        run_ranks(3, uneven, text)
