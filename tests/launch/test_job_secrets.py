"""What reaches a script, a manifest or a dry run: no line break, no secret, nothing that Slurm or Kubernetes would fill in."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from race_dist.launch import kubernetes, slurm, start
from race_dist.launch.command import Run, format_command
from race_dist.launch.environment import is_secret, one_line
from race_dist.launch.job import load_job
from race_dist.launch.job_store import job_folder, remember
from race_dist.launch.sbatch import render

CONFIG = 'name = "run"\nruns = "runs"\ndevice = "cpu"\n[model]\ndim = 16\nnum_layers = 1\nnum_heads = 2\n'
BREAKS = ["\n", "\r", "\x0b", "\x85", "\u2028", "\x1b", "\x00"]
SECRET = "s3cr3t-value"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def expanded(text: str, variables: dict[str, str]) -> str:
    """What a container gets: Kubernetes replaces $(NAME) of known names, and $$ by a dollar."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


@pytest.mark.parametrize("bad", BREAKS)
@pytest.mark.parametrize(
    "key",
    [
        "venv",
        "logs",
        "cache",
        "env.A",
        "slurm.constraint",
        "slurm.directives.comment",
        "container.image",
        "kubernetes.runs",
        "kubernetes.node_selector.zone",
    ],
)
def test_no_field_of_a_job_takes_a_control_character(key: str, bad: str) -> None:
    escaped = "".join(f"\\u{ord(c):04x}" for c in bad)
    with pytest.raises(ValueError, match=r"control characters"):
        load_job(None, [f'{key}="/a{escaped}touch PLANTED"'])


@pytest.mark.parametrize("bad", ["\n", "\r", "\u2029", "\udcff"])
@pytest.mark.parametrize("field", ["config", "name", "folder", "overrides"])
def test_no_part_of_a_run_takes_a_control_character(field: str, bad: str) -> None:
    parts: dict[str, Any] = {"config": Path("/c.toml"), "name": "n", "folder": Path("/runs"), "overrides": ()}
    text = f"a{bad}touch PLANTED"
    parts[field] = (f"x={text}",) if field == "overrides" else text if field == "name" else Path("/", text)
    with pytest.raises(ValueError, match=r"(configuration's path|name|runs|--override).*control characters"):
        Run(**parts)


def test_a_line_break_in_the_configurations_runs_or_the_working_folder_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for override in ("runs='''a\ntouch PLANTED #'''", 'runs="a\\ntouch PLANTED"'):
        with pytest.raises(ValueError, match=r"(runs|--override).*line break"):
            start.load_job_and_run(config, [override], "slurm", ["device=cpu"])
    folder = tmp_path / "a\ntouch PLANTED"
    folder.mkdir()
    monkeypatch.chdir(folder)
    job, run = load_job("slurm", ["device=cpu"]), Run(config, "run", tmp_path)
    for write in (
        lambda: render(job, run, tmp_path),
        lambda: slurm._task(job, run, {}),
        lambda: slurm.submitit_parameters(job, "run", tmp_path),
        lambda: start.torchrun(job, run, endpoint=None, node_rank=None, local_address=None, dry_run=True),
    ):
        with pytest.raises(ValueError, match=r"working folder.*line break"):
            write()


def test_a_percent_sign_in_the_log_folder_is_escaped_for_slurm(config: Path, tmp_path: Path) -> None:
    logs = tmp_path / "ä [v2] it's 100%_%j $HOME"
    job, run = load_job("slurm", ["device=cpu"]), Run(config, "run", tmp_path)
    line = next(x for x in render(job, run, logs).splitlines() if x.startswith("#SBATCH --output"))
    assert line.endswith("/%j.log'")
    assert "100%%_%%j" in line
    assert line.replace("%%", "").count("%") == 1
    with pytest.raises(ValueError, match="backslash"):
        render(job, run, tmp_path / "a\\b")


def test_a_log_is_found_in_a_folder_whose_name_is_a_glob_pattern(tmp_path: Path) -> None:
    runs = tmp_path / "ä [v2] *?"
    folder = job_folder(runs, "run")
    folder.mkdir(parents=True)
    for name in ("77.log", "78.log", "77_0_log.out", "77_0.pkl"):
        (folder / name).write_text("x")
    one = remember(runs, job_id="77", name="run", scheduler="slurm", logs=f"{folder}/77.log")
    many = remember(runs, job_id="78", name="run", scheduler="slurm", logs=f"{folder}/77_*")
    assert [p.name for p in slurm.log_files(one)] == ["77.log"]
    assert [p.name for p in slurm.log_files(many)] == ["77_0_log.out"]
    record = next(folder.glob("job-77.json"))
    assert stat.S_IMODE(record.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True),
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("db_password", True),
        ("APIKEY", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True),
        ("GITHUB_PAT", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("MAX_TOKENS", False),
        ("NCCL_DEBUG", False),
        ("PATH", False),
        ("MASTER_PORT", False),
    ],
)
def test_secrets_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret(name) == secret
    assert is_secret("HTTPS_PROXY", "http://me:word@proxy:80") != is_secret("HTTPS_PROXY", "http://proxy:80")


@pytest.mark.parametrize("verb", ["local", "torchrun", "deepspeed", "slurm", "kubernetes"])
@pytest.mark.parametrize("name", ["WANDB_API_KEY", "DB_PASSWORD", "DATABASE_URL"])
def test_no_dry_run_shows_a_secret(config: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = f"postgres://me:{SECRET}@host/db" if name == "DATABASE_URL" else SECRET
    changes = ["device=cpu", f'env.{name}="{value}"', "env.PLAIN=shown"]
    if verb == "kubernetes":
        changes += ["container.image=x", "kubernetes.claims={d='/runs'}"]
    job, run = start.load_job_and_run(config, (), None, changes)
    if verb == "local":
        start.local(job, run, dry_run=True)
    elif verb == "torchrun":
        start.torchrun(job, run, endpoint=None, node_rank=None, local_address=None, dry_run=True)
    elif verb == "deepspeed":
        start.deepspeed(job, run, hostfile=None, dry_run=True)
    elif verb == "slurm":
        print(*start.submit_slurm(job, run, array=(), plain=True, write=None, dry_run=True))
    else:
        print(*start.submit_kubernetes(job, run, write=None, dry_run=True))
    text = capsys.readouterr().out
    assert SECRET not in text
    assert name in text
    assert "shown" in text


def test_errors_do_not_contain_values_of_secrets() -> None:
    for value in (f'"{SECRET}\\nx"', f'["{SECRET}"]', f'{{a = "{SECRET}"}}'):
        with pytest.raises(ValueError, match="HF_TOKEN") as caught:
            load_job(None, [f"env.HF_TOKEN={value}"])
        assert SECRET not in str(caught.value)


def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that runs the script at once, and an srun that leaves what it gets in a file."""
    folder, seen = tmp_path / "bin", tmp_path / "seen.json"
    folder.mkdir()
    (folder / "sbatch").write_text('#!/bin/sh\nfor last; do :; done\nSLURM_JOB_ID=5 bash "$last" >&2\necho 5\n')
    (folder / "srun").write_text(
        f"#!/usr/bin/env python3\nimport json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open({str(seen)!r}, 'w'))\n"
    )
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return seen


def test_a_slurm_job_gets_its_secrets_from_the_environment_of_sbatch(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fake_slurm(tmp_path, monkeypatch)
    monkeypatch.setenv("MY_TOKEN", "from the shell")
    monkeypatch.setenv("MASTER_PORT", "1")  # of another job
    job, run = start.load_job_and_run(
        config,
        (),
        "slurm",
        ["device=cpu", f"env.WANDB_API_KEY={SECRET}", 'env.HF_TOKEN={from_env="MY_TOKEN"}', 'env.PLAIN="$HOME; touch PLANTED"'],
    )
    slurm.submit_script(job, run)
    words, environment = json.loads(seen.read_text())
    assert (environment["WANDB_API_KEY"], environment["HF_TOKEN"]) == (SECRET, "from the shell")
    assert environment["PLAIN"] == "$HOME; touch PLANTED"
    assert "MASTER_PORT" not in environment
    assert words[-len(run.arguments(job)) :] == run.arguments(job)
    for file in (p for p in (tmp_path / "runs").rglob("*") if p.is_file()):
        assert SECRET not in file.read_text()
        assert not file.stat().st_mode & 0o077, file
    assert not list(tmp_path.rglob("PLANTED"))
    script = next((tmp_path / "runs").rglob("job.sbatch"))
    monkeypatch.delenv("MY_TOKEN")
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, "SLURM_JOB_ID": "6"}, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "is not in the job environment" in done.stderr
    with pytest.raises(ValueError, match=r"env.HF_TOKEN is taken from the environment variable MY_TOKEN, which is not set"):
        job.secrets(os.environ)


def test_a_submitit_task_contains_no_secrets(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, run = start.load_job_and_run(config, (), "slurm", ["device=cpu", f"env.HF_TOKEN={SECRET}"])
    task = slurm._task(job, run, job.environment())
    assert SECRET not in repr(vars(task))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(RuntimeError, match="HF_TOKEN is not in the job's environment"):
        task()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    out = tmp_path / "out"
    task.commands = [["sh", "-c", f"printf %s \"$HF_TOKEN\" > '{out}'"]]
    assert task() == 0
    assert out.read_text() == SECRET


def test_job_files_are_private_to_their_user(config: Path, tmp_path: Path) -> None:
    for verb, mode in ((start.submit_slurm, 0o700), (start.submit_kubernetes, 0o600)):
        file = tmp_path / f"{mode}.job"
        file.write_text("older")
        file.chmod(0o666)
        job, run = start.load_job_and_run(
            config, (), None, ["device=cpu", "container.image=x", "kubernetes.claims={d='/runs'}", "container.runtime=docker"]
        )
        extra: dict[str, Any] = {"array": (), "plain": True} if mode == 0o700 else {}
        verb(job, run, write=file, dry_run=False, **extra)
        assert stat.S_IMODE(file.stat().st_mode) == mode
        link = tmp_path / f"{mode}.link"
        link.symlink_to(file)
        with pytest.raises(OSError, match=r"--write .* is a symbolic link"):
            verb(job, run, write=link, dry_run=False, **extra)


@pytest.mark.parametrize("text", ["cost $(PYTHONUNBUFFERED)", "$$(A)", "$HOME $", "$$$(PATH)$$", "$(unclosed"])
def test_text_is_escaped_for_kubernetes_variable_expansion(config: Path, text: str) -> None:
    job, run = start.load_job_and_run(
        config,
        [f"sample.prompt='{text}'"],
        None,
        [
            "device=cpu",
            "container.image=x",
            "kubernetes.claims={d='/runs'}",
            f"env.A='{text}'",
            f"env.HF_TOKEN={SECRET}",
            'env.OTHER={secret="team", key="k"}',
        ],
    )
    _, jobset = kubernetes.manifest(job, run)
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    known = {"PYTHONUNBUFFERED": "1", "A": "a", "PATH": "/bin", "JOB_COMPLETION_INDEX": "3"}
    words = [expanded(word, known) for word in container["command"]]
    assert f"sample.prompt='{text}'" in words
    assert "--node-rank=3" in words
    env = {e["name"]: e for e in container["env"]}
    assert expanded(env["A"]["value"], known) == text
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "run-env", "key": "HF_TOKEN"}
    assert env["OTHER"]["valueFrom"]["secretKeyRef"] == {"name": "team", "key": "k"}


def test_kubernetes_secrets_are_created_separately_and_not_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = start.load_job_and_run(
        config,
        (),
        None,
        [
            "device=cpu",
            "container.image=x",
            "kubernetes.claims={d='/runs'}",
            f"env.HF_TOKEN={SECRET}",
            'env.OTHER={secret="team", key="k"}',
        ],
    )
    calls: list[tuple[list[str], str]] = []
    monkeypatch.setattr(kubernetes, "kubectl", lambda command, text="": calls.append((list(command), text)))
    kubernetes.submit(job, run)
    (first, secret), (_, manifest) = calls
    assert "--server-side" in first  # a client's apply keeps the values in an annotation
    assert json.loads(secret)["items"][0]["stringData"] == {"HF_TOKEN": SECRET}
    assert SECRET not in manifest
    lines = start.submit_kubernetes(job, run, write=tmp_path / "job.json", dry_run=False)
    assert SECRET not in (tmp_path / "job.json").read_text() + "".join(lines)
    assert any('--from-literal=HF_TOKEN="$HF_TOKEN"' in line for line in lines)


def test_a_venv_path_is_quoted_in_submitits_script() -> None:
    assert slurm._submitit_python(load_job(None, ['venv="/a b;touch PLANTED"'])) == "'/a b;touch PLANTED/bin/python'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cache=''"], "cache must not be empty"),
        (["slurm.constraint=''"], "slurm.constraint must not be empty"),
        (["container.image=' '"], "container.image must not be empty"),
        (["slurm.srun=['']"], "must not be empty"),
        (["kubernetes.claims={a=1}"], "kubernetes.claims.a must be text"),
        (["kubernetes.claims={a='x'}"], "begins with /"),
        (["memory=lots"], "memory must match"),
        (["mounts=['/a:/b,c']", "container.image=x"], "a mount must be"),
        (["nodes=true"], "nodes must be a whole number"),
        (["time=99999999d"], "at most 3650d"),
        (["env=3"], "env must be a table"),
        (["env.A=true"], "env.A must be text"),
        (["env.A={from='B'}"], "did you mean env.A.from_env"),
        (["env.A={}"], "env.A"),
        (["env.RANK=1"], "launchers set it"),
        (["slurm.directives.output=x"], "the job writes --output itself; set logs"),
    ],
)
def test_invalid_values_are_refused_by_name(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_job(None, changes)


@pytest.mark.parametrize(
    ("array", "message"),
    [(["seed=0", "seed=1"], "names seed twice"), (["seed=0,0"], "two runs of the name"), (["seed=0,,1"], "not of the form")],
)
def test_arrays_make_runs_of_different_names(config: Path, array: list[str], message: str) -> None:
    _, run = start.load_job_and_run(config, (), None, ["device=cpu"])
    with pytest.raises(ValueError, match=message):
        start.expand_array(run, array)


@pytest.mark.parametrize(
    ("overrides", "changes", "toml", "here", "device"),
    [
        (["device=cpu"], [], "auto", True, "cpu"),
        ([], [], "auto", True, "cpu"),
        ([], [], "auto", False, "cuda"),
        ([], [], "cpu", False, "cpu"),
        (["device=cpu"], [], "cuda", False, "cpu"),
        ([], ["device=cuda"], "cpu", True, "cuda"),
        (["device=cuda"], [], "cpu", True, "cuda"),
        (["device=cpu"], ["device=cpu"], "auto", True, "cpu"),
    ],
)
def test_the_device_is_the_requested_or_an_available_one(
    config: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], changes: list[str], toml: str, here: bool, device: str
) -> None:
    monkeypatch.setattr(start, "_has_gpu", lambda: False)
    config.write_text(CONFIG.replace('"cpu"', f'"{toml}"'))
    job, run = start.load_job_and_run(config, overrides, None, changes, on_this_machine=here)
    assert job.device == device
    assert [w for w in run.arguments(job) if w.startswith("device=")][-1] == f"device={device}"


@pytest.mark.parametrize(
    ("changes", "toml", "said"),
    [
        (["ranks_per_node=8"], "auto", "this machine has no GPU: the job's 8 ranks run on 2 CPU cores; --set ranks_per_node=N"),
        (["ranks_per_node=2"], "auto", "this machine has no GPU: the job's 2 ranks"),
        (["ranks_per_node=8", "device=cpu"], "auto", "race-dist: the job's 8 ranks run on 2 CPU cores"),
        (["ranks_per_node=2", "device=cpu"], "auto", ""),
        ([], "auto", ""),
        (["ranks_per_node=2"], "cpu", ""),
    ],
)
def test_ranks_that_run_on_the_cpu_instead_of_gpus_are_reported(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    toml: str,
    said: str,
) -> None:
    monkeypatch.setattr(start, "_has_gpu", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    config.write_text(CONFIG.replace('"cpu"', f'"{toml}"'))
    start.load_job_and_run(config, (), None, changes, on_this_machine=True)
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)


def test_more_ranks_than_gpus_are_refused_before_any_starts(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    job, run = start.load_job_and_run(config, (), "single-node", ["device=cuda"], on_this_machine=True)
    with pytest.raises(ValueError, match=r"ranks_per_node is 8, but this machine has 4 GPUs: give --set ranks_per_node=4"):
        start.local(job, run, dry_run=False)


def test_devices_that_contradict_each_other_are_refused(config: Path) -> None:
    with pytest.raises(ValueError, match="--set device=cpu"):
        start.load_job_and_run(config, ["device=cpu"], None, ["device=cuda"])


def test_one_line_accepts_only_single_lines() -> None:
    assert one_line("ä b\u00a0c 'd' $e") == "ä b\u00a0c 'd' $e"
    references = load_job(None, ['env.A={from_env="B"}']).references()
    assert format_command(["x"], {"C": "d e"}, references) == "C='d e' A=\"$B\" x"


@pytest.mark.parametrize(
    "change",
    [
        f'slurm.srun=["--export=ALL,HF_TOKEN={SECRET}"]',
        f'slurm.srun=["--verbose", "--export=HF_TOKEN={SECRET},A=b"]',
        f'slurm.directives.export="HF_TOKEN={SECRET}"',
        f'slurm.directives.export="ALL,A=b,WANDB_API_KEY={SECRET}"',
        f'container.image="docker://me:{SECRET}@registry.example/image"',
        f'slurm.directives.comment="https://me:{SECRET}@host"',
    ],
)
def test_options_written_to_a_file_may_not_contain_a_secret(change: str) -> None:
    with pytest.raises(ValueError, match=r"would stand in the job's file") as refused:
        load_job(None, [change])
    assert SECRET not in str(refused.value)


def test_options_without_a_secret_are_accepted() -> None:
    job = load_job(
        None,
        [
            'slurm.srun=["--export=ALL,A=b", "--mpi=pmix"]',
            'slurm.directives.export="ALL,HF_TOKEN"',
            'container.image="docker://registry.example:5000/me/image@sha256:00"',
        ],
    )
    assert job.slurm.srun == ("--export=ALL,A=b", "--mpi=pmix")
