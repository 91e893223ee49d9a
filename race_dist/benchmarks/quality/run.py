"""What runs when: learning rates with the first seed, then the other seeds at the best, several side by side; results are kept
as soon as they are there, and runs that are kept are not made again."""

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
    """Lower is better: bits per byte, or the share of queries that are missed."""
    return float(result["bits_per_byte"]) if "bits_per_byte" in result else 1 - float(result["accuracy"])


class Results:
    """The results of a protocol in a JSON file.

    Args:
        path: of the file; read if it is there.
        protocol: whose results they are.

    Raises:
        ValueError: the file is none of this benchmark, or holds a variant's results that were made with other settings.
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
        runs = [row for row in data["runs"] if "failed" not in row]  # what failed is tried again
        self.data = {**data, "protocol": self.data["protocol"], "runs": runs}

    def of(self, variant: str) -> list[dict[str, Any]]:
        """A variant's results."""
        return [row for row in self.data["runs"] if row["variant"] == variant]

    def keys(self) -> set[tuple[str, float, int]]:
        """What is there; a run that failed in this session too."""
        return {(row["variant"], row["rate"], row["seed"]) for row in self.data["runs"]}

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Keep a result, on disk at once."""
        self.data["runs"].append({"variant": run.variant.name, "rate": run.rate, "seed": run.seed, **result})
        self.write()

    def write(self) -> None:
        """The file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.data)


def pending(protocol: Protocol, results: Results) -> Iterator[Run]:
    """What can be run now, the most wanted first: the first rate of every variant, the second, ..., then the other seeds of
    each variant whose rates have all been tried."""
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
    """The rate that did best with the first seed; None until all have been tried, or where all failed."""
    first = seeds_of(protocol, variant)[0]
    rows = {row["rate"]: row for row in results.of(variant.name) if row["seed"] == first}
    if any(rate not in rows for rate in rates_of(protocol, variant)):
        return None
    fine = [row for row in rows.values() if "failed" not in row and row["rate"] in rates_of(protocol, variant)]
    return min(fine, key=score)["rate"] if fine else None


@dataclass(frozen=True)
class Options:
    """How the runs are made: where, how many side by side, threads of each, and when to end: seconds from the start; a run
    under way is then given up."""

    device: str = "cpu"
    jobs: int = 1
    threads: int | None = None
    limit_seconds: float | None = None


@dataclass
class _Running:
    run: Run
    process: BaseProcess
    connection: Connection
    begun: float = field(default_factory=time.monotonic)


class Board:
    """Runs side by side, each in a process of its own.

    Args:
        protocol: what is run.
        results: what is there already, and where results go.
        options: how.
        say: is given a line a run.
    """

    def __init__(self, protocol: Protocol, results: Results, options: Options, say: Callable[[str], None] = print) -> None:
        self.protocol, self.results, self.options, self.say = protocol, results, options, say
        self.running: list[_Running] = []
        self.text = protocol.model_dump_json()
        self.begun = time.monotonic()
        self.longest = 0.0

    def run(self) -> list[str]:
        """Make every run that is pending. Returns a line for each that the limit has cut off."""
        for variant in self.protocol.variant:
            model_config(self.protocol, variant, self.protocol.seeds[0])  # said before anything is trained
        self.results.data["machines"].append(
            {**machine_info(torch.device(self.options.device)), "side_by_side": self.options.jobs}
        )
        try:
            while self._fill() or self.running:
                self._collect()
                if self._left() <= 0:
                    break
        finally:
            given_up = [describe(each.run) for each in self.running]
            for each in self.running:
                each.process.kill()
                each.process.join()
            self.results.write()
        return given_up

    def _left(self) -> float:
        limit = self.options.limit_seconds
        return float("inf") if limit is None else self.begun + limit - time.monotonic()

    def _fill(self) -> bool:
        """Start what there is room for and, as far as earlier runs tell, time."""
        started = False
        while len(self.running) < self.options.jobs and self._left() > self.longest:
            busy = {each.run.key for each in self.running}
            run = next((r for r in pending(self.protocol, self.results) if r.key not in busy), None)
            if run is None:
                break
            self.running.append(self._start(run))
            started = True
        return started

    def _start(self, run: Run) -> _Running:
        context = get_context("forkserver")  # a child begins with everything imported
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
        """Wait for results, and keep those that came."""
        ready = wait([each.connection for each in self.running], timeout=max(0.0, min(self._left(), 3600.0)))
        for each in [r for r in self.running if r.connection in ready]:
            try:
                result = json.loads(each.connection.recv_bytes())
            except EOFError:
                each.process.join()
                result = {"failed": f"the process ended with exit code {each.process.exitcode} and no result"}
            each.process.join()
            self.running.remove(each)
            wall = time.monotonic() - each.begun
            self.longest = max(self.longest, wall)
            place = len(self.results.data["machines"]) - 1
            self.results.add(each.run, {**result, "wall_seconds": round(wall, 1), "machine": place})
            self.say(f"{describe(each.run)}: {outcome(result)}, {wall:.0f} s")


def outcome(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if "failed" in result:
        return f"failed, {result['failed']}"
    if "bits_per_byte" in result:
        return f"{result['bits_per_byte']:.4f} bits per byte"
    return f"accuracy {result['accuracy']:.4f}"


def run_protocol(protocol: Protocol, out: Path, options: Options, say: Callable[[str], None] = print) -> Results:
    """The whole benchmark; results are in ``out`` as they come, the page and the picture beside it at the end."""
    from race_dist.benchmarks.quality.report import write_report

    results = Results(out, protocol)
    known = len(results.data["runs"])
    if known:
        say(f"{known} runs are in {out} already")
    for line in Board(protocol, results, options, say).run():
        say(f"given up at the limit: {line}")
    left = sum(1 for _ in pending(protocol, results))
    if left:
        say(f"{left} runs or more are left: the same command goes on with them")
    for path in write_report(results.data, out):
        say(f"written: {path}")
    return results
