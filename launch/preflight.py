"""``race-dist preflight``: checks of the machines before a run, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from race_dist.launch import checks, gpus
from race_dist.launch.check_results import CheckResult, RankReport, compare_facts, compare_speeds, refusals, table
from race_dist.launch.rank_env import host_of_rank
from race_dist.output_paths import check_output_file
from race_dist.parallel import RankFailure, barrier, gather_objects, init_distributed, shutdown
from race_dist.rank_environment import local_rank
from race_dist.training.config import TrainConfig

_SKEW = 1.0  # seconds of clock difference above which logs of several nodes cannot be compared
_VISIBLE = 15.0  # seconds within which a shared file system must show a new file on other nodes


@dataclass(frozen=True)
class Report:
    """The results of preflight, the same on every rank.

    Attributes:
        ranks: one report per rank.
        shared: results of the group's checks.
        seconds: duration.
    """

    ranks: list[RankReport]
    shared: list[CheckResult]
    seconds: float

    @property
    def refused(self) -> list[str]:
        """Reasons not to start the run here; empty if there are none."""
        return refusals(self.ranks, self.shared)

    def to_json(self, header: dict[str, Any]) -> str:
        """All results, under a header about the machine."""
        body = {
            "machine": header,
            "refused": self.refused,
            "seconds": round(self.seconds, 2),
            "shared": [asdict(f) for f in self.shared],
            "ranks": [asdict(r) for r in self.ranks],
        }
        return json.dumps(body, indent=1) + "\n"


def preflight(config: TrainConfig | None, folder: Path, *, device: str | None, timeout: float) -> Report:
    """Check this rank's machine, then the group that the environment describes.

    Args:
        config: of the planned run; None skips the checks that depend on it.
        folder: for its checkpoints.
        device: ``"cuda"``, ``"cpu"`` or None, which is CUDA if there is a device.
        timeout: seconds that ranks wait for each other.

    Raises:
        RankFailure: a rank did not join; the message names it and, under Slurm, its node.
        ValueError: the environment or the device is wrong.
    """
    started = time.perf_counter()
    try:
        torch_device = init_distributed(device=device, timeout=timeout)
        group = torch.distributed.group.WORLD if torch.distributed.get_world_size() > 1 else None
        report = RankReport(
            torch.distributed.get_rank(),
            local_rank() or 0,
            platform.node(),
            checks.facts(config, torch_device),
            [*gpus.check_device(torch_device), *checks.speed(torch_device)],
        )
        if report.local_rank == 0:
            report.findings += [*checks.node(torch_device), *checks.disk(folder), *checks.space(folder, config)]
        skew = checks.clock_skew(group)
        report.findings.append(
            CheckResult(
                "clock skew",
                "warn" if abs(skew) > _SKEW else "ok",
                round(skew, 4),
                f"the clock is {skew:+.1f} s off rank 0's" if abs(skew) > _SKEW else "",
            )
        )
        shared = (
            [*_visible(folder, group), *checks.all_reduce(group, torch_device), *checks.scan(group, torch_device)]
            if group
            else []
        )
        reports = [RankReport.from_json(tree) for tree in gather_objects(asdict(report), group)]
        shared = [CheckResult(**tree) for tree in gather_objects([asdict(f) for f in shared], group)[0]]
    except RankFailure as failure:
        raise RankFailure(_with_nodes(failure), failure.ranks) from failure
    shared += [*compare_facts(reports), *compare_speeds(reports, "copy GB/s"), *compare_speeds(reports, "matmul TFLOP/s")]
    shutdown()
    return Report(reports, shared, time.perf_counter() - started)


def _visible(folder: Path, group: ProcessGroup | None) -> Iterator[CheckResult]:
    """Check that every node sees a file that rank 0 writes to the folder for checkpoints."""
    token = folder / f".preflight-seen-{gather_objects(os.getpid(), group)[0]}"
    if torch.distributed.get_rank() == 0:
        token.touch()
    barrier(group)
    deadline = time.monotonic() + _VISIBLE
    while not token.exists() and time.monotonic() < deadline:
        os.listdir(folder)  # makes NFS refresh its cache
        time.sleep(0.2)
    visible = gather_objects((token.exists(), platform.node()), group)
    if torch.distributed.get_rank() == 0:
        token.unlink()
    blind = sorted({name for found, name in visible if not found})
    yield CheckResult(
        "shared folder",
        "fail" if blind else "ok",
        not blind,
        f"{', '.join(blind)} does not see what rank 0 writes to {folder}" if blind else "",
    )


def _with_nodes(failure: RankFailure) -> str:
    names = {rank: host_of_rank(rank, os.environ) for rank in failure.ranks}
    known = [f"rank {rank} is on {name}" for rank, name in names.items() if name]
    return str(failure) + (f" ({'; '.join(known)})" if known else "")


def write(report: Report, file: Path) -> None:
    """Write the report as JSON, under a header about this machine."""
    from race_dist.machine import machine_info

    check_output_file(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch_device = torch.device("cuda" if "cuda" in report.ranks[0].facts else "cpu")
    file.write_text(report.to_json(machine_info(torch_device)), encoding="utf-8")


def show(report: Report) -> None:
    """Print the table and the verdict."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(report.ranks, report.shared))
    nodes = sorted({r.node for r in report.ranks})
    console.print(_verdict(report.refused, nodes, len(report.ranks)), soft_wrap=True, markup=False)


def _verdict(refused: Sequence[str], nodes: Sequence[str], ranks: int) -> str:
    what = f"{ranks} rank{'s' if ranks > 1 else ''} on {', '.join(nodes[:4])}{' and more' if len(nodes) > 4 else ''}"
    return f"fit: {what}" if not refused else "\n".join([f"not fit: {what}", *(f"  {line}" for line in refused)])
