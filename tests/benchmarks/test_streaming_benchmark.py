"""The streaming benchmark: a complete step, and the partial results of a stopped one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from race_dist.benchmarks import streaming
from race_dist.benchmarks.rates import measured_rates
from race_dist.models import ModelConfig
from race_dist.planning import Cluster, Job, Layout, Rates, make_plan
from race_dist.planning.clusters import find_gpu, match_gpu
from race_dist.planning.cost_model import streamed_flops
from race_dist.planning.parameter_counts import parameter_count
from race_dist.training.config import TrainConfig, parse_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("all that is said here is said once more. " * 20)
    return parse_config({"model": {"dim": 16, "num_layers": 2, "num_heads": 1, "ffn_dim": 32}, "data": {"path": str(text)}})


def test_a_whole_step_has_every_figure(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    streaming.run(config, [512, 1024], streaming.Options(128, "cpu", profile=True), out=out)
    report = json.loads(out.read_text())
    for row, tokens in zip(report["rows"], (512, 1024), strict=True):
        assert row["tokens"] == tokens
        assert row["text_tokens"] == min(tokens, 20 * 41)
        assert row["parameters"] == parameter_count(config.model)
        assert row["seconds"] == pytest.approx(row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"])
        assert row["loss"] == pytest.approx(5.6, abs=0.3)  # log(256), and slightly more for initial weights
        assert row["flops"] == streamed_flops(config.model, tokens) > 8 * row["parameters"] * tokens
        assert row["profile"]["busy_ms"] > 0
        assert "stopped" not in row
    assert report["rows"][1]["state_bytes"] == 2 * report["rows"][0]["state_bytes"] > 0
    assert out.with_suffix(".png").is_file()


def test_a_step_past_its_limit_says_how_far_it_came(config: TrainConfig) -> None:
    row = streaming.measure(config, 1024, streaming.Options(128, "cpu", limit=0.0))
    assert row["stopped"]["why"].startswith("after forward 1/8")
    assert row["reached"]["phase"] == "forward"
    assert row["reached"]["tokens"] == 128
    assert "seconds" not in row
    assert row["peak_bytes"] > 0


def test_a_step_in_pieces_is_one_step(config: TrainConfig, tmp_path: Path) -> None:
    whole = streaming.measure(config, 512, streaming.Options(128, "cpu"))
    options = streaming.Options(128, "cpu", limit=0.0, store=str(tmp_path / "store"))
    rows = [streaming.measure(config, 512, options) for _ in range(4)]
    assert all("reached" in row for row in rows[:3])
    assert [row["pieces"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == whole["loss"]
    assert rows[3]["gradient_norm"] == whole["gradient_norm"]
    assert rows[3]["forward_seconds"] >= rows[2]["forward_seconds"] > 0
    assert not any((tmp_path / "store").iterdir())


@pytest.mark.parametrize(
    ("driver", "table"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ],
)
def test_a_drivers_name_finds_its_peak(driver: str, table: str) -> None:
    gpu = match_gpu(driver)
    assert gpu is not None
    assert gpu.flops == find_gpu(table).flops
    assert gpu.name.split("-")[0] == table.split("-", maxsplit=1)[0]


def test_an_unknown_name_finds_none() -> None:
    assert match_gpu("Intel Arc") is None


def test_rates_are_recovered_from_kernels_that_ran_at_them() -> None:
    """From kernel times that the planner computes with known rates, the same rates and the same step time are recovered."""
    model = ModelConfig(vocab_size=256, dim=1024, num_layers=4, num_heads=8)
    job, gpu, chunk = Job(model, 3 * 65536, 1, compiled=True), find_gpu("h100"), 65536
    true = Rates(matmul=0.57, attention={64: (1.4, 1.4)}, compiled_forward=1.3, compiled_backward=1.3, host_forward=0.0)
    plan = make_plan(job, Layout(1, 1, chunk), Cluster(gpu, 1), true)
    kernels = [
        {"name": "nvjet_tst_256x128_64x4_2x1", "ms": 1e3 * plan.seconds["matrix products"]},
        {"name": "race_recurrent_bwd_dq_kernel", "ms": 5e2 * plan.seconds["attention"]},
        {"name": "race_scan_kernel", "ms": 5e2 * plan.seconds["attention"]},
        {"name": "triton_per_fused_add_mul_0", "ms": 1e3 * plan.seconds["element-wise"]},
        {"name": "Memcpy HtoD (Pinned -> Device)", "ms": 50.0},
    ]
    rates = measured_rates(job, chunk, gpu, kernels, source="made up")
    assert rates.matmul == pytest.approx(true.matmul, rel=0.02)
    assert rates.attention[64] == pytest.approx(true.attention[64], rel=0.01)
    again = make_plan(job, Layout(1, 1, chunk), Cluster(gpu, 1), rates)
    assert again.step == pytest.approx(plan.step, rel=0.02)


def test_a_million_tokens_take_the_memory_of_a_hundred_thousand(tmp_path: Path) -> None:
    """One exact optimizer step of a whole model; resident memory within 3%, without the carries at chunk starts."""
    tiny, out = tmp_path / "tiny.toml", tmp_path / "figures.json"
    tiny.write_text(
        "[model]\ndim = 16\nnum_layers = 1\nnum_heads = 1\nffn_dim = 32\ntie_embeddings = true\n"
        '[model.race]\nnum_tables = 1\nnum_planes = 2\noutput_gate = false\ndecay = "multiscale"\n'
    )
    command = [
        sys.executable,
        "-m",
        "race_dist.cli",
        "bench",
        "streaming",
        str(tiny),
        "--lengths",
        "131072,1048576",
        "--chunk",
        "16384",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=290,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    short, long = json.loads(out.read_text())["rows"]
    assert long["tokens"] == 2**20
    assert long["state_bytes"] == 8 * short["state_bytes"]
    assert long["peak_bytes"] - long["state_bytes"] <= 1.03 * short["peak_bytes"]


def test_a_profile_without_known_kernels_still_gives_rates() -> None:
    job = Job(ModelConfig(vocab_size=256, dim=128, num_layers=1, num_heads=1), 4096, 1)
    rates = measured_rates(job, 1024, find_gpu("h100"), [{"name": "something_else", "ms": 1.0}], source="made up")
    assert rates.attention[64][0] > 0
    assert 0 < rates.matmul <= 1
