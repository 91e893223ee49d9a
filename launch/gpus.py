"""Health checks of one GPU, through NVML."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from race_dist.launch.check_results import CheckResult, Verdict
from race_dist.training.logging.telemetry import Nvml, device_uuid

_GIB = 2**30
_MAX_LINKS = 18
_BUSY = _GIB  # bytes held by other processes above which a GPU counts as in use
_FABRIC = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}


def check_device(device: torch.device) -> list[CheckResult]:
    """Check the device of a rank. Without a GPU or NVML: one result that says so."""
    if device.type != "cuda":
        return [CheckResult("gpu", "unknown", None, "no GPU: the device is the CPU")]
    try:
        gpu = Nvml(device_uuid(device))
    except (ImportError, OSError) as error:
        return [CheckResult("gpu", "unknown", torch.cuda.get_device_name(device), str(error))]
    name = CheckResult("gpu", "ok", {"name": torch.cuda.get_device_name(device), "uuid": device_uuid(device)})
    return [name, *check_gpu(gpu)]


def check_gpu(gpu: Nvml) -> list[CheckResult]:
    """All checks of a GPU."""
    return [
        result
        for check in (_memory, _errors, _links, _fabric, _clocks, _power, _pcie, _other_processes)
        for result in check(gpu)
    ]


def _result(name: str, value: object, bad: bool, detail: str, verdict: Verdict = "fail") -> CheckResult:
    if value is None:
        return CheckResult(name, "unknown")
    return CheckResult(name, verdict if bad else "ok", value, detail if bad else "")


def _memory(gpu: Nvml) -> Iterator[CheckResult]:
    memory = gpu.query("GetMemoryInfo")
    if memory is None:
        yield CheckResult("gpu memory", "unknown")
        return
    yield CheckResult(
        "gpu memory", "ok", {"total_gib": round(memory.total / _GIB, 2), "used_gib": round(memory.used / _GIB, 2)}
    )


def _errors(gpu: Nvml) -> Iterator[CheckResult]:
    mode = gpu.query("GetEccMode")
    yield _result(
        "ecc",
        None if mode is None else {"current": mode[0], "pending": mode[1]},
        mode is not None and mode[0] != mode[1],
        "ECC will change at the next reset",
        "warn",
    )
    for name, kind in (("uncorrected", "UNCORRECTED"), ("corrected", "CORRECTED")):
        count = gpu.query(
            "GetTotalEccErrors", gpu.constant(f"NVML_MEMORY_ERROR_TYPE_{kind}"), gpu.constant("NVML_VOLATILE_ECC")
        )
        yield _result(
            f"ecc errors, {name}",
            count,
            bool(count),
            f"{count} {name} memory errors since the last reset",
            "fail" if name == "uncorrected" else "warn",
        )
    rows = gpu.query("GetRemappedRows")
    if rows is None:
        yield CheckResult("remapped rows", "unknown")
        return
    corrected, uncorrected, pending, failure = rows
    value = {"corrected": corrected, "uncorrected": uncorrected, "pending": int(pending), "failure": int(failure)}
    if failure or pending:
        detail = "a row could not be remapped: replace the GPU" if failure else "a remapping waits for a reset of the GPU"
        yield CheckResult("remapped rows", "fail", value, detail)
    else:
        yield CheckResult(
            "remapped rows",
            "warn" if uncorrected else "ok",
            value,
            f"{uncorrected} rows were remapped after uncorrectable errors" if uncorrected else "",
        )


def _links(gpu: Nvml) -> Iterator[CheckResult]:
    states = [gpu.query("GetNvLinkState", link) for link in range(_MAX_LINKS)]
    known = [bool(state) for state in states if state is not None]
    value = {"active": sum(known), "inactive": len(known) - sum(known)} if known else None
    yield _result("nvlink", value, any(known) and not all(known), f"{len(known) - sum(known)} of {len(known)} links are down")
    c2c = gpu.query("GetC2cModeInfoV")
    yield _result(
        "c2c",
        None if c2c is None else bool(c2c.isC2cEnabled),
        c2c is not None and not c2c.isC2cEnabled,
        "the link between GPU and CPU (NVLink-C2C) is off",
        "warn",
    )


def _fabric(gpu: Nvml) -> Iterator[CheckResult]:
    info = gpu.query("GetGpuFabricInfoV") or gpu.query("GetGpuFabricInfo")
    if info is None or info.state == 0:
        yield CheckResult("fabric", "unknown", None, "no NVLink fabric" if info is not None else "")
        return
    value = {"state": _FABRIC.get(info.state, info.state), "status": info.status}
    yield _result(
        "fabric",
        value,
        info.state != 3 or info.status != 0,
        f"the NVLink fabric is {value['state']} (status {info.status}): look at the fabric manager",
    )


def _clocks(gpu: Nvml) -> Iterator[CheckResult]:
    kind = gpu.constant("NVML_CLOCK_SM")
    now, most = gpu.query("GetClockInfo", kind), gpu.query("GetMaxClockInfo", kind)
    yield _result("clocks", None if now is None else {"sm_mhz": now, "max_sm_mhz": most}, False, "")
    slowed = gpu.throttle_reasons()
    yield _result("clocks held down", slowed, bool(gpu.is_throttled()), f"by {', '.join(slowed or ())}")
    heat, limit = (
        gpu.query("GetTemperature", gpu.constant("NVML_TEMPERATURE_GPU")),
        gpu.query("GetTemperatureThreshold", gpu.constant("NVML_TEMPERATURE_THRESHOLD_SLOWDOWN")),
    )
    near = heat is not None and limit is not None and heat > limit - 5
    yield _result("temperature", heat, near, f"{heat} C, and it slows down at {limit} C", "warn")


def _power(gpu: Nvml) -> Iterator[CheckResult]:
    limit, default = gpu.query("GetEnforcedPowerLimit"), gpu.query("GetPowerManagementDefaultLimit")
    value = (
        None
        if limit is None
        else {"watts": gpu.watts(), "limit_watts": limit / 1e3, "default_watts": None if default is None else default / 1e3}
    )
    yield _result(
        "power",
        value,
        limit is not None and default is not None and limit < default,
        f"the limit is {(limit or 0) / 1e3:g} W, below the usual {(default or 0) / 1e3:g} W",
        "warn",
    )
    yield _result("energy counter", gpu.joules(), False, "")


def _pcie(gpu: Nvml) -> Iterator[CheckResult]:
    width, most = gpu.query("GetCurrPcieLinkWidth"), gpu.query("GetMaxPcieLinkWidth")
    yield _result(
        "pcie lanes", width, width is not None and most is not None and width < most, f"{width} of {most} lanes", "warn"
    )


def _other_processes(gpu: Nvml) -> Iterator[CheckResult]:
    others = gpu.other_processes()
    if others is None:
        yield CheckResult("other processes", "unknown")
        return
    held = sum(p["bytes"] or 0 for p in others)
    detail = f"processes {', '.join(str(p['pid']) for p in others)} hold {held / _GIB:.2f} GiB"
    yield CheckResult(
        "other processes", "fail" if held > _BUSY else "warn" if others else "ok", others, detail if others else ""
    )
