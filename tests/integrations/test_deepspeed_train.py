"""``race-dist train --engine deepspeed``: the native trainer's losses, bitwise resume, and three launchers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from race_dist.training.config import TrainConfig, load_config, parse_config
from race_dist.training.rank_mesh import RankMesh
from tests.distributed.harness import spawn_ranks
from tests.integrations.once import once

STEPS = 6


def settings(text: str, **changes: Any) -> dict[str, Any]:
    return {
        "steps": STEPS,
        "log_every": 1,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "layer_pattern": "RW", "window": 8},
        "data": {"path": text, "context": 47, "batch_size": 4},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "clip": 0.5},
        "eval": {"tokens": 500},
        "sample": {"tokens": 0},
    } | changes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"{n} squared is {n * n}." for n in range(3000)))
    return str(path)


def go(trainer: Any, steps: int) -> list[tuple[float, float]]:
    results = [trainer.train_step() for _ in range(steps)]
    return [(r.loss, r.grad_norm) for r in results]


def train_all(group: Any, text: str, folder: str) -> dict[str, Any]:
    """Losses on two ranks: native, then each ZeRO stage; a new trainer resumes from a checkpoint after half of the steps."""
    from race_dist.integrations.engines import make_trainer
    from race_dist.training.checkpoint import CheckpointManager

    world = dist.group.WORLD
    sequences, replicas = RankMesh(torch.device("cpu"), world, world), RankMesh(torch.device("cpu"), world, None)

    def trainer(place: RankMesh, **changes: Any) -> Any:
        return make_trainer(parse_config(settings(text, **changes)), place)

    native = trainer(sequences)
    found: dict[str, Any] = {"native": (go(native, STEPS), native.evaluate().loss)}
    for stage in range(4):
        engine = {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        first = trainer(sequences, **engine)
        losses = go(first, 3)
        store = CheckpointManager(Path(folder) / str(stage), world)
        first.save(store)
        assert store.wait(), store.problems
        losses += go(first, STEPS - 3)
        weights = {name: w.clone() for name, w in first.engine.forward_backward.replica.full_tensors()}
        found[f"ZeRO-{stage}"] = (losses, first.evaluate().loss)
        ways = {"again": (sequences, engine), "replicas": (replicas, engine), "native": (sequences, {})}
        for way, (place, options) in ways.items():
            other = trainer(place, **options)
            saved = store.latest()
            assert saved is not None
            other.restore(store, saved)
            assert (other.step, other.position) == (3, 3)
            found[f"ZeRO-{stage} {way}"] = go(other, STEPS - 3)
            if way == "again":
                after = dict(other.engine.forward_backward.replica.full_tensors())
                found[f"ZeRO-{stage} weights"] = all(torch.equal(weights[n], after[n]) for n in weights)
    zigzag = RankMesh(torch.device("cpu"), world, world, "zigzag")
    data = settings(text)["data"] | {"context": 48}
    for name, engine in (("native zigzag", "native"), ("zigzag", "deepspeed")):
        found[name] = go(trainer(zigzag, engine=engine, data=data, parallel={"layout": "zigzag"}), STEPS)
    parts = {"engine": "deepspeed", "optim": settings(text)["optim"] | {"accumulate": 2}}
    found["accumulated"] = go(trainer(replicas, **parts, deepspeed={"zero_optimization": {"stage": 2}}), STEPS)
    narrow = trainer(sequences, **parts | {"precision": "bfloat16", "deepspeed": {"zero_optimization": {"stage": 3}}})
    found["bfloat16"] = go(narrow, STEPS)
    return found


@pytest.fixture(scope="module")
def found(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def launch() -> dict[str, Any]:
        outcomes = spawn_ranks(2, train_all, text, str(tmp_path_factory.mktemp("checkpoints")), timeout=60.0)
        assert not any(o.error for o in outcomes), "\n".join(o.error or "" for o in outcomes)
        return dict(outcomes[0].value)

    return dict(once(tmp_path_factory, "deepspeed-train", launch))


@pytest.mark.parametrize("stage", range(4))
def test_losses_and_norms_are_those_of_the_native_engine(found: dict[str, Any], stage: int) -> None:
    (expected, held_out), (losses, other) = found["native"], found[f"ZeRO-{stage}"]
    assert len(losses) == STEPS
    for (loss, norm), (loss_there, norm_there) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(loss_there, abs=1e-5)
        assert norm == pytest.approx(norm_there, rel=1e-4)
    assert other == pytest.approx(held_out, abs=1e-5)
    assert losses[-1][0] < losses[0][0] - 0.1


@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_goes_on_bitwise(found: dict[str, Any], stage: int) -> None:
    assert [loss for loss, _ in found[f"ZeRO-{stage} again"]] == [loss for loss, _ in found[f"ZeRO-{stage}"][0][3:]]
    assert found[f"ZeRO-{stage} weights"]


@pytest.mark.parametrize("way", ["replicas", "native"])
@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_goes_on_with_another_mesh_or_engine(found: dict[str, Any], stage: int, way: str) -> None:
    expected = [loss for loss, _ in found[f"ZeRO-{stage}"][0][3:]]
    assert [loss for loss, _ in found[f"ZeRO-{stage} {way}"]] == pytest.approx(expected, abs=1e-5)


def test_accumulated_parts_and_narrow_weights_train_alike(found: dict[str, Any]) -> None:
    expected = [loss for loss, _ in found["native"][0]]
    assert [loss for loss, _ in found["accumulated"]] == pytest.approx(expected, abs=1e-5)
    assert [loss for loss, _ in found["bfloat16"]] == pytest.approx(expected, abs=0.1)


def test_zigzag_shards_train_alike(found: dict[str, Any]) -> None:
    expected = [loss for loss, _ in found["native zigzag"]]
    assert [loss for loss, _ in found["zigzag"]] == pytest.approx(expected, abs=1e-5)


def test_conflicting_configurations_are_refused(text: str) -> None:
    from race_dist.integrations.deepspeed.training import deepspeed_config

    alone = RankMesh(torch.device("cpu"))
    for deepspeed, changes, message in (
        ({"train_batch_size": 8}, {}, r"train_batch_size = 8 but the run's configuration makes it 4"),
        ({"optimizer": {"type": "AdamW"}}, {}, "deepspeed.optimizer is not read"),
        ({"race_attention": {"layout": "zigzag"}}, {}, "layout = 'zigzag' but parallel.layout = 'contiguous'"),
        ({}, {"precision": "float64"}, 'precision = "float64" is not known to DeepSpeed'),
        ({"zero_optimization": {"stage": 3}}, {"compile": True}, "traces blocks whose weights ZeRO-3 has taken apart"),
        ({}, {"parallel": {"sharding": "fsdp"}}, "set deepspeed.zero_optimization.stage"),
    ):
        config = parse_config(settings(text, engine="deepspeed", deepspeed=deepspeed, **changes))
        with pytest.raises(ValueError, match=message):
            deepspeed_config(config, alone)
    with pytest.raises(ValueError, match='deepspeed is given but engine is "native"'):
        parse_config(settings(text, deepspeed={"zero_optimization": {}}))
    with pytest.raises(ValueError, match="is the path of no DeepSpeed configuration"):
        parse_config(settings(text, engine="deepspeed", deepspeed="nowhere.json"))


@pytest.mark.parametrize("preset", sorted(Path("configs").glob("deepspeed-*.json")), ids=lambda p: p.stem)
def test_presets_are_read_by_the_trainer_and_by_initialize(preset: Path, text: str) -> None:
    from race_dist.integrations.deepspeed.config import read_config
    from race_dist.integrations.deepspeed.training import deepspeed_config

    config = parse_config(settings(text, engine="deepspeed", deepspeed=str(preset)))
    assert config.deepspeed == json.loads(preset.read_text())
    filled = deepspeed_config(config, RankMesh(torch.device("cpu")))
    assert "auto" not in json.dumps(filled)
    assert read_config(preset).race is not None


def start(command: list[str], folder: Path) -> list[float]:
    """Run a command in ``folder`` and return the losses of its metrics."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (metrics,) = (folder / "runs").glob("*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "train"]


@pytest.mark.timeout(600)  # eight processes import DeepSpeed
def test_three_launchers_start_the_same_training(text: str, tmp_path: Path) -> None:
    tree = settings(text, engine="deepspeed", deepspeed={"zero_optimization": {"stage": 3}}, checkpoint={"minutes": 0})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = ["race_dist.launch.rank", "train", "config.toml"]
    ways = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port), "--module", *rank],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *rank],
        "plain": ["-m", "race_dist.cli", "train", "config.toml"],
    }
    losses = {}
    for name, words in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_text(toml(tree))
        assert isinstance(load_config(folder / "config.toml"), TrainConfig)
        losses[name] = start([sys.executable, *words], folder)
    assert len(losses["plain"]) == STEPS
    assert losses["deepspeed"] == losses["torchrun"]
    assert losses["plain"] == pytest.approx(losses["torchrun"], abs=1e-5)


def toml(tree: dict[str, Any], prefix: str = "") -> str:
    """The TOML text of a configuration, with tables at the end."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    tables = [f"[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}" for key, value in tree.items() if isinstance(value, dict)]
    return "\n".join(plain + tables)
