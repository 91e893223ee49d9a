"""``engine = "megatron"`` trains as the native engine does: the same losses, files and reports, resumed on any mesh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from race_dist.cli import app
from race_dist.training.config import load_config

TINY = """
steps = 6
log_every = 1
name = "native"
runs = "{runs}"
[model]
dim = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_dim = 64
[model.race]
num_tables = 2
num_planes = 3
[data]
path = "{text}"
context = 64
batch_size = 4
[optim]
lr = 1e-2
warmup_steps = 2
clip = 0.5
accumulate = 2
[eval]
tokens = 512
[checkpoint]
minutes = 0
every = 3
[sample]
tokens = 20
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and the run of one process with the native engine."""
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "text.txt").write_text(" ".join(f"{n} squared is {n * n}." for n in range(6000)))
    text = TINY.format(runs=(folder / "runs").as_posix(), text=(folder / "text.txt").as_posix())
    (folder / "tiny.toml").write_text(text)
    result = CliRunner().invoke(app, ["train", str(folder / "tiny.toml")])
    assert result.exit_code == 0, result.output
    return folder


def train(folder: Path, *arguments: str) -> str:
    """Run ``race-dist train`` with the engine, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "race_dist.cli", "train", str(folder / "tiny.toml"), "-o", "engine=megatron", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path, name: str) -> dict[tuple[str, int], dict[str, Any]]:
    lines = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {(line["kind"], line["step"]): line for line in lines if line["kind"] in ("train", "eval")}


def assert_same_run(folder: Path, name: str) -> None:
    expected, got = records(folder, "native"), records(folder, name)
    assert got.keys() == expected.keys()
    for key, line in expected.items():
        assert got[key].keys() == line.keys()
        assert got[key]["loss"] == pytest.approx(line["loss"], abs=3e-5), key  # float32 rounding, which adds up over the steps
        for figure in ("lr", "grad_norm", "tokens"):
            assert got[key].get(figure, 0) == pytest.approx(line.get(figure, 0), rel=3e-4), (key, figure)
    files = {f.name for f in (folder / "runs" / "native").iterdir()}
    assert {f.name for f in (folder / "runs" / name).iterdir()} == files


def test_a_run_is_the_trainers_and_resumes_under_another_layout(folder: Path) -> None:
    said = train(folder, "--nproc", "2", "-o", "name=first", "-o", "parallel.tp=2")
    assert "2 ranks (dp 1 x sp 1 x tp 2) on cpu, megatron-core" in said
    assert "bits per byte over 512 bytes" in said
    assert_same_run(folder, "first")
    run = folder / "runs" / "first"
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["000001-step-00000003", "000002-step-00000006"]
    shutil.rmtree(run / "checkpoints" / saved[1])
    said = train(folder, "--nproc", "2", "--resume", "-o", "name=first", "-o", "parallel.sp=2", "-o", "parallel.layout=zigzag")
    assert "after step 3" in said
    assert "2 ranks (dp 1 x sp 2 x tp 1)" in said
    assert_same_run(folder, "first")
    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", "12", "--tokens", "5"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("12")


def test_bfloat16_learns_as_the_trainer_does(folder: Path) -> None:
    """Megatron's weights are bfloat16 with float32 copies in the optimizer; the native engine's are float32 under autocast."""
    for name in ("native", "megatron"):
        arguments = ["-o", f"name={name}-bfloat16", "-o", f"engine={name}", "-o", "precision=bfloat16", "-o", "optim.lr=2e-3"]
        result = CliRunner().invoke(app, ["train", str(folder / "tiny.toml"), *arguments, "-o", "checkpoint.every=0"])
        assert result.exit_code == 0, result.output
    expected, got = (records(folder, f"{name}-bfloat16") for name in ("native", "megatron"))
    assert expected["train", 6]["loss"] < expected["train", 1]["loss"] - 0.5
    for key, line in expected.items():
        assert got[key]["loss"] == pytest.approx(line["loss"], rel=0.02), key  # bfloat16 has three digits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("precision=float64", "does not go with precision"),
        ("parallel.sharding=fsdp", "parameters are divided by parallel.tp"),
        ("compile=true", "does not go with compile"),
        ("model.layer_pattern=RW", "no sliding-window layers"),
        ("model.race.rope_base=10000.0", "set race.short_conv=0"),
    ],
)
def test_unsupported_settings_of_the_engine_are_refused(folder: Path, change: str, message: str) -> None:
    arguments = ["train", str(folder / "tiny.toml"), "-o", "engine=megatron", "-o", "name=no", "-o", change]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_tp_belongs_to_the_engine(folder: Path) -> None:
    with pytest.raises(ValueError, match=r'only engine = "megatron" divides heads over ranks'):
        load_config(folder / "tiny.toml", ["parallel.tp=2"])
    settings = load_config(folder / "tiny.toml", ["engine=megatron", "parallel.tp=2", "parallel.dp=2"])
    assert settings.parallel.mesh(8) == (2, 2)
    with pytest.raises(ValueError, match=r"parallel.tp = 2 does not divide the 3 ranks"):
        settings.parallel.mesh(3)
