"""Checkpoints: atomic, verified and pruned; a resumed run repeats the uninterrupted one."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.training.checkpoint import MANIFEST, CheckpointError, CheckpointManager
from race_dist.training.checkpoint_state import TensorState
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.logging.metrics import read_metrics
from race_dist.training.loop import Hooks, Outcome, run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Trainer


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(7, 5, generator=generator),
        "model.b": torch.randn(3, generator=generator).double(),
        "optim.a.step": torch.tensor(float(seed)),
        "model.n": torch.tensor([2**53 + seed]),
    }


def saved(folder: Path, steps: list[int], **options: int) -> CheckpointManager:
    store = CheckpointManager(folder, None, **options)
    for step in steps:
        store.save(step, TensorState(tensors(step)), {"position": step, "third": 1 / 3})
    assert store.wait()
    return store


def loaded(folder: Path) -> tuple[int, dict[str, Tensor], list[str]]:
    store = CheckpointManager(folder, None)
    found = store.latest()
    assert found is not None
    blank = {name: torch.zeros_like(t) for name, t in tensors(0).items()}
    store.load(found, TensorState(blank))
    assert found.facts == {"position": found.step, "third": 1 / 3}
    return found.step, blank, store.problems


def test_saved_tensors_are_loaded_bit_by_bit(tmp_path: Path) -> None:
    saved(tmp_path, [10, 20])
    step, found, problems = loaded(tmp_path)
    assert (step, problems) == (20, [])
    for name, tensor in tensors(20).items():
        assert torch.equal(found[name], tensor), name


def test_tensors_may_change_while_they_are_written(tmp_path: Path) -> None:
    store, values = CheckpointManager(tmp_path, None), tensors(5)
    store.save(5, TensorState(values), {"position": 5, "third": 1 / 3})
    for value in values.values():
        value.zero_()
    assert store.wait()
    assert torch.equal(loaded(tmp_path)[1]["model.a"], tensors(5)["model.a"])


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    saved(tmp_path, [10, 20, 30, 40, 50, 60], keep=2, keep_every=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000002-step-00000020",
        "000004-step-00000040",
        "000005-step-00000050",
        "000006-step-00000060",
    ]
    store = saved(tmp_path, [7], keep=1)  # after a roll-back steps are lower and serial numbers still grow
    assert [p.name for p in tmp_path.iterdir()] == ["000007-step-00000007"]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 7


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "which", "says"),
    [
        (cut, "*.safetensors", r"has \d+ bytes, \d+ were written"),
        (flip, "*.safetensors", "does not have the checksum"),
        (Path.unlink, "*.safetensors", "is missing"),
        (cut, MANIFEST, "Expecting|Unterminated"),
        (Path.unlink, MANIFEST, "No such file"),
        (lambda file: file.write_text(file.read_text().replace('"position": 20', '"position": 21')), MANIFEST, "was changed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path: Path, damage: Any, which: str, says: str) -> None:
    saved(tmp_path, [10, 20])
    damage(next((tmp_path / "000002-step-00000020").glob(which)))
    step, found, problems = loaded(tmp_path)
    assert step == 10
    assert torch.equal(found["model.a"], tensors(10)["model.a"])
    assert len(problems) == 1
    assert problems[0].startswith("checkpoint 000002-step-00000020 is damaged (")
    assert re.search(says, problems[0])
    cut(tmp_path / "000001-step-00000010" / MANIFEST)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: checkpoint 000002"):
        CheckpointManager(tmp_path, None).latest()


def test_incomplete_checkpoints_of_a_crash_are_ignored_and_removed(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path, None).latest() is None
    saved(tmp_path, [10])
    (tmp_path / ".partial-ab-2").mkdir()
    (tmp_path / ".partial-ab-2" / "shard.safetensors").write_text("half")
    (tmp_path / ".removed-000000-step-00000001").mkdir()
    store = saved(tmp_path, [20])
    assert {p.name for p in tmp_path.iterdir()} == {"000001-step-00000010", "000002-step-00000020"}
    newest = store.latest()
    assert newest is not None
    assert newest.step == 20


def test_a_failed_write_is_reported_and_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = saved(folder, [10])
    shutil.move(folder, tmp_path / "aside")
    folder.write_text("no folder")
    store.save(20, TensorState(tensors(20)), {})
    assert not store.wait()
    assert store.problems[0].startswith("the checkpoint of step 20 could not be written: ")
    folder.unlink()
    shutil.move(tmp_path / "aside", folder)
    store.save(30, TensorState(tensors(30)), {"position": 30, "third": 1 / 3})
    assert store.wait()
    assert loaded(folder)[0] == 30


def test_a_failed_write_leaves_no_partial_files(tmp_path: Path) -> None:
    """Partial files would occupy space on a full disk."""
    store, limits = saved(tmp_path, [10]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes a file may have
    try:
        store.save(20, TensorState(tensors(20)), {})
        assert not store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in store.problems[0]
    assert {p.name for p in tmp_path.iterdir()} == {"000001-step-00000010"}


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    store = saved(tmp_path, [10])
    newest = store.latest()
    assert newest is not None
    for wrong in ({"model.a": torch.zeros(7, 6)}, {"model.c": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="000001-step-00000010 does not fit this run"):
            store.load(newest, TensorState(wrong))


# --- runs ----------------------------------------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 12,
        "log_every": 1,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW"},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "eval": {"every": 4, "tokens": 100},
        "checkpoint": {"every": 5},
        "sample": {"tokens": 0},
    }
    return parse_config(tree | changes)


def go(config: TrainConfig, *, resume: bool = False, stop_after: int | None = None) -> Outcome:
    trainer = Trainer(config, RankMesh(torch.device("cpu")))
    directory = RunDirectory(config.directory)
    directory.reopen(config) if resume else directory.create(config, overwrite=False)
    hooks = Hooks(stop_requested=lambda: trainer.step + 1 == stop_after)
    return run(trainer, directory, resume=resume, hooks=hooks)


def curve(config: TrainConfig) -> list[tuple[Any, ...]]:
    records = read_metrics(RunDirectory(config.directory).metrics)
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in records if r["kind"] != "event"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    whole = settings(tmp_path, name="whole", precision=precision)
    parts = settings(tmp_path, name="parts", precision=precision)
    go(whole)
    assert go(parts, resume=True, stop_after=3).stopped  # with nothing to resume from it begins
    assert go(parts, resume=True, stop_after=8).stopped
    assert len(curve(parts)) == 8 + 2
    outcome = go(parts, resume=True)
    assert not outcome.stopped
    assert curve(parts) == curve(whole)
    weights = [RunDirectory(c.directory).weights.read_bytes() for c in (whole, parts)]
    assert weights[0] == weights[1]
    assert go(parts, resume=True).evaluation.loss == outcome.evaluation.loss  # at the end it only finishes again
    assert curve(parts)[-1] == curve(whole)[-1]


def test_lines_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    config = settings(tmp_path)
    go(config, stop_after=7)
    path = RunDirectory(config.directory)
    before = curve(config)
    (newest,) = path.checkpoints.glob("*-step-00000007")
    shutil.rmtree(newest)
    with path.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    go(config, resume=True, stop_after=7)
    assert curve(config) == before


def test_a_resume_from_an_earlier_checkpoint_reports_the_damaged_one(tmp_path: Path) -> None:
    config = settings(tmp_path)
    go(config, stop_after=7)
    undisturbed = curve(config)
    path = RunDirectory(config.directory)
    (newest,) = path.checkpoints.glob("*-step-00000007")
    cut(next(newest.glob("*.safetensors")))
    go(config, resume=True, stop_after=7)
    assert curve(config) == undisturbed
    events = [r for r in read_metrics(path.metrics) if r["kind"] == "event" and r["what"] == "checkpoint trouble"]
    assert [r["step"] for r in events] == [5]
    assert "is damaged" in events[0]["text"]


def test_a_resume_refuses_another_model_or_optimizer(tmp_path: Path) -> None:
    config = settings(tmp_path)
    go(config, stop_after=3)
    with pytest.raises(CheckpointError, match=r"written with another seed, optim.lr; put back"):
        go(parse_config({**json.loads(config.to_json()), "seed": 1, "optim": {"warmup_steps": 2, "lr": 2e-2}}), resume=True)
    longer = parse_config({**json.loads(config.to_json()), "steps": 14, "log_every": 2})
    go(longer, resume=True)
    assert curve(longer)[-1][1] == 14
    Path(config.data.path).write_text("another text, as long as you like\n" * 900)
    with pytest.raises(CheckpointError, match=r"is not the one that .* was trained on"):
        go(parse_config({**json.loads(config.to_json()), "steps": 20}), resume=True)


def test_without_checkpoints_a_stop_says_that_nothing_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, checkpoint={"minutes": 0})
    assert go(config, stop_after=3).stopped
    assert "stopped on request, nothing was saved" in capsys.readouterr().out
    assert not list(RunDirectory(config.directory).checkpoints.iterdir())
