"""The planner compared with the measured runs in docs/benchmarks: time within 20%, memory within 10%."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from race_dist.benchmarks.rates import measured_rates
from race_dist.models import ModelConfig
from race_dist.planning import GPUS, Cluster, Job, Layout, Plan, Rates, find_gpu, make_plan

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


def load(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((FOLDER / f"streaming-{name}.json").read_text(encoding="utf-8"))
    return report


def job_of(report: dict[str, Any], tokens: int) -> Job:
    return Job(ModelConfig(**report["model"]), tokens, 1, report["precision"], report["compiled"])


def plan_of(report: dict[str, Any], row: dict[str, Any], rates: Rates | None = None) -> Plan:
    gpu = find_gpu("h100") if report["device"] == "cuda" else GPUS["cpu"]
    layout = Layout(1, 1, report["chunk_size"], keep=report["keep"])
    return make_plan(job_of(report, row["tokens"]), layout, Cluster(gpu, 1), rates)


# present names of kernels in stored profiles
STORED_NAMES = {
    "tile_sums": "race_tile_sums_fwd_kernel",
    "scan_tiles": "race_scan_kernel",
    "pipe_out": "race_hopper_fwd_kernel",
    "pipe_queries": "race_hopper_bwd_dq_kernel",
    "pipe_keys": "race_hopper_bwd_dkv_kernel",
}


def profiled_rates(name: str) -> Rates:
    report = load(name)
    profile = report["rows"][0]["profile"]
    kernels = [{**kernel, "name": STORED_NAMES.get(kernel["name"], kernel["name"])} for kernel in profile["kernels"]]
    gpu = find_gpu("h100") if report["device"] == "cuda" else GPUS["cpu"]
    return measured_rates(job_of(report, profile["tokens"]), report["chunk_size"], gpu, kernels, source=name)


@pytest.mark.parametrize("name", ["h100-75m", "h100-1b"])
def test_the_time_of_long_steps_on_an_h100(name: str) -> None:
    report = load(name)
    row = report["rows"][0]
    assert plan_of(report, row).step == pytest.approx(row["seconds"], rel=0.2)


def test_the_time_of_a_long_step_on_a_cpu() -> None:
    """With the rates of a profile of three chunks on the same machine; the CPU of the planner's table is a guess."""
    report = load("cpu-75m")
    row = report["rows"][0]
    assert plan_of(report, row, profiled_rates("cpu-profile")).step == pytest.approx(row["seconds"], rel=0.2)


@pytest.mark.parametrize(
    ("name", "rows"), [("h100-75m", 1), ("h100-1b", 1), ("h100-memory", 4), ("cpu-75m", 1), ("memory-cpu", 4)]
)
def test_the_memory_of_measured_steps(name: str, rows: int) -> None:
    report = load(name)
    assert len(report["rows"]) == rows
    for row in report["rows"]:
        assert plan_of(report, row).memory.first_peak == pytest.approx(row["peak_bytes"], rel=0.1)


def test_a_long_step_on_two_gpus() -> None:
    report = json.loads((FOLDER / "scaling-h100-x2.json").read_text(encoding="utf-8"))
    row, model = report["streamed_step"]["shared"], load("h100-75m")["model"]
    job = Job(ModelConfig(**model), row["tokens"], 1, "bfloat16", compiled=True)
    plan = make_plan(job, Layout(1, 2, row["chunk_size"]), Cluster(find_gpu("h100"), 2))
    assert plan.step == pytest.approx(row["seconds"], rel=0.2)
    assert plan.memory.first_peak == pytest.approx(row["peak_bytes"], rel=0.1)


def test_the_table_of_the_planning_page_is_made_of_these() -> None:
    page, streaming = ((FOLDER.parent / name).read_text(encoding="utf-8") for name in ("planning.md", "streaming.md"))
    for name, rates, unit, width in (
        ("h100-75m", None, 1e9, ".2f"),
        ("h100-1b", None, 1e9, ".2f"),
        ("cpu-75m", profiled_rates("cpu-profile"), 2**20, ".1f"),
    ):
        report = load(name)
        row = report["rows"][0]
        plan = plan_of(report, row, rates)
        seconds, peak, planned = row["seconds"], row["peak_bytes"], plan.memory.first_peak
        form, word = (",.1f", "GB") if unit == 1e9 else (",.0f", "MiB")
        assert f"{seconds:{form}} s, {plan.step:{form}} s ({plan.step / seconds - 1:+.0%})" in page
        assert f"{peak / unit:{width}} {word}, {planned / unit:{width}} {word} ({planned / peak - 1:+.1%})" in page
        assert f" {plan.step:{form}} s ({plan.step / seconds - 1:+.0%}) |" in streaming
        assert f" {planned / unit:{width}} {word} ({planned / peak - 1:+.1%}) |" in streaming
    for name in ("h100-memory", "memory-cpu"):
        report = load(name)
        off = sorted(plan_of(report, row).memory.first_peak / row["peak_bytes"] - 1 for row in report["rows"])
        assert f", {off[0]:+.1%} to {off[-1]:+.1%} |" in page


@pytest.mark.parametrize("name", ["h100-memory", "memory-cpu"])
def test_measured_memory_does_not_grow_with_the_sequence(name: str) -> None:
    bare = [row["peak_bytes"] - row["state_bytes"] for row in load(name)["rows"]]
    assert max(bare) <= 1.03 * min(bare)


def test_element_wise_bytes_are_those_of_a_profile() -> None:
    assert profiled_rates("h100-2m").compiled_forward == pytest.approx(1, abs=0.1)
