"""Jobs of several ranks: consistency checks at the start, the mesh, a job under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks, spawn_ranks

from race_dist.parallel import (
    all_gather_tensor,
    all_reduce_max,
    all_reduce_sum,
    broadcast_tensor,
    build_mesh,
    check_same_on_all_ranks,
)


def agree(group, odd):
    rank = dist.get_rank(group)
    check_same_on_all_ranks({"planes": "5a" if rank in odd else "77", "config": "c0", "code": f"0.{len(odd)}"}, group)
    return True


def test_ranks_agree() -> None:
    assert all(run_ranks(3, agree, []))
    with pytest.raises(RankError, match=r"planes is 77 on ranks 0, 1, but 5a on rank 2\. Every rank") as error:
        run_ranks(3, agree, [2])
    assert "config is" not in str(error.value)
    assert "code is" not in str(error.value)
    with pytest.raises(RankError, match="5a on rank 1, 5a on rank 3"):
        run_ranks(5, agree, [1, 3])


def small_ones(group):
    x = torch.tensor([1.0, -2.0]) * (dist.get_rank(group) + 1)
    return all_reduce_sum(x, group), all_reduce_max(x, group), broadcast_tensor(x, group, source=1), all_gather_tensor(x, group)


def test_small_collectives() -> None:
    for total, largest, second, every in run_ranks(3, small_ones):
        assert total.tolist() == [6.0, -12.0]
        assert largest.tolist() == [3.0, -2.0]
        assert second.tolist() == [2.0, -4.0]
        assert every.tolist() == [[1.0, -2.0], [2.0, -4.0], [3.0, -6.0]]


def mesh_groups(group):
    try:
        build_mesh(3, 2)
    except ValueError as error:
        message = str(error)
    mesh = build_mesh(2, 2)
    timeouts = {str(mesh[name].get_group()._get_backend(torch.device("cpu")).options._timeout) for name in ("dp", "sp")}
    return message, [dist.get_process_group_ranks(mesh[name].get_group()) for name in ("dp", "sp")], timeouts


def test_mesh() -> None:
    for rank, outcome in enumerate(spawn_ranks(4, mesh_groups, timeout=31.0)):
        assert outcome.error is None, outcome.error
        message, (dp, sp), timeouts = outcome.value
        assert "dp=3 times sp=2 is 6, but there are 4 ranks" in message
        assert dp == [rank % 2, rank % 2 + 2]
        assert sp == [rank - rank % 2, rank - rank % 2 + 1]
        assert timeouts == {"0:00:31"}  # the job's timeout


JOB = """
import torch
from race_dist.parallel import all_reduce_sum, build_mesh, init_distributed, shutdown
device = init_distributed(device="cpu", timeout=60)
mesh = build_mesh(dp=1, sp=2)
print("sum", all_reduce_sum(torch.ones(3, device=device), mesh["sp"].get_group()).tolist())
shutdown()
"""


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2.0, 2.0, 2.0]") == 2
