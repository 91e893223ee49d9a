"""Starting the ranks of a run on this machine, without a launcher in front of the command."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def under_launcher() -> bool:
    """Whether a launcher (torchrun or one like it) has already made this process one rank of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def launch_ranks(arguments: Sequence[str], nproc: int) -> int:
    """Run ``python ARGUMENTS`` as ``nproc`` ranks of this machine and wait for them.

    A rank that fails ends the others; which one it was is said on the error stream.

    Args:
        arguments: what follows ``python``, for example ``["-m", "race_dist.cli", "train", ...]``.
        nproc: number of ranks.

    Returns:
        0, or the exit code of the rank that failed first; 130 where the user interrupted.
    """
    # One machine's cores are shared out: ranks that each start a thread per core only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
                          monitor_interval=0.1)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"rank {rank} failed ({how}); the other ranks were ended", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except (SignalException, KeyboardInterrupt):
        print("interrupted; the ranks were ended", file=sys.stderr)
        return 130
    return 0
