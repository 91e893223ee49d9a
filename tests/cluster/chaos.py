"""Fault injection into a training run: ``python tests/cluster/chaos.py --faults 50``.
``--show FILE`` prints the table of a stored ``--json`` report.

Faults are injected at random times into a run of several ranks under ``race-dist launch local``. Its losses must be bitwise
equal to those of an undisturbed run, it must not repeat steps before the newest checkpoint, and leave no process and no partial
file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from training_job import RACE_DIST, TrainingJob, wait_for

from race_dist.machine import machine_info

RANKS = 2
TIMEOUT = 10.0  # seconds a collective waits
DISK = 24  # MiB of the checkpoints' own small disk


@dataclass
class Outcome:
    """The effect of one fault.

    Attributes:
        fault: its name.
        step: step of the run at the fault.
        saved: step of the newest checkpoint at the fault.
        resumed: step from which the run resumed; equal to ``step`` if it was not interrupted.
        seconds: until the run was beyond ``step``.
    """

    fault: str
    step: int
    saved: int
    resumed: int
    seconds: float


class Chaos:
    """One disturbed run."""

    def __init__(self, folder: Path, seed: int, steps: int, *, every: int = 10) -> None:
        self.random = random.Random(seed)
        self.job = TrainingJob(folder, "disturbed", steps=steps, every=every, timeout=TIMEOUT)
        self.log = folder / "disturbed.log"
        self.job.checkpoints.mkdir(parents=True)
        (self.job.run / "config.json").write_text("{}")  # marks the folder of a run
        self.disk = (
            os.geteuid() == 0
            and subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(self.job.checkpoints)], check=False
            ).returncode
            == 0
        )
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.outcomes: list[Outcome] = []
        self.log_offset = 0

    def close(self) -> None:
        for pid in [*([self.supervisor.pid] if self.supervisor else []), *self.job.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.disk:
            subprocess.run(["umount", "-l", str(self.job.checkpoints)], check=False)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                [
                    *RACE_DIST,
                    "launch",
                    "local",
                    str(self.job.config),
                    "--set",
                    f"ranks_per_node={RANKS}",
                    "--set",
                    "device=cpu",
                    "--set",
                    "restarts=5",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def text(self) -> str:
        """What the run has printed since the last fault."""
        return self.log.read_bytes()[self.log_offset :].decode(errors="replace") if self.log.exists() else ""

    def ranks(self) -> list[int]:
        """The process ids of all ranks, once they run."""
        return wait_for(lambda: len(r := self.job.ranks()) == RANKS and r, "all ranks run")

    def launcher(self) -> int:
        return next(pid for pid, words in self.job.processes().items() if "race_dist.launch.local" in words)

    def victim(self) -> int:
        return self.random.choice(self.ranks())

    def inject(self, name: str, at: int) -> None:
        """Wait until the run reaches step ``at``, inject a fault, and wait until the run is beyond that step."""
        wait_for(lambda: self.job.step() >= at and len(self.job.ranks()) == RANKS, f"step {at}: {self.text()[-2000:]}")
        time.sleep(self.random.random() * 0.3)
        self.log_offset = self.log.stat().st_size
        started, step, saved = time.monotonic(), self.job.step(), self.job.saved_step()
        interrupts = FAULTS[name](self)
        if interrupts:
            match = wait_for(
                lambda: re.search(r"resuming \S+ after step ([\d,]+)|has no checkpoint yet", self.text()),
                f"{name} at step {step}: the run goes on\n{self.text()[-2000:]}",
            )
            resumed = int((match[1] or "0").replace(",", ""))
        else:
            resumed = step
        if resumed < self.job.steps:
            wait_for(lambda: self.job.step() > step or self.supervisor.poll() is not None, f"{name}: further than step {step}")
        self.outcomes.append(Outcome(name, step, saved, resumed, round(time.monotonic() - started, 2)))

    def finish(self) -> int:
        """Wait for the end of the run and return its exit code."""
        assert self.supervisor is not None
        return self.supervisor.wait(180)


def kill_rank(chaos: Chaos) -> bool:
    os.kill(chaos.victim(), signal.SIGKILL)
    return True


def kill_rank_while_saving(chaos: Chaos) -> bool:
    victim = chaos.victim()
    wait_for(lambda: any(n.startswith(".partial") for n in os.listdir(chaos.job.checkpoints)), "a checkpoint is being written")
    os.kill(victim, signal.SIGKILL)
    return True


def kill_launcher(chaos: Chaos) -> bool:
    os.kill(chaos.launcher(), signal.SIGKILL)
    return True


def kill_everything(chaos: Chaos) -> bool:
    """Kill the supervisor: none of its processes may be left; the machine's own supervisor restarts it."""
    assert chaos.supervisor is not None
    chaos.supervisor.kill()
    chaos.supervisor.wait()
    wait_for(lambda: not chaos.job.processes(), "the ranks ended with their supervisor", 20)
    chaos.start()
    return True


def terminate_rank(chaos: Chaos) -> bool:
    os.kill(chaos.victim(), signal.SIGTERM)
    return True


def terminate_run(chaos: Chaos) -> bool:
    """Stop the run as a preempting scheduler does: it saves and exits with 75, and is started again later."""
    assert chaos.supervisor is not None
    chaos.supervisor.terminate()
    code = chaos.supervisor.wait(60)
    assert code == 75, f"after a stop signal the run ended with {code}\n{chaos.text()[-2000:]}"
    chaos.start()
    return True


def full_disk(chaos: Chaos) -> bool:
    """Fill the disk: the run continues, reports it, and saves again once there is space."""
    filler = chaos.job.checkpoints / "filler"

    def noticed() -> Any:
        with contextlib.suppress(OSError), filler.open("ab") as out:  # repeated, because pruned checkpoints free space
            while True:
                out.write(b"x" * 2**14)
        return re.search(r"could not be written: .*No space left", chaos.text())

    wait_for(noticed, "the full disk is noticed")
    before = chaos.job.saved()
    filler.unlink()
    wait_for(lambda: chaos.job.saved()[-1:] > before[-1:], "a checkpoint after the disk has room")
    return False


def truncated_checkpoint(chaos: Chaos) -> bool:
    """Truncate the newest checkpoint and kill the ranks: the run reports it and resumes from the checkpoint before."""
    newest = wait_for(lambda: len(s := chaos.job.saved()) > 1 and chaos.job.checkpoints / s[-1], "two checkpoints")
    os.kill(chaos.victim(), signal.SIGSTOP)  # so that no newer checkpoint appears
    newest = chaos.job.checkpoints / chaos.job.saved()[-1]
    file = chaos.random.choice(sorted(p for p in newest.iterdir() if p.is_file()))
    os.truncate(file, chaos.random.randrange(file.stat().st_size))
    for pid in chaos.job.ranks():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: re.search(rf"checkpoint {newest.name} is damaged", chaos.text()), "the damage is reported")
    return True


def slow_rank(chaos: Chaos) -> bool:
    """Pause a rank for less than the timeout: nothing happens."""
    victim = chaos.victim()
    os.kill(victim, signal.SIGSTOP)
    time.sleep(TIMEOUT / 3)
    os.kill(victim, signal.SIGCONT)
    return False


def hung_rank(chaos: Chaos) -> bool:
    """Pause a rank for ever: the others name it within the timeout and the run restarts."""
    ranks = chaos.ranks()
    victim = chaos.random.randrange(RANKS)
    os.kill(ranks[victim], signal.SIGSTOP)
    wait_for(lambda: re.search(rf"rank {victim} (died|did not come)", chaos.text()), f"rank {victim} is named", 30 + TIMEOUT)
    return True


def another_configuration(chaos: Chaos) -> bool:
    """Start ranks with different configurations: all refuse before anything is trained or written."""
    terminate = terminate_run(chaos)
    assert chaos.supervisor is not None
    chaos.supervisor.terminate()
    chaos.supervisor.wait(60)
    before = sorted(chaos.job.saved())
    chaos.log_offset = chaos.log.stat().st_size
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(
            subprocess.Popen(
                [
                    *RACE_DIST,
                    "train",
                    str(chaos.job.config),
                    "--resume",
                    "-o",
                    f"optim.lr={1 + rank}e-2",
                    "-o",
                    "parallel.timeout=60",
                ],
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for rank in ranks:
        printed = rank.communicate(timeout=90)[0].decode()
        assert rank.returncode == 2, printed
        assert "do not agree on" in printed, printed
        assert "the configuration" in printed, printed
    assert sorted(chaos.job.saved()) == before
    chaos.start()
    return terminate


FAULTS = {
    f.__name__.replace("_", " "): f
    for f in (
        kill_rank,
        kill_launcher,
        terminate_run,
        full_disk,
        truncated_checkpoint,
        hung_rank,
        kill_rank_while_saving,
        kill_everything,
        terminate_rank,
        slow_rank,
        another_configuration,
    )
}
FIRST = ["kill rank", "kill launcher", "terminate run", "full disk", "truncated checkpoint", "hung rank"]


def faults(count: int, seed: int) -> list[str]:
    """``count`` faults, all kinds about equally often, in random order; six faults are of the kinds in FIRST."""
    order = random.Random(seed)
    names = [*FIRST, *(n for n in FAULTS if n not in FIRST)]
    picked = [names[i % len(names)] for i in range(count)]
    order.shuffle(picked)
    return picked


def run(folder: Path, count: int, seed: int, *, pace: int = 30) -> dict[str, Any]:
    """Inject ``count`` faults, ``pace`` steps apart, and assert that the run equals an undisturbed one."""
    steps = (count + 1) * pace
    reference = TrainingJob(folder, "reference", steps=steps, every=10, timeout=TIMEOUT * 10)
    finished = subprocess.run(
        [*RACE_DIST, "train", str(reference.config), "--nproc", str(RANKS)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    chaos = Chaos(folder, seed, steps)
    try:
        chaos.start()
        plan = faults(count, seed)
        if not chaos.disk:
            plan = [name for name in plan if name != "full disk"]
        for number, name in enumerate(plan):
            chaos.inject(name, (number + 1) * pace - pace // 2)
        code = chaos.finish()
        assert code == 0, chaos.text()[-3000:]
        assert chaos.job.losses() == reference.losses()
        assert chaos.job.weights() == reference.weights()
        assert chaos.job.records("eval")[-1]["loss"] == reference.records("eval")[-1]["loss"]
        for outcome in chaos.outcomes:
            allowed = outcome.saved if outcome.fault != "truncated checkpoint" else 0
            assert outcome.resumed >= allowed, outcome
        assert not chaos.job.processes(), chaos.job.processes()
        assert not chaos.job.leftovers(), chaos.job.leftovers()
        return {"ranks": RANKS, "steps": steps, "seed": seed, "faults": [asdict(o) for o in chaos.outcomes]}
    finally:
        chaos.close()


def table(report: dict[str, Any]) -> str:
    """A Markdown table per kind of fault and in total: count, maximum of repeated steps, seconds to recover."""
    lines = ["| fault | times | steps repeated, at most | seconds to recover, median | 90% | at most |", "|---" * 6 + "|"]
    for name in [*FAULTS, "all"]:
        outcomes = [o for o in report["faults"] if name in (o["fault"], "all")]
        if outcomes:
            repeated, seconds = max(0, *(o["step"] - o["resumed"] for o in outcomes)), [o["seconds"] for o in outcomes]
            times = " | ".join(f"{quantile(seconds, q):.1f}" for q in (0.5, 0.9, 1.0))
            lines.append(f"| {name} | {len(outcomes)} | {repeated} | {times} |")
    return "\n".join(lines)


def quantile(values: list[float], q: float) -> float:
    """The smallest value that a share ``q`` of all does not exceed."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of this report and inject nothing")
    options = parser.parse_args()
    if options.show is not None:
        print(table(json.loads(options.show.read_text())))
        return
    before = os.getloadavg()[0]  # recovery is mostly the start of Python and PyTorch, which other work slows down
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), options.faults, options.seed)
    header = machine_info(torch.device("cpu")) | {
        "command": f"python tests/cluster/chaos.py {' '.join(sys.argv[1:])}",
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
    }
    report = {"machine": header, **report}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
