"""Bytes that context parallelism exchanges, and the benchmark of a training step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import spawn_ranks
from megatron_ranks import layout
from torch.distributed import ProcessGroup

from race_dist.benchmarks.megatron import ATTENTIONS, count_exchanges

TINY = {"vocab_size": 256, "dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 64}
LENGTHS = (64, 1024, 16384)


def counted(group: ProcessGroup, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    with layout(1, group.size()):
        return count_exchanges(TINY, lengths)


def test_bytes_do_not_grow_with_the_sequence_where_all_to_all_does() -> None:
    for rank in spawn_ranks(2, counted, LENGTHS, timeout=60):
        assert rank.error is None, rank.error
        rows = {row["length"]: row for row in rank.value}
        assert len({row["race_bytes"] for row in rows.values()}) == 1
        state = 4 * 64 * (16 + 1) * 4  # heads x features x (width + 1) x float32
        assert rows[64]["race_bytes"] > 4 * state  # two halves of the shard (zigzag), forward and backward
        assert rows[64]["race_bytes"] < 6 * state
        for length in LENGTHS:  # queries, keys, values, gate and two numbers per head, then the output; and gradients
            assert rows[length]["all_to_all_bytes"] == 2 * 4 * length // 2 * (4 * 64 + 2 * 4 + 64)


def test_the_benchmark_times_every_attention(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "megatron.json"
    command = [
        sys.executable,
        "-m",
        "race_dist.benchmarks.megatron",
        "step",
        "--lengths",
        "64,128",
        "--dim",
        "32",
        "--layers",
        "1",
        "--heads",
        "2",
        "--ffn",
        "32",
        "--repeats",
        "1",
        "--recompute",
        "--slowest",
        "1e9",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [(row["attention"], row["length"]) for row in report["rows"]] == [(n, t) for t in (64, 128) for n in ATTENTIONS]
    assert all(row["step_ms"]["p50"] > 0 for row in report["rows"])
    assert (report["dtype"], report["recompute"], report["model"]["dim"]) == ("bfloat16", True, 32)
    assert report["machine"]["megatron-core"]
