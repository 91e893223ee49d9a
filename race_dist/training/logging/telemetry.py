"""Power, energy, memory, clocks and health of the GPUs, from NVML, for the metrics of a run and for preflight.

NVML numbers devices as the driver does and knows nothing of CUDA_VISIBLE_DEVICES, so a device is found by its UUID. What
a card or driver does not answer is None, never 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from race_dist.distributed.watchdog import publish, published

# What keeps a clock down, by NVML's bits; idle and settings of the user's own are no trouble.
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
        """``nvmlDevice<name>(handle, *arguments)``, or None where the card, driver or binding does not answer it."""
        function = getattr(self._nvml, f"nvmlDevice{name}", None)
        if function is None:
            return None
        try:
            return function(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError, TypeError, ValueError):
            return None

    def constant(self, name: str) -> Any:
        """One of NVML's constants; None where this binding lacks it."""
        return getattr(self._nvml, name, None)

    def system(self, query: str) -> str | None:
        """``nvmlSystem<query>()`` as text."""
        try:
            answer = getattr(self._nvml, f"nvmlSystem{query}")()
        except (self._nvml.NVMLError, AttributeError):
            return None
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        answer = self.query("GetTotalEnergyConsumption")
        return None if answer is None else answer / 1e3

    def watts(self) -> float | None:
        """Power drawn now."""
        answer = self.query("GetPowerUsage")
        return None if answer is None else answer / 1e3

    def throttle_reasons(self) -> list[str] | None:
        """What keeps the clocks down now, in words."""
        bits = self.query("GetCurrentClocksEventReasons")
        if bits is None:
            bits = self.query("GetCurrentClocksThrottleReasons")
        return None if bits is None else [name for bit, name in _REASONS.items() if bits & bit]

    def is_throttled(self) -> bool | None:
        """Whether heat or the power supply keeps the clocks down, which a power cap alone is not."""
        bits = self.query("GetCurrentClocksEventReasons")
        if bits is None:
            bits = self.query("GetCurrentClocksThrottleReasons")
        return None if bits is None else bool(bits & _TROUBLE)

    def other_processes(self) -> list[dict[str, Any]] | None:
        """Processes on the GPU beside this one: ``pid`` and ``bytes`` (None where not told)."""
        running = self.query("GetComputeRunningProcesses")
        return None if running is None else [{"pid": p.pid, "bytes": p.usedGpuMemory} for p in running if p.pid != os.getpid()]


def device_uuid(device: torch.device) -> str:
    """Of a CUDA device, as NVML writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}".replace("GPU-GPU-", "GPU-")


@dataclass(frozen=True)
class Reading:
    """One rank's device at one moment; None is unknown.

    Attributes:
        joules: energy since some moment in the past.
        watts: power now.
        used: bytes of device memory that are taken, by anyone.
        clock: of the multiprocessors, MHz.
        celsius: of the chip.
        slowed: 1 where heat or the power supply keeps the clocks down.
    """

    joules: float | None = None
    watts: float | None = None
    used: int | None = None
    clock: int | None = None
    celsius: int | None = None
    slowed: int | None = None


class Telemetry:
    """Readings of every rank's GPU, summed up for the lines of a run's metrics.

    Each rank posts its reading on the bulletin that ranks watch each other by, so there is no collective and no waiting; rank
    0 adds up what is there, at most a beat old. On a machine without GPUs the host's memory is all there is.

        telemetry = Telemetry(device)
        run(trainer, directory, hooks=Hooks(probes=(telemetry.probe,)))
    """

    def __init__(self, device: torch.device, tokens: Callable[[], int] | None = None) -> None:
        """
        Args:
            device: of this rank.
            tokens: how many tokens all ranks together have trained on so far; needed for the energy a token.
        """
        self._device, self._tokens = device, tokens
        self.missing: str | None = None  # why there is nothing to read, as a sentence
        self._gpu: Nvml | None = None
        if device.type == "cuda":
            try:
                self._gpu = Nvml(device_uuid(device))
            except (ImportError, OSError) as error:
                self.missing = str(error)
        self._last: tuple[float, int] | None = None
        publish("gpu", self._post)

    def read(self) -> Reading:
        """This rank's device now."""
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
        """What to add to a line of metrics: over all ranks ``power_w`` and ``joules_per_token`` (sums), ``gpu_memory_gib``
        (largest), ``gpu_clock_mhz`` (lowest), ``gpu_celsius`` (highest), ``gpus_slowed`` (how many); of this rank
        ``peak_memory_gib`` (of its tensors; on a CPU of the process). What is unknown is left out."""
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
