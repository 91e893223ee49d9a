"""``race-dist preflight``: are these machines fit for this run? A table, a JSON, and the name of the node that is not."""

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

_SKEW = 1.0  # seconds between clocks from which logs of several nodes no longer fit together
_VISIBLE = 15.0  # seconds that a shared file system may take to show a file to other nodes


@dataclass(frozen=True)
class Report:
    """What preflight found, on every rank alike.

    Attributes:
        ranks: one report a rank.
        shared: findings about the group.
        seconds: how long it took.
    """

    ranks: list[RankReport]
    shared: list[CheckResult]
    seconds: float

    @property
    def refused(self) -> list[str]:
        """Why the run should not start here; empty where it may."""
        return refusals(self.ranks, self.shared)

    def to_json(self, header: dict[str, Any]) -> str:
        """Everything, under a header about the machine."""
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
        config: of the run to come; None leaves out what depends on it.
        folder: where its checkpoints will go.
        device: ``"cuda"``, ``"cpu"`` or None, which is CUDA where there is a device.
        timeout: seconds that ranks wait for each other.

    Raises:
        RankFailure: a rank did not come; the message names it and, under Slurm, its node.
        ValueError: the environment or the device is wrong.
    """
    began = time.perf_counter()
    try:
        place = init_distributed(device=device, timeout=timeout)
        group = torch.distributed.group.WORLD if torch.distributed.get_world_size() > 1 else None
        mine = RankReport(
            torch.distributed.get_rank(),
            local_rank() or 0,
            platform.node(),
            checks.facts(config, place),
            [*gpus.inspect(place), *checks.speed(place)],
        )
        if mine.local_rank == 0:
            mine.findings += [*checks.node(place), *checks.disk(folder), *checks.space(folder, config)]
        skew = checks.clock_skew(group)
        mine.findings.append(
            CheckResult(
                "clock skew",
                "warn" if abs(skew) > _SKEW else "ok",
                round(skew, 4),
                f"the clock is {skew:+.1f} s off rank 0's" if abs(skew) > _SKEW else "",
            )
        )
        shared = [*_visible(folder, group), *checks.all_reduce(group, place), *checks.scan(group, place)] if group else []
        reports = [RankReport.from_json(tree) for tree in gather_objects(asdict(mine), group)]
        shared = [CheckResult(**tree) for tree in gather_objects([asdict(f) for f in shared], group)[0]]
    except RankFailure as failure:
        raise RankFailure(_with_nodes(failure), failure.ranks) from failure
    shared += [*compare_facts(reports), *compare_speeds(reports, "copy GB/s"), *compare_speeds(reports, "matmul TFLOP/s")]
    shutdown()
    return Report(reports, shared, time.perf_counter() - began)


def _visible(folder: Path, group: ProcessGroup | None) -> Iterator[CheckResult]:
    """Whether every node sees a file that rank 0 writes where checkpoints will go."""
    token = folder / f".preflight-seen-{gather_objects(os.getpid(), group)[0]}"
    if torch.distributed.get_rank() == 0:
        token.touch()
    barrier(group)
    deadline = time.monotonic() + _VISIBLE
    while not token.exists() and time.monotonic() < deadline:
        os.listdir(folder)  # makes NFS look again
        time.sleep(0.2)
    seen = gather_objects((token.exists(), platform.node()), group)
    if torch.distributed.get_rank() == 0:
        token.unlink()
    blind = sorted({name for found, name in seen if not found})
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
    place = torch.device("cuda" if "cuda" in report.ranks[0].facts else "cpu")
    file.write_text(report.to_json(machine_info(place)), encoding="utf-8")


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
