"""One rank of a job, as launchers start it: ``python -m race_dist.launch.rank train CONFIG ...``

Reads the rank from the launcher's variables, puts caches on the node's local disk, binds the process to the cores near its GPU,
lets the kernel end it with its launcher, and then runs ``race-dist`` with the remaining arguments.
"""

from __future__ import annotations

import faulthandler
import os
import re
import runpy
import sys
from collections.abc import Sequence

from race_dist.exit_codes import STOPPED, USER_ERROR


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``race-dist`` as one rank; exits with its code."""
    parent = os.getppid()
    from race_dist.launch.rank_env import bind_to_numa_node, die_with_parent, rank_variables, use_local_caches
    from race_dist.launch.stop import stop_early
    from race_dist.rank_environment import rank_environment

    stop_early(STOPPED)

    try:
        local_rank, words = take_local_rank(sys.argv[1:] if arguments is None else arguments)
        os.environ.update(rank_variables(os.environ, local_rank))
        use_local_caches(os.environ)
        ranks = rank_environment()
    except (ValueError, OSError) as error:
        print(f"race-dist: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    if "TORCHELASTIC_RUN_ID" in os.environ or "RACE_DIST_CHILD" in os.environ:
        die_with_parent(parent)
    if not faulthandler.is_enabled():
        faulthandler.enable()
    if os.environ.get("RACE_DIST_NUMA") == "1":
        bind_to_numa_node(ranks.local_rank or 0, ranks.local_world_size or 1)

    sys.argv = ["race-dist", *words]
    try:
        runpy.run_module("race_dist.cli", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        code = 0
    # When the first rank ends, the launcher may send SIGTERM to the others. Python's shutdown is slow and runs no handlers:
    # exit at once, so that each rank keeps its own exit code.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code_for_launcher(code))


def take_local_rank(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split off ``--local_rank=N`` (or ``--local-rank N``), which DeepSpeed adds as the first argument."""
    words, local_rank = list(arguments), None
    for index, word in enumerate(words):
        match = re.fullmatch(r"--local[_-]rank(?:=(\d+))?", word)
        if match:
            if match[1] is None and (index + 1 == len(words) or not words[index + 1].isdecimal()):
                raise ValueError(f"{word} needs a number behind it")
            local_rank = int(match[1] or words[index + 1])
            del words[index : index + (1 if match[1] else 2)]
            break
    return local_rank, words


def _code_for_launcher(code: int) -> int:
    """The exit code for the launcher. torchrun restarts every rank that does not exit with 0, but a run that was asked to stop
    must not be restarted. A supervisor above torchrun gets the true code."""
    if code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ and "RACE_DIST_SUPERVISED" not in os.environ:
        return 0
    return code


if __name__ == "__main__":
    main()
