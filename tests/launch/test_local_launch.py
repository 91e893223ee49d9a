"""Ranks started on this machine: their ends, signals, and nothing left over; launchers' commands as they would run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from race_dist.cli import app
from race_dist.launch.command import STOP_SIGNALS, deepspeed_command, in_container, torchrun_command
from race_dist.launch.job import load_job
from race_dist.launch.local import launch_ranks, supervise

CONFIG = """
name = "run"
runs = "{folder}/runs"
steps = 4
device = "cpu"
[model]
dim = 16
num_layers = 1
num_heads = 2
[data]
path = "{folder}/text.txt"
context = 32
batch_size = 2
[optim]
warmup_steps = 1
[eval]
tokens = 64
[sample]
tokens = 0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 500)
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


def race_dist(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("pass", 0, ""),
        ("sys.exit(3 if rank == 1 else 0)", 3, "rank 1 failed (exit code 3)"),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", 1, "rank 1 failed (signal 9); the other ranks were ended"),
        ("sys.exit(75)", 75, ""),
    ],
)
def test_the_first_failure_ends_the_others_and_is_named(
    program: str, code: int, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("race_dist.launch.local._GRACE", 0.5)
    assert launch_ranks(["-c", f"import os, sys, time; rank = int(os.environ['RANK']); {program}"], 2) == code
    assert message in capfd.readouterr().err


def test_variables_of_another_launcher_are_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "x",
        "GROUP_RANK": "0",
        "LOCAL_RANK": "7",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    program = (
        f"import json, os; rank = os.environ['RANK']\njson.dump(dict(os.environ), open({str(tmp_path)!r} + '/' + rank, 'w'))"
    )
    assert launch_ranks(["-c", program], 2) == 0
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert not [name for name in found if name.startswith(("TORCHELASTIC", "GROUP_"))]
        assert (found["RANK"], found["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (found["MASTER_ADDR"], "RACE_DIST_STORE_FD" in found) == ("127.0.0.1", rank == 0)
        assert found["MASTER_PORT"] != "1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", ":1"], "HOST:PORT"),
        (["--endpoint", "a b:1"], "HOST:PORT"),
        (["--endpoint", "a:0"], "HOST:PORT"),
        (["--endpoint", "a:99999"], "HOST:PORT"),
        (["--endpoint", "a"], "HOST:PORT"),
        (["--endpoint", ""], "--endpoint"),
        (["--endpoint", "a:1", "--node-rank", "1"], "--node-rank"),
        (["--local-address", "a;b"], "--local-address"),
        (["--job", ""], "--job"),
    ],
)
def test_options_of_torchrun_are_refused_by_name(config: Path, words: list[str], message: str) -> None:
    code, text = race_dist("launch", "torchrun", config, "-s", "device=cpu", "--dry-run", *words)
    assert code == 2, text
    assert message in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    "words",
    [
        ["--folder", ""],
        ["--json", ""],
        ["--device", "tpu"],
        ["--device", ""],
        ["--timeout", "0"],
        ["--timeout", "1e300"],
        ["--timeout", "nan"],
    ],
)
def test_options_of_preflight_are_refused_by_name(words: list[str]) -> None:
    code, text = race_dist("preflight", *words)
    assert code == 2, text
    assert words[0] in text


@pytest.mark.parametrize(
    "words",
    [["--timeout", "2", "--nproc", "2"], ["--nproc=2", "--timeout", "2"], ["--nproc", "2", "--timeout=2", "--device", "cpu"]],
)
def test_ranks_of_preflight_get_all_arguments_except_nproc(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def launch(arguments: list[str], count: int) -> int:
        seen.append([*arguments, str(count)])
        return 0

    monkeypatch.setattr("race_dist.launch.local.launch_ranks", launch)
    assert race_dist("preflight", *words, "--folder", tmp_path)[0] == 0
    assert seen[0][:3] == ["-m", "race_dist.launch.rank", "preflight"]
    assert seen[0][-1] == "2"
    assert "--nproc" not in seen[0]
    assert seen[0][seen[0].index("--folder") + 1] == str(tmp_path)
    assert float(seen[0][seen[0].index("--timeout") + 1]) == 2.0


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({}, 1, "rank 0: rank 1 of 2 did not join the job at 127.0.0.1:"),
        ({"RANK": ""}, 2, "RANK in the environment"),
        ({"MASTER_PORT": ""}, 2, "MASTER_PORT is not set"),
        ({"LOCAL_RANK": "x"}, 2, "LOCAL_RANK in the environment"),
    ],
)
def test_a_rank_that_cannot_join_reports_one_sentence(
    config: Path, changes: dict[str, str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (place | changes).items():
        monkeypatch.setenv(name, value)
    found, text = race_dist("train", config, "-o", "parallel.timeout=1")
    assert found == code, text
    assert message in text
    assert len(text.strip().splitlines()) == 1


def launcher(folder: Path, program: str) -> subprocess.Popen[bytes]:
    """A launcher of two ranks that run a program, once both have begun; each leaves its process id in the folder."""
    script = folder / "rank.py"
    script.write_text(
        f"import os, signal, sys, time\n{program}\n"
        f"open(r'{folder}/' + os.environ['RANK'] + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = f"import sys; from race_dist.launch.local import launch_ranks; sys.exit(launch_ranks([{str(script)!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not all((folder / f"{r}.pid").exists() and (folder / f"{r}.pid").read_text() for r in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def alive(folder: Path) -> list[int]:
    found = []
    for rank in range(2):
        stat = Path("/proc", (folder / f"{rank}.pid").read_text(), "stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(rank)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_are_forwarded_to_the_ranks_and_their_exit_code_is_returned(tmp_path: Path, number: signal.Signals) -> None:
    process = launcher(tmp_path, f"signal.signal({int(number)}, lambda *_: sys.exit(75))")
    process.send_signal(number)
    assert process.wait(20) == 75
    assert alive(tmp_path) == []


def test_ctrl_c_reaches_each_rank_once(tmp_path: Path) -> None:
    """It goes to the whole foreground process group; the ranks are in groups of their own and hear it from the launcher."""
    hear = "def hear(*_):\n    with open(sys.argv[0] + '.' + os.environ['RANK'], 'a') as file:\n        file.write('i')"
    process = launcher(tmp_path, f"{hear}\nsignal.signal(signal.SIGINT, hear)")
    for rank in range(2):
        assert os.getpgid(int((tmp_path / f"{rank}.pid").read_text())) != os.getpgid(process.pid)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 10
    while not all((tmp_path / f"rank.py.{r}").exists() for r in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert [(tmp_path / f"rank.py.{r}").read_text() for r in range(2)] == ["i", "i"]
    process.kill()
    process.wait(10)


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    process = launcher(tmp_path, "")
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []


def test_the_supervisor_does_not_restart_after_success_or_a_user_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(["--version"], 1, restarts=3, environment={}, progress=lambda: 0) == 0
    assert supervise(["no-such-verb"], 1, restarts=3, environment={}, progress=lambda: 0) == 2
    assert "starting it again" not in capfd.readouterr().err


def test_the_supervisor_gives_up_without_progress(capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake counts as a failure once the run has got somewhere; further failures without progress end it."""
    steps = iter([0, 1, 1])
    assert supervise(["no-such-verb"], 1, restarts=1, environment={}, progress=lambda: next(steps)) == 2
    printed = capfd.readouterr().err
    assert printed.count("starting it again (1 of 1)") == 1
    assert "2 failures without a new checkpoint; giving up" in printed


def test_dry_runs_print_the_command_and_do_nothing(config: Path) -> None:
    for verb, expected in (
        ("local", "race_dist.launch.local 2 train"),
        ("torchrun", "torch.distributed.run --nnodes=1"),
        ("deepspeed", "deepspeed.launcher.runner --num_gpus=2"),
    ):
        changes = ("-s", "ranks_per_node=2", "-s", "device=cpu", "-s", "env.A=b c")
        code, text = race_dist("launch", verb, config, *changes, "--dry-run")
        assert code == 0, text
        assert expected in text
        assert "A='b c'" in text
        assert text.rstrip().endswith("--resume")
        assert shlex.split(text)
    code, text = race_dist("launch", "slurm", config, "-s", "device=cpu", "--dry-run")
    assert (code, text.startswith("#!/bin/bash\n")) == (0, True)
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local", "-s", "nodes=2"], "has one machine"),
        (["local", "-s", "ranks_per_node=3", "-o", "parallel.dp=2"], "makes 2 ranks, but 3 were started"),
        (["torchrun", "-s", "nodes=2"], "need a rendezvous"),
        (["deepspeed", "-s", "nodes=2"], "need --hostfile"),
        (["local", "-o", "optim.rate=1"], "unknown key optim.rate"),
        (["slurm", "--array", "seed"], "not of the form key=value"),
        (["kubernetes", "-s", "kubernetes.claims={}"], "gone with the pod"),
        (["status", "nothing", "--runs", "/no/where"], "no job 'nothing' was submitted"),
    ],
)
def test_user_errors_are_one_sentence(config: Path, words: list[str], message: str) -> None:
    first, *rest = words
    code, text = race_dist("launch", first, *([] if first == "status" else [config, "-s", "device=cpu"]), *rest)
    assert code == 2, text
    assert message in re.sub(r"\s+", " ", text)
    assert "Traceback" not in text


def test_torchrun_forwards_all_signals_and_lets_the_run_save() -> None:
    job = load_job(None, ["nodes=4", "min_nodes=3", "ranks_per_node=2", "stop_before=90s", "restarts=7"])
    command = torchrun_command(job, ["train"], endpoint="a:1", run_id="r", node_rank="2")
    assert {
        "--nnodes=3:4",
        "--max-restarts=7",
        "--rdzv-conf=is_host=false",
        f"--signals-to-handle={STOP_SIGNALS}",
        "--shutdown-timeout=90",
    } <= set(command)


def test_containers_wrap_the_command_with_their_mounts() -> None:
    mounts = ["container.image=i", "mounts=['/a:/b:ro']"]
    docker = in_container(load_job(None, [*mounts, "container.runtime=docker"]), ["x"], {"A": "1"}, Path("/w"))
    assert docker[:3] == ["docker", "run", "--rm"]
    assert {"--volume=/a:/b:ro", "--env=A", "--gpus=all", "--workdir=/w"} <= set(docker)
    assert docker[-2:] == ["i", "x"]
    apptainer = in_container(load_job(None, [*mounts, "container.runtime=apptainer"]), ["x"], {}, Path("/w"))
    assert apptainer == ["apptainer", "exec", "--nv", "--pwd", "/w", "--bind", "/a:/b:ro", "i", "x"]
    assert in_container(load_job(None, [*mounts, "container.runtime=pyxis"]), ["x"], {}, Path("/w")) == ["x"]


def test_deepspeed_jobs_use_different_ports() -> None:
    job = load_job(None)
    ports = {next(w for w in deepspeed_command(job, ["train", name]) if "port" in w) for name in "abcd"}
    assert len(ports) == 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeeds_launcher_trains_as_ours_does(config: Path) -> None:
    losses = []
    for verb in ("local", "deepspeed"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "race_dist.cli",
                "launch",
                verb,
                str(config),
                "-s",
                "ranks_per_node=2",
                "-s",
                "device=cpu",
                "-o",
                f"name={verb}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append(re.findall(r'"loss": ([\d.]+)', (config.parent / "runs" / verb / "metrics.jsonl").read_text()))
    assert losses[0] == losses[1] != []
