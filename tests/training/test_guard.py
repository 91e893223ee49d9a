"""Bad steps: skipped, rolled back, and reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.training.config import GuardConfig, TrainConfig, parse_config
from race_dist.training.guard import Guard
from race_dist.training.logging.metrics import read_metrics
from race_dist.training.loop import run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Trainer


def test_spikes_are_judged_by_the_median_of_good_steps() -> None:
    guard = Guard(GuardConfig(loss_spike=2.0, norm_spike=20.0, norm_alarm=4.0))
    assert guard.judge(1e9, 1e9).bad is None  # there is nothing to compare with yet
    for _ in range(11):
        assert guard.judge(3.0, 1.0) == guard.judge(2.0, 1.0)
    assert guard.judge(5.9, 1.0).bad is None
    assert guard.judge(6.2, 1.0).bad == "the loss is 6.2, more than 2 times the median of the last 24 steps, 3"
    assert guard.judge(2.0, 21.0).bad == "the gradient's norm is 21, more than 20 times the median of the last 24 steps, 1"
    assert guard.bad_in_a_row == 2
    alarmed = guard.judge(2.0, 5.0)
    assert alarmed.bad is None
    assert alarmed.alarm == "the gradient's norm is 5; the median of the last 24 steps is 1"
    assert guard.bad_in_a_row == 0


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_nan_and_inf_are_bad_from_the_first_step(loss: float, norm: float) -> None:
    guard = Guard(GuardConfig(loss_spike=0, skips=1))
    assert str(guard.judge(loss, norm).bad).startswith(f"the loss is {loss:g} and the gradient's norm {norm:g}")
    assert not guard.exhausted
    guard.judge(loss, norm)
    assert guard.exhausted


def test_a_guard_continues_from_its_state() -> None:
    first = Guard(GuardConfig(window=12))
    for n in range(30):
        first.judge(3.0 + n % 7 / 3, 1.0 + n % 5 / 7)
    first.judge(math.nan, 1.0)
    second = Guard.of(GuardConfig(window=12), first.state())
    assert second == first
    assert len(second.losses) == 12


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 16,
        "log_every": 1,
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "eval": {"every": 100, "tokens": 100},
        "sample": {"tokens": 0},
        "checkpoint": {"every": 4},
        "guard": {"skips": 1, "rollbacks": 1},
    }
    return parse_config(tree | changes)


class Sabotage:
    """A ForwardBackward that puts NaN into the gradients of batches at some positions."""

    def __init__(self, trainer: Trainer, positions: set[int]) -> None:
        self.trainer, self.inner, self.positions = trainer, trainer.engine.forward_backward, positions
        self.replica, self.drawn = trainer.engine.forward_backward.replica, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def gradients(self, batch: Any) -> Tensor:
        loss = self.inner.gradients(batch)
        self.drawn.append(self.trainer.position)
        if self.trainer.position in self.positions:
            next(p for p in self.trainer.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        return loss


def sabotaged(config: TrainConfig, positions: set[int]) -> tuple[Trainer, Sabotage]:
    trainer, directory = Trainer(config, RankMesh(torch.device("cpu"))), RunDirectory(config.directory)
    directory.create(config, overwrite=True)
    trainer.engine.forward_backward = method = Sabotage(trainer, positions)  # type: ignore[assignment]
    return trainer, method


def events(config: TrainConfig) -> list[tuple[int, str]]:
    return [
        (r["step"], r["what"])
        for r in read_metrics(RunDirectory(config.directory).metrics)
        if r["kind"] == "event" and r["what"] != "checkpoint"
    ]


def test_a_bad_step_is_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    trainer, _ = sabotaged(config, {5})
    before = [p.detach().clone() for p in trainer.model.parameters()]
    for position in range(6):
        if position == 5:
            before = [p.detach().clone() for p in trainer.model.parameters()]
        result = trainer.train_step()
    assert "the gradient's norm nan" in str(result.verdict.bad)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer, _ = sabotaged(config, {5})
    run(trainer, RunDirectory(config.directory))
    assert events(config) == [(6, "skipped")]
    assert "step 6: skipped: the loss is " in capsys.readouterr().out
    lines = RunDirectory(config.directory).metrics.read_text()
    assert '"grad_norm": null' in lines
    assert "NaN" not in lines
    assert trainer.step == trainer.position == 16


def test_several_bad_steps_roll_back_and_other_data_follows(tmp_path: Path) -> None:
    config = settings(tmp_path)
    trainer, method = sabotaged(config, {9, 10})
    run(trainer, RunDirectory(config.directory))
    assert events(config) == [(10, "skipped"), (11, "skipped"), (8, "rolled back")]
    assert method.drawn == list(range(19))  # steps 9 to 16 are made of other batches than before
    assert (trainer.step, trainer.position, trainer.guard.rollbacks) == (16, 19, 1)


def test_persistent_bad_steps_end_the_run(tmp_path: Path) -> None:
    config = settings(tmp_path)
    trainer, _ = sabotaged(config, set(range(9, 99)))
    with pytest.raises(FloatingPointError, match=r"step 10: the loss is .*, and 1 steps before it were skipped; try a lower"):
        run(trainer, RunDirectory(config.directory))
    assert events(config)[-1] == (10, "skipped")
    for changes in ({"checkpoint": {"minutes": 0}}, {"checkpoint": {"every": 15}}):
        trainer, _ = sabotaged(settings(tmp_path, **changes), {2, 3})
        with pytest.raises(FloatingPointError, match="step 4: the loss is"):
            run(trainer, RunDirectory(config.directory))


def test_a_checkpoint_that_no_good_step_followed_is_not_used_twice(tmp_path: Path) -> None:
    """Its weights may be the cause: an update that ruins the weights shows in the next step."""
    config = settings(tmp_path, guard={"skips": 1, "rollbacks": 2})
    trainer, _ = sabotaged(config, {8, 9, 10, 11})
    run(trainer, RunDirectory(config.directory))
    assert events(config) == [
        (9, "skipped"),
        (10, "skipped"),
        (8, "rolled back"),
        (9, "skipped"),
        (10, "skipped"),
        (4, "rolled back"),
    ]
    assert trainer.step == 16


def test_a_checkpoint_is_deferred_to_a_good_step(tmp_path: Path) -> None:
    config = settings(tmp_path)
    trainer, _ = sabotaged(config, {3, 11})
    run(trainer, RunDirectory(config.directory))
    records = read_metrics(RunDirectory(config.directory).metrics)
    assert [r["step"] for r in records if r.get("what") == "checkpoint"] == [5, 8, 13, 16]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    config = settings(tmp_path)
    trainer, _ = sabotaged(config, set())
    update = trainer.engine.update

    def ruin(learning_rate: float, norm: Tensor | None) -> Tensor:
        norm = update(learning_rate, norm)
        if trainer.step == 15:  # the last step's: no step after it would show it
            with torch.no_grad():
                trainer.model.norm.weight[0] = math.inf
        return norm

    trainer.engine.update = ruin  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the weights are not finite after step 16; go on from a checkpoint"):
        run(trainer, RunDirectory(config.directory))
    directory = RunDirectory(config.directory)
    assert sorted(p.name for p in directory.checkpoints.iterdir())[-1].endswith("step-00000012")
    assert not directory.weights.exists()
    assert (16, "no checkpoint") in events(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stream": {"chunk_size": 8}},
        {"precision": "bfloat16"},
        {"model": {"dim": 16, "num_layers": 3, "num_heads": 2, "layer_pattern": "RWS", "race": {"decay": "token"}}},
    ],
)
def test_a_run_that_diverges_on_the_cpu_is_stopped_by_the_guard(changes: dict[str, Any], tmp_path: Path) -> None:
    """Weights that become Inf give a NaN loss, and not an error about an argument of the attention."""
    config = settings(tmp_path, optim={"warmup_steps": 1, "lr": 1e30, "clip": 0}, checkpoint={"every": 1}, **changes)
    with pytest.raises(FloatingPointError, match=r"the loss is .* and the gradient's norm .*; try a lower optim\.lr"):
        run(sabotaged(config, set())[0], RunDirectory(config.directory))
    assert "skipped" in [what for _, what in events(config)]
