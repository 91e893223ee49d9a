"""Fault tolerance: a run whose process is killed at any time resumes as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.logging.metrics import read_metrics
from race_dist.training.run_directory import RunDirectory

STEPS = 24


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": STEPS,
        "log_every": 1,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW"},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "eval": {"every": 7, "tokens": 100},
        "checkpoint": {"every": 1},
        "sample": {"tokens": 0},
    }
    return tree | changes


def train(tree: dict[str, Any], die_at: int | None = None) -> None:
    """Start or resume a run in a separate process, and SIGKILL it at the n-th file operation of a checkpoint."""
    import torch

    from race_dist import checkpoint_files
    from race_dist.training import checkpoint
    from race_dist.training.loop import run
    from race_dist.training.rank_mesh import RankMesh
    from race_dist.training.trainer import Trainer

    torch.set_num_threads(1)
    left = [die_at]

    def deadly(fn: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return call

    if die_at is not None:
        for owner, name in (
            (os, "fsync"),
            (Path, "rename"),
            (Path, "replace"),
            (shutil, "rmtree"),
            (checkpoint, "file_digest"),
            (checkpoint_files, "write_checksummed_json"),
        ):
            setattr(owner, name, deadly(getattr(owner, name)))
    config = parse_config(tree)
    directory = RunDirectory(config.directory)
    trainer = Trainer(config, RankMesh(torch.device("cpu")))
    directory.reopen(config)
    run(trainer, directory, resume=True)


def begin(tree: dict[str, Any], die_at: int | None = None) -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "race_dist.training.loop", "race_dist.training.trainer"])
    process = context.Process(target=train, args=(tree, die_at), daemon=True)
    process.start()
    return process


def finish(tree: dict[str, Any]) -> None:
    process = begin(tree)
    process.join(60)
    assert process.exitcode == 0


def curve(config: TrainConfig) -> list[tuple[Any, ...]]:
    records = read_metrics(RunDirectory(config.directory).metrics)
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in records if r["kind"] != "event"]


def same(tree: dict[str, Any], undisturbed: dict[str, Any]) -> bool:
    one, other = parse_config(tree), parse_config(undisturbed)
    return (
        curve(one) == curve(other)
        and RunDirectory(one.directory).weights.read_bytes() == RunDirectory(other.directory).weights.read_bytes()
    )


def test_killed_at_every_file_operation_of_a_checkpoint(tmp_path: Path) -> None:
    undisturbed = settings(tmp_path, name="undisturbed", checkpoint={"every": 5})
    finish(undisturbed)
    tree = settings(tmp_path, name="killed", checkpoint={"every": 2, "keep": 1})
    deaths = 0
    for die_at in range(5, 13):  # one checkpoint makes about seven: each place of the second one or of the next
        process = begin(tree, die_at)
        process.join(60)
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths >= 6
    finish(tree)
    assert same(tree, undisturbed)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    undisturbed = settings(tmp_path, name="undisturbed")
    finish(undisturbed)
    choose, deaths = random.Random(0), 0
    for trial in range(3):
        tree = settings(tmp_path, name=f"killed-{trial}")
        metrics = RunDirectory(parse_config(tree).directory).metrics
        for first, last in ((1, 12), (13, STEPS)):
            step = choose.randint(first, last)
            process = begin(tree)
            while process.is_alive() and not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
                time.sleep(0.002)
            process.join(choose.uniform(0, 0.05))
            process.kill()
            process.join(60)
            deaths += process.exitcode == -signal.SIGKILL
        finish(tree)
        assert same(tree, undisturbed), trial
    assert deaths >= 4


def command(config: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "race_dist.cli", "train", str(config), "--resume", "--nproc", "2", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(c) for c in children if b"race_dist" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_under_the_command_killed_twenty_times(tmp_path: Path) -> None:
    """Kills one rank, or both and the launcher, at a random moment of a run that writes a checkpoint every step."""
    (tmp_path / "text.txt").write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)))
    config = tmp_path / "killed.toml"
    config.write_text(f'''
name = "undisturbed"
runs = "{tmp_path / "runs"}"
steps = {STEPS}
log_every = 1
model = {{ dim = 48, num_layers = 4, num_heads = 2, layer_pattern = "RW" }}
data = {{ path = "{tmp_path / "text.txt"}", context = 64, batch_size = 2 }}
optim = {{ warmup_steps = 2, lr = 1e-2 }}
eval = {{ every = 7, tokens = 128 }}
checkpoint = {{ every = 1 }}
sample = {{ tokens = 0 }}
''')
    assert command(config).wait(400) == 0
    undisturbed = RunDirectory(tmp_path / "runs" / "undisturbed").load_config()
    choose, equal, midway = random.Random(), [], 0
    for trial in range(20):
        name = f"killed-{trial}"
        metrics = tmp_path / "runs" / name / "metrics.jsonl"
        process = command(config, "--override", f"name={name}")
        deadline = time.monotonic() + 60
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 3))
        victims = ranks_of(process.pid) if process.poll() is None else []
        for victim in [*victims, process.pid] if trial % 2 else victims[trial // 2 % 2 :][:1]:
            os.kill(victim, signal.SIGKILL)
        midway += process.wait(400) != 0
        assert command(config, "--override", f"name={name}").wait(400) == 0
        resumed = RunDirectory(tmp_path / "runs" / name).load_config()
        equal.append(same(json.loads(resumed.to_json()), json.loads(undisturbed.to_json())))
        print(f"trial {trial}: {'equal' if equal[-1] else 'NOT equal'}", flush=True)
    print(f"{sum(equal)} of {len(equal)} equal bit by bit; {midway} were killed before they had ended")
    assert all(equal)
    assert midway >= 15
