"""Preflight: what it makes of a GPU's answers, of ranks that differ, and of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from race_dist.launch import checks
from race_dist.launch.check_results import CheckResult, RankReport, compare_facts, compare_speeds, refusals
from race_dist.launch.gpus import check_device, check_gpu
from race_dist.parallel import RankFailure
from race_dist.training.logging import telemetry
from race_dist.training.logging.telemetry import Nvml, Telemetry

CONFIG = 'name = "x"\nruns = "{runs}"\n[model]\ndim = {dim}\nnum_layers = {layers}\nnum_heads = 4\n'
HEALTHY: dict[str, Any] = {
    "GetMemoryInfo": SimpleNamespace(total=80 * 2**30, used=2**29),
    "GetEccMode": (1, 1),
    "GetTotalEccErrors": 0,
    "GetRemappedRows": (0, 0, 0, 0),
    "GetNvLinkState": 1,
    "GetC2cModeInfoV": SimpleNamespace(isC2cEnabled=1),
    "GetGpuFabricInfoV": SimpleNamespace(state=3, status=0),
    "GetClockInfo": 1980,
    "GetMaxClockInfo": 1980,
    "GetCurrentClocksEventReasons": 0x4,
    "GetTemperature": 40,
    "GetTemperatureThreshold": 90,
    "GetEnforcedPowerLimit": 700000,
    "GetPowerManagementDefaultLimit": 700000,
    "GetPowerUsage": 95000,
    "GetTotalEnergyConsumption": 5000,
    "GetCurrPcieLinkWidth": 16,
    "GetMaxPcieLinkWidth": 16,
    "GetComputeRunningProcesses": [],
}


class Answers(Nvml):
    """A GPU that answers as told; None for what it is not told. (There is no GPU to ask where these tests run.)"""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def query(self, query: str, *arguments: Any) -> Any:
        answer = self.answers.get(query)
        return answer(*arguments) if callable(answer) else answer

    def constant(self, name: str) -> Any:
        return name


def verdicts(**changes: Any) -> dict[str, CheckResult]:
    return {f.name: f for f in check_gpu(Answers(HEALTHY | changes))}


def test_a_healthy_gpu_passes_all_checks() -> None:
    found = verdicts()
    assert {f.verdict for f in found.values()} == {"ok"}
    assert found["power"].value == {"watts": 95.0, "limit_watts": 700.0, "default_watts": 700.0}
    assert found["energy counter"].value == 5.0
    assert found["nvlink"].value == {"active": 18, "inactive": 0}


def test_values_that_a_gpu_does_not_report_are_unknown_and_never_zero() -> None:
    for finding in check_gpu(Answers({})):
        assert (finding.verdict, finding.value) == ("unknown", None), finding


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "detail"),
    [
        ({"GetTotalEccErrors": lambda kind, _: 3 if "UNCORRECTED" in kind else 0}, "ecc errors, uncorrected", "fail", "3"),
        (
            {"GetTotalEccErrors": lambda kind, _: 0 if "UNCORRECTED" in kind else 9},
            "ecc errors, corrected",
            "warn",
            "9 corrected",
        ),
        ({"GetEccMode": (1, 0)}, "ecc", "warn", "next reset"),
        ({"GetRemappedRows": (0, 1, 1, 0)}, "remapped rows", "fail", "waits for a reset"),
        ({"GetRemappedRows": (0, 1, 0, 1)}, "remapped rows", "fail", "replace the GPU"),
        ({"GetRemappedRows": (2, 1, 0, 0)}, "remapped rows", "warn", "1 rows were remapped"),
        ({"GetNvLinkState": lambda link: int(link != 5)}, "nvlink", "fail", "1 of 18 links are down"),
        ({"GetC2cModeInfoV": SimpleNamespace(isC2cEnabled=0)}, "c2c", "warn", "is off"),
        ({"GetGpuFabricInfoV": SimpleNamespace(state=2, status=0)}, "fabric", "fail", "in progress"),
        ({"GetGpuFabricInfoV": SimpleNamespace(state=3, status=7)}, "fabric", "fail", "status 7"),
        ({"GetCurrentClocksEventReasons": 0x40}, "clocks held down", "fail", "hardware thermal"),
        ({"GetCurrentClocksEventReasons": None, "GetCurrentClocksThrottleReasons": 0x80}, "clocks held down", "fail", "brake"),
        ({"GetTemperature": 88}, "temperature", "warn", "88 C"),
        ({"GetEnforcedPowerLimit": 400000}, "power", "warn", "400 W, below the usual 700 W"),
        ({"GetCurrPcieLinkWidth": 8}, "pcie lanes", "warn", "8 of 16"),
        ({"GetComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=2**31)]}, "other processes", "fail", "2.00 GiB"),
        (
            {"GetComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=None)]},
            "other processes",
            "warn",
            "processes 1",
        ),
    ],
)
def test_gpu_faults_are_named(changes: dict[str, Any], name: str, verdict: str, detail: str) -> None:
    found = verdicts(**changes)
    assert found[name].verdict == verdict
    assert detail in found[name].detail
    assert {f.verdict for n, f in found.items() if n != name} == {"ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_preflight_continues_without_nvml() -> None:
    pytest.importorskip("pynvml")
    with pytest.raises(OSError, match="NVML does not know GPU GPU-0"):
        Nvml("GPU-0")
    assert [(f.name, f.verdict) for f in check_device(torch.device("cpu"))] == [("gpu", "unknown")]


def reports(**facts: list[Any]) -> list[RankReport]:
    count = len(next(iter(facts.values())))
    return [RankReport(r, r % 2, f"nid{r // 2}", {k: v[r] for k, v in facts.items()}) for r in range(count)]


def test_ranks_that_differ_are_named_with_their_nodes() -> None:
    found = {f.name: f for f in compare_facts(reports(driver=["1", "1", "1", "2"], torch=["a"] * 4))}
    assert (found["torch"].verdict, found["driver"].verdict) == ("ok", "fail")
    assert "nid1 (rank 3) has 2" in found["driver"].detail
    assert refusals([], found.values()) == [f"driver: {found['driver'].detail}"]


def test_a_slow_rank_is_named() -> None:
    ranks = reports(x=["1"] * 4)
    for report, value in zip(ranks, (3000.0, 2990.0, 2000.0, 3010.0)):
        report.findings.append(CheckResult("copy GB/s", "ok", value))
    (found,) = compare_speeds(ranks, "copy GB/s")
    assert found.verdict == "warn"
    assert "nid1 (rank 2) 2e+03" in found.detail
    assert compare_speeds(ranks[:1], "copy GB/s") == []


def preflight(tmp_path: Path, *words: str, dim: int = 16, layers: int = 1) -> tuple[int, str, dict[str, Any]]:
    config, out = tmp_path / "x.toml", tmp_path / "out" / "preflight.json"
    config.write_text(CONFIG.format(runs=tmp_path / "runs", dim=dim, layers=layers))
    command = [sys.executable, "-m", "race_dist.cli", "preflight", str(config), "--device", "cpu", "--json", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text()) if out.exists() else {}


def test_preflight_passes_on_two_local_ranks(tmp_path: Path) -> None:
    code, text, report = preflight(tmp_path, "--nproc", "2")
    assert code == 0, text
    assert "fit: 2 ranks on " in text
    assert report["refused"] == []
    shared = {f["name"]: f for f in report["shared"]}
    for name in ("all-reduce", "scan", "shared folder", "torch", "race-dist code", "configuration"):
        assert shared[name]["verdict"] == "ok", shared[name]
    assert shared["scan, microseconds"]["value"] > 0
    first, second = report["ranks"]
    names = {f["name"] for f in first["findings"]}
    assert {"gpu", "disk", "free space", "clock skew", "open files", "shared memory", "kernel cache"} <= names
    assert "disk" not in {f["name"] for f in second["findings"]}  # once a node
    assert report["machine"]["torch"] == torch.__version__
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_whose_checkpoints_do_not_fit_is_refused_with_the_nodes_name(tmp_path: Path) -> None:
    code, text, report = preflight(tmp_path, dim=2**16, layers=4)
    assert code == 1, text
    (reason,) = report["refused"]
    assert "free space" in reason
    assert reason.startswith(report["ranks"][0]["node"])
    assert "not fit: 1 rank on" in text


def test_a_missing_rank_is_named_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from race_dist.launch.preflight import _with_nodes

    monkeypatch.setenv("SLURM_STEP_NODELIST", "nid[1-2]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    text = _with_nodes(RankFailure("rank 0: ranks 2, 3 of 4 did not join", [2, 3]))
    assert text.endswith("(rank 2 is on nid2; rank 3 is on nid2)")


def test_disks_are_measured_and_left_clean(tmp_path: Path) -> None:
    (found,) = checks.disk(tmp_path / "new", megabytes=2)
    assert found.verdict == "ok"
    assert found.value["write_mb_s"] > 0
    assert not list((tmp_path / "new").iterdir())


def test_telemetry_sums_over_ranks_and_omits_unknown_values(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter([1000, 3000, 3000])
    watch = Telemetry(torch.device("cpu"), tokens=lambda: next(tokens))
    assert set(watch.probe()) == {"peak_memory_gib"}  # no GPU: the host's memory is all there is
    assert watch.probe()["peak_memory_gib"] > 0.05
    board = {
        0: {"joules": 100.0, "watts": 300.0, "used": 2**30, "clock": 1900, "celsius": 50, "slowed": 0},
        1: {"joules": 50.0, "watts": 350.0, "used": 2**31, "clock": 1700, "celsius": 60, "slowed": 1},
        2: {},
    }
    monkeypatch.setattr(telemetry, "published", lambda name: board)
    first = watch.probe()
    assert "joules_per_token" not in first
    assert (first["power_w"], first["gpu_memory_gib"], first["gpu_clock_mhz"]) == (650.0, 2.0, 1700.0)
    assert (first["gpu_celsius"], first["gpus_slowed"]) == (60.0, 1.0)
    board[0]["joules"], board[1]["joules"] = 140.0, 60.0
    assert watch.probe()["joules_per_token"] == pytest.approx(50.0 / 2000)
    assert "joules_per_token" not in watch.probe()  # no new tokens
