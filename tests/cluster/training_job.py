"""A small training job for tests that kill processes: its configuration, processes and output files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race_dist.training.run_lock import LOCK

RACE_DIST = [sys.executable, "-m", "race_dist.cli"]

_CONFIG = """
name = "{name}"
runs = "{runs}"
steps = {steps}
log_every = 1
device = "cpu"
[model]
dim = 16
num_layers = 2
num_heads = 2
[data]
path = "{text}"
context = 128
batch_size = 4
[parallel]
timeout = {timeout}
[optim]
warmup_steps = 5
lr = 1e-2
[checkpoint]
every = {every}
minutes = 0
keep = 3
[eval]
every = {steps}
tokens = 1280
[sample]
tokens = 0
"""


class TrainingJob:
    """The files of one run.

    Args:
        folder: for the text, the configuration and the runs.
        name: name of the run.
        steps: optimizer steps.
        every: steps between checkpoints.
        timeout: seconds a collective waits.
    """

    def __init__(self, folder: Path, name: str, *, steps: int, every: int = 20, timeout: float = 60.0) -> None:
        self.folder, self.name, self.steps = folder, name, steps
        text = folder / "text.txt"
        if not text.exists():
            text.write_text("".join(f"line {n} of the text, {n * n % 97} and {n * 7 % 31}\n" for n in range(4000)))
        self.runs = folder / "runs"
        self.run = self.runs / name
        self.checkpoints = self.run / "checkpoints"
        self.config = folder / f"{name}.toml"
        self.config.write_text(_CONFIG.format(name=name, runs=self.runs, steps=steps, text=text, timeout=timeout, every=every))

    def records(self, kind: str = "train") -> list[dict[str, Any]]:
        """The metrics so far; a line still being written is left out."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [r for r in found if r["kind"] == kind]

    def step(self) -> int:
        """The newest step in the metrics."""
        records = self.records()
        return records[-1]["step"] if records else 0

    def losses(self) -> dict[int, float]:
        """The loss of every step."""
        return {r["step"]: r["loss"] for r in self.records()}

    def saved(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        try:
            return sorted(n for n in os.listdir(self.checkpoints) if re.fullmatch(r"\d+-step-\d+", n))
        except FileNotFoundError:
            return []

    def saved_step(self) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        names = self.saved()
        return int(names[-1].rpartition("-")[2]) if names else 0

    def weights(self) -> str:
        """Digest of the trained weights."""
        return hashlib.sha256((self.run / "model.safetensors").read_bytes()).hexdigest()

    def leftovers(self) -> list[str]:
        """Half-written files and locks in the run's folder, but for the one whose owner is what counts, not its file."""
        return [
            str(p.relative_to(self.runs))
            for p in self.run.rglob("*")
            if p.name != LOCK and re.search(r"partial|removed|lock|preflight|tmp", p.name)
        ]

    def processes(self) -> dict[int, list[str]]:
        """Command lines of the live processes that name this job's configuration, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(self.config) in words and state != "Z":
                    found[int(entry.name)] = words
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        found = self.places()
        return [found[r] for r in sorted(found)]

    def places(self) -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for pid, words in self.processes().items():
            if "race_dist.launch.rank" in words:
                try:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                named = dict(v.split(b"=", 1) for v in variables if b"=" in v)
                rank = named.get(b"RANK", named.get(b"SLURM_PROCID"))
                if rank is not None and not words[0].endswith("srun"):
                    found[int(rank)] = pid
        return found


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 120.0) -> Any:
    """Poll until the condition is true; AssertionError with ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.05)
    return found
