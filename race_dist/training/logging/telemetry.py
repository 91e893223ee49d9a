"""Power, energy, memory, clocks and health of GPUs from NVML, for the metrics of a run and for preflight.

NVML numbers devices as the driver does and ignores CUDA_VISIBLE_DEVICES, so a device is identified by its UUID. A value that
the GPU or driver does not report is None, never 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from race_dist.distributed.watchdog import publish, published

# Reasons for reduced clocks, by NVML's bits; idle clocks and the user's own settings do not count.
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
_TROUBLE = 0x8 | 0x20 | 0x40 | 0x80


class Nvml:
    """One GPU through NVML.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        OSError: there is no driver, or no device of that UUID.
    """

    def __init__(self, uuid: str) -> None:
        try:
            import pynvml
        except ImportError:
            raise ImportError("reading GPUs needs nvidia-ml-py: pip install 'race-dist[nvml]'") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML does not know GPU {uuid}: {error}") from None

    def query(self, name: str, *arguments: Any) -> Any:
        """``nvmlDevice<name>(handle, *arguments)``; None if the GPU, driver or binding does not support it."""
        function = getattr(self._nvml, f"nvmlDevice{name}", None)
        if function is None:
            return None
        try:
            return function(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError, TypeError, ValueError):
            return None

    def constant(self, name: str) -> Any:
        """One of NVML's constants; None if this binding lacks it."""
        return getattr(self._nvml, name, None)

    def system(self, query: str) -> str | None:
        """``nvmlSystem<query>()`` as text."""
        try:
            answer = getattr(self._nvml, f"nvmlSystem{query}")()
        except (self._nvml.NVMLError, AttributeError):
            return None
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def joules(self) -> float | None:
        """Energy in joules since the driver was loaded."""
        answer = self.query("GetTotalEnergyConsumption")
        return None if answer is None else answer / 1e3

    def watts(self) -> float | None:
        """Current power."""
        answer = self.query("GetPowerUsage")
        return None if answer is None else answer / 1e3

    def throttle_reasons(self) -> list[str] | None:
        """Why the clocks are reduced now."""
        bits = self.query("GetCurrentClocksEventReasons")
        if bits is None:
            bits = self.query("GetCurrentClocksThrottleReasons")
        return None if bits is None else [name for bit, name in _REASONS.items() if bits & bit]

    def is_throttled(self) -> bool | None:
        """Whether heat or the power supply reduces the clocks. A power cap alone does not count."""
        bits = self.query("GetCurrentClocksEventReasons")
        if bits is None:
            bits = self.query("GetCurrentClocksThrottleReasons")
        return None if bits is None else bool(bits & _TROUBLE)

    def other_processes(self) -> list[dict[str, Any]] | None:
        """Other processes on the GPU: ``pid`` and ``bytes`` (None: unknown)."""
        running = self.query("GetComputeRunningProcesses")
        return None if running is None else [{"pid": p.pid, "bytes": p.usedGpuMemory} for p in running if p.pid != os.getpid()]


def device_uuid(device: torch.device) -> str:
    """UUID of a CUDA device, as NVML writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}".replace("GPU-GPU-", "GPU-")


@dataclass(frozen=True)
class Reading:
    """The state of one rank's device; None: unknown.

    Attributes:
        joules: energy since a fixed time in the past.
        watts: power.
        used: bytes of device memory in use, by any process.
        clock: of the SMs, MHz.
        celsius: temperature of the chip.
        slowed: 1 if heat or the power supply reduces the clocks.
    """

    joules: float | None = None
    watts: float | None = None
    used: int | None = None
    clock: int | None = None
    celsius: int | None = None
    slowed: int | None = None


class Telemetry:
    """Readings of every rank's GPU, combined for the metrics of a run.

    Each rank publishes its reading with its heartbeat, so there is no collective and no waiting. Rank 0 combines the readings,
    which are at most one heartbeat old. On a machine without GPUs only the host's memory is known.

        telemetry = Telemetry(device)
        run(trainer, directory, hooks=Hooks(probes=(telemetry.probe,)))
    """

    def __init__(self, device: torch.device, tokens: Callable[[], int] | None = None) -> None:
        """
        Args:
            device: of this rank.
            tokens: returns the number of tokens that all ranks have trained on; needed for the energy per token.
        """
        self._device, self._tokens = device, tokens
        self.missing: str | None = None  # why there are no readings, as a sentence
        self._gpu: Nvml | None = None
        if device.type == "cuda":
            try:
                self._gpu = Nvml(device_uuid(device))
            except (ImportError, OSError) as error:
                self.missing = str(error)
        self._last: tuple[float, int] | None = None
        publish("gpu", self._post)

    def read(self) -> Reading:
        """The current state of this rank's device."""
        gpu = self._gpu
        if gpu is None:
            return Reading()
        memory, trouble = gpu.query("GetMemoryInfo"), gpu.is_throttled()
        return Reading(
            joules=gpu.joules(),
            watts=gpu.watts(),
            used=None if memory is None else int(memory.used),
            clock=gpu.query("GetClockInfo", gpu.constant("NVML_CLOCK_SM")),
            celsius=gpu.query("GetTemperature", gpu.constant("NVML_TEMPERATURE_GPU")),
            slowed=None if trouble is None else int(trouble),
        )

    def _post(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.read()).items() if value is not None}

    def probe(self) -> dict[str, float]:
        """Values for a line of metrics. Over all ranks: ``power_w`` and ``joules_per_token`` (sums), ``gpu_memory_gib``
        (maximum), ``gpu_clock_mhz`` (minimum), ``gpu_celsius`` (maximum), ``gpus_slowed`` (count). Of this rank:
        ``peak_memory_gib`` (of its tensors; on a CPU, of the process). Unknown values are omitted."""
        found: dict[str, float] = {"peak_memory_gib": round(self._peak() / 2**30, 4)}
        readings = [r for r in published("gpu").values() if r]
        for name, key, over in (
            ("power_w", "watts", sum),
            ("gpu_memory_gib", "used", max),
            ("gpu_clock_mhz", "clock", min),
            ("gpu_celsius", "celsius", max),
            ("gpus_slowed", "slowed", sum),
        ):
            values = [r[key] for r in readings if key in r]
            if values:
                found[name] = round(over(values) / 2**30, 3) if key == "used" else round(float(over(values)), 3)
        joules = [r["joules"] for r in readings if "joules" in r]
        if joules and self._tokens is not None:
            now = (sum(joules), self._tokens())
            if self._last is not None and now[1] > self._last[1] and now[0] >= self._last[0]:
                found["joules_per_token"] = (now[0] - self._last[0]) / (now[1] - self._last[1])
            self._last = now
        return found

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with open("/proc/self/status", encoding="ascii") as status:
            return 1024 * next((int(line.split()[1]) for line in status if line.startswith("VmHWM")), 0)
