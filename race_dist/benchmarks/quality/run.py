"""The schedule of a protocol's runs: learning rates with the first seed, then the other seeds at the best rate, several at a
time.

Results are stored at once, and stored runs are not repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from race_dist.benchmarks.quality.protocol import Protocol, Run, Variant, settings_digest
from race_dist.benchmarks.quality.variants import describe, model_config
from race_dist.files import read_json_object, write_json
from race_dist.machine import machine_info


def score(result: dict[str, Any]) -> float:
    """Bits per byte, or the error rate of recall: lower is better."""
    return float(result["bits_per_byte"]) if "bits_per_byte" in result else 1 - float(result["accuracy"])


class Results:
    """The results of a protocol in a JSON file.

    Args:
        path: of the file; read if it is there.
        protocol: whose results they are.

    Raises:
        ValueError: the file does not belong to this benchmark, or has results of a variant with other settings.
    """

    def __init__(self, path: Path, protocol: Protocol) -> None:
        self.path, self.protocol = path, protocol
        self.data: dict[str, Any] = {
            "protocol": protocol.model_dump(mode="json", exclude={"variant"}),
            "variants": {},
            "machines": [],
            "runs": [],
        }
        if path.exists():
            self._read()
        for variant in protocol.variant:
            digest = settings_digest(protocol, variant)
            old = self.data["variants"].get(variant.name)
            if old is not None and old["settings"] != digest and any(r["variant"] == variant.name for r in self.data["runs"]):
                raise ValueError(
                    f"{path} holds runs of {variant.name!r} that were made with other settings: give another "
                    "--out, or another name to the variant"
                )
            self.data["variants"][variant.name] = {"settings": digest, **variant.model_dump(mode="json", exclude={"name"})}

    def _read(self) -> None:
        data = read_json_object(self.path, {"protocol": dict, "variants": dict, "machines": list, "runs": list})
        if data["protocol"].get("name") != self.protocol.name:
            raise ValueError(
                f"{self.path} holds results of the protocol {data['protocol'].get('name')!r}, not of "
                f"{self.protocol.name!r}: give another --out"
            )
        runs = [row for row in data["runs"] if "failed" not in row]  # failed runs are retried
        self.data = {**data, "protocol": self.data["protocol"], "runs": runs}

    def of(self, variant: str) -> list[dict[str, Any]]:
        """A variant's results."""
        return [row for row in self.data["runs"] if row["variant"] == variant]

    def keys(self) -> set[tuple[str, float, int]]:
        """Keys of the stored runs, including runs that failed in this call."""
        return {(row["variant"], row["rate"], row["seed"]) for row in self.data["runs"]}

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Store a result on disk at once."""
        self.data["runs"].append({"variant": run.variant.name, "rate": run.rate, "seed": run.seed, **result})
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)


def pending(protocol: Protocol, results: Results) -> Iterator[Run]:
    """Runs that can start now, by priority: the first learning rate of every variant, the second, ..., then the other seeds of
    each variant whose rates are all done."""
    known = results.keys()
    for n in range(max(len(rates_of(protocol, v)) for v in protocol.variant)):
        for variant in protocol.variant:
            rates = rates_of(protocol, variant)
            if n < len(rates) and (run := Run(variant, rates[n], seeds_of(protocol, variant)[0])).key not in known:
                yield run
    for m in range(1, max(len(seeds_of(protocol, v)) for v in protocol.variant)):
        for variant in protocol.variant:
            seeds, rate = seeds_of(protocol, variant), best_rate(protocol, variant, results)
            if m < len(seeds) and rate is not None and (run := Run(variant, rate, seeds[m])).key not in known:
                yield run


def rates_of(protocol: Protocol, variant: Variant) -> tuple[float, ...]:
    """Learning rates to try."""
    return protocol.rates if variant.rates is None else variant.rates


def seeds_of(protocol: Protocol, variant: Variant) -> tuple[int, ...]:
    """Seeds to run."""
    return protocol.seeds if variant.seeds is None else variant.seeds


def best_rate(protocol: Protocol, variant: Variant, results: Results) -> float | None:
    """The best learning rate with the first seed; None until all are done, or where all failed."""
    first = seeds_of(protocol, variant)[0]
    rows = {row["rate"]: row for row in results.of(variant.name) if row["seed"] == first}
    if any(rate not in rows for rate in rates_of(protocol, variant)):
        return None
    fine = [row for row in rows.values() if "failed" not in row and row["rate"] in rates_of(protocol, variant)]
    return min(fine, key=score)["rate"] if fine else None


@dataclass(frozen=True)
class Options:
    """Device of the runs, number of concurrent runs, threads of each, and a time limit in seconds; unfinished runs are then
    stopped."""

    device: str = "cpu"
    jobs: int = 1
    threads: int | None = None
    limit_seconds: float | None = None


@dataclass
class _Running:
    run: Run
    process: BaseProcess
    connection: Connection
    started: float = field(default_factory=time.monotonic)


class Scheduler:
    """Concurrent runs, each in a separate process.

    Args:
        protocol: the runs.
        results: stored results; new ones are added.
        options: of the runs.
        say: receives one line per run.
    """

    def __init__(self, protocol: Protocol, results: Results, options: Options, say: Callable[[str], None] = print) -> None:
        self.protocol, self.results, self.options, self.say = protocol, results, options, say
        self.running: list[_Running] = []
        self.text = protocol.model_dump_json()
        self.started = time.monotonic()
        self.longest = 0.0

    def run(self) -> list[str]:
        """Run everything that is pending. Returns one line per run that the time limit stopped."""
        for variant in self.protocol.variant:
            model_config(self.protocol, variant, self.protocol.seeds[0])  # checked before anything is trained
        self.results.data["machines"].append(
            {**machine_info(torch.device(self.options.device)), "side_by_side": self.options.jobs}
        )
        try:
            while self._fill() or self.running:
                self._collect()
                if self._seconds_left() <= 0:
                    break
        finally:
            stopped = [describe(job.run) for job in self.running]
            for job in self.running:
                job.process.kill()
                job.process.join()
            self.results.write()
        return stopped

    def _seconds_left(self) -> float:
        limit = self.options.limit_seconds
        return float("inf") if limit is None else self.started + limit - time.monotonic()

    def _fill(self) -> bool:
        """Start runs while there are free slots and, judging by earlier runs, time."""
        started = False
        while len(self.running) < self.options.jobs and self._seconds_left() > self.longest:
            busy = {job.run.key for job in self.running}
            run = next((r for r in pending(self.protocol, self.results) if r.key not in busy), None)
            if run is None:
                break
            self.running.append(self._start(run))
            started = True
        return started

    def _start(self, run: Run) -> _Running:
        context = get_context("forkserver")  # children start with all imports done
        context.set_forkserver_preload(["race_dist.benchmarks.quality.worker"])
        receive, send = context.Pipe(duplex=False)
        from race_dist.benchmarks.quality.worker import work

        variant = self.protocol.variant.index(run.variant)
        process = context.Process(
            target=work,
            daemon=True,
            args=(send, self.text, variant, run.rate, run.seed, self.options.device, self.options.threads),
        )
        process.start()
        send.close()
        return _Running(run, process, receive)

    def _collect(self) -> None:
        """Wait for results and store them."""
        ready = wait([job.connection for job in self.running], timeout=max(0.0, min(self._seconds_left(), 3600.0)))
        for job in [r for r in self.running if r.connection in ready]:
            try:
                result = json.loads(job.connection.recv_bytes())
            except EOFError:
                job.process.join()
                result = {"failed": f"the process ended with exit code {job.process.exitcode} and no result"}
            job.process.join()
            self.running.remove(job)
            wall = time.monotonic() - job.started
            self.longest = max(self.longest, wall)
            machine_index = len(self.results.data["machines"]) - 1
            self.results.add(job.run, {**result, "wall_seconds": round(wall, 1), "machine": machine_index})
            self.say(f"{describe(job.run)}: {outcome(result)}, {wall:.0f} s")


def outcome(result: dict[str, Any]) -> str:
    """A result as text."""
    if "failed" in result:
        return f"failed, {result['failed']}"
    if "bits_per_byte" in result:
        return f"{result['bits_per_byte']:.4f} bits per byte"
    return f"accuracy {result['accuracy']:.4f}"


def run_protocol(protocol: Protocol, out: Path, options: Options, say: Callable[[str], None] = print) -> Results:
    """Run the benchmark; each result is written to ``out`` at once, the page and the plot at the end."""
    from race_dist.benchmarks.quality.report import write_report

    results = Results(out, protocol)
    known = len(results.data["runs"])
    if known:
        say(f"{known} runs are in {out} already")
    for line in Scheduler(protocol, results, options, say).run():
        say(f"stopped at the time limit: {line}")
    left = sum(1 for _ in pending(protocol, results))
    if left:
        say(f"{left} runs or more are left: the same command continues with them")
    for path in write_report(results.data, out):
        say(f"written: {path}")
    return results
