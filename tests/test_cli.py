"""The command: what its help says and how it answers mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import race_dist
from race_dist.cli import app
from race_dist.training.config import load_config

TINY = """
steps = 3
runs = "{runs}"
[model]
dim = 16
num_layers = 1
num_heads = 2
[data]
context = 32
batch_size = 2
[optim]
warmup_steps = 1
[eval]
tokens = 64
[sample]
tokens = 20
"""
VERBS = [
    ["train"],
    ["generate"],
    ["eval"],
    ["export"],
    ["report"],
    ["data"],
    ["data", "pack"],
    ["data", "check"],
    ["bench"],
    ["bench", "attention"],
    ["bench", "decode"],
    ["preflight"],
    ["launch"],
    *(
        ["launch", verb]
        for verb in ("local", "torchrun", "deepspeed", "slurm", "kubernetes", "templates", "status", "logs", "cancel")
    ),
]


def invoke(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and everything printed, at 80 columns."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 500)
    path = tmp_path / "tiny.toml"
    path.write_text(
        TINY.format(runs=(tmp_path / "runs").as_posix()).replace(
            "[data]", f'[data]\npath = "{(tmp_path / "text.txt").as_posix()}"'
        )
    )
    return path


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help_fits_80_columns(verb: list[str]) -> None:
    code, text = invoke(*verb, "--help")
    assert code == 0
    assert "Usage:" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_lists_the_verbs() -> None:
    _, text = invoke("--help")
    for verb in {v[0] for v in VERBS}:
        assert f" {verb} " in text


def test_version() -> None:
    assert invoke("--version") == (0, f"race-dist {race_dist.__version__}\n")


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys, race_dist.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.rate=1", "unknown key optim.rate"),
        ("data.path=/no/such/text", "there is no file or folder"),
        ("data.context=100000", "lower data.context"),
        ("parallel.sp=2", "makes 2 ranks, but 1 was started; start 2"),
        ("model.num_heads=3", "num_heads"),
    ],
)
def test_a_user_error_is_one_sentence_and_exit_code_2(config: Path, change: str, message: str) -> None:
    code, text = invoke("train", config, "--override", change)
    assert code == 2
    assert message in text
    assert text.startswith("race-dist: ")
    assert len(text.strip().splitlines()) == 1


def test_train_then_generate(config: Path, tmp_path: Path) -> None:
    code, text = invoke("train", config, "--override", "name=first")
    assert code == 0, text
    run = tmp_path / "runs" / "first"
    assert {f.name for f in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "curves.png",
        "sample.txt",
        "checkpoints",
        "machine.json",
        "positions-32.json",
        ".run.lock",
    }
    assert "bits per byte over 64 bytes" in text
    code, text = invoke("generate", run, "--prompt", "a line", "--tokens", "30")
    assert code == 0
    assert text.startswith("a line")
    assert invoke("generate", run, "--prompt", "a line", "--tokens", "30") == (code, text)  # the seed is fixed
    (tmp_path / "prompt.txt").write_text("a line")
    assert invoke("generate", run, "--prompt-file", tmp_path / "prompt.txt", "--tokens", "30") == (code, text)


def test_a_run_is_only_overwritten_on_request(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    assert invoke("train", config)[0] == 0  # an empty folder is free
    code, text = invoke("train", config)
    assert code == 2
    assert "holds a run already; choose another name (--override name=...) or give --overwrite" in text
    assert invoke("train", config, "--overwrite")[0] == 0
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "thesis.txt").touch()
    code, text = invoke("train", config, "--override", "name=other", "--overwrite")
    assert code == 2
    assert "is not the folder of a run" in text


def test_generate_reports_what_is_wrong_with_a_run(config: Path, tmp_path: Path) -> None:
    code, text = invoke("generate", tmp_path / "none", "--prompt", "x")
    assert (code, "is not the folder of a run" in text) == (2, True)
    assert invoke("train", config)[0] == 0
    code, text = invoke("generate", tmp_path / "runs" / "run")
    assert (code, "give --prompt, --prompt-file or --context" in text) == (2, True)
    weights = tmp_path / "runs" / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, text = invoke("generate", tmp_path / "runs" / "run", "--prompt", "x")
    assert (code, "is damaged" in text) == (2, True)
    weights.unlink()
    assert invoke("generate", tmp_path / "runs" / "run", "--prompt", "x")[0] == 0  # from the last checkpoint
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    code, text = invoke("generate", tmp_path / "runs" / "run", "--prompt", "x")
    assert (code, "has no model.safetensors and no checkpoint" in text) == (2, True)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "race_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=200,
    )


def test_nproc_starts_ranks_that_share_the_sequence(config: Path, tmp_path: Path) -> None:
    done = command("train", config, "--nproc", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks (dp 1 x sp 2)" in done.stdout
    assert "held out: " in done.stdout
    assert (tmp_path / "runs" / "run" / "model.safetensors").is_file()


def test_an_unusable_text_is_reported_once_for_all_ranks(config: Path) -> None:
    code, text = invoke("train", config, "--nproc", "2", "--override", "data.path=/no/such/text")
    assert (code, text) == (2, "race-dist: data.path: there is no file or folder /no/such/text\n")


def test_a_rank_that_fails_ends_the_others_and_is_named(config: Path) -> None:
    killer = "import os, sys; os.environ['RANK'] == '1' and os._exit(7); import time; time.sleep(100)"
    program = f"from race_dist.launch.local import launch_ranks; raise SystemExit(launch_ranks(['-c', {killer!r}], 2))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7
    assert "rank 1 failed (exit code 7)" in done.stderr


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("optim.learning_rate=1e-3", "optim.lr"),
        ("model.hidden_size=64", "model.dim"),
        ("max_steps=10", "steps"),
        ("data.seq_length=64", "data.context"),
        ("parallel.context_parallel_size=2", "parallel.sp"),
    ],
)
def test_keys_of_other_trainers_are_answered_with_ours(config: Path, change: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown key {change.partition('=')[0]}; did you mean {meant}\?"):
        load_config(config, [change])
