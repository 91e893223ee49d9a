"""The preflight checks of a node and of the group: disk, clocks, limits, collectives, the exclusive scan."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from race_dist.launch.check_results import CheckResult
from race_dist.parallel import all_gather_tensor, all_reduce_sum, barrier, exclusive_scan, group_rank, group_size
from race_dist.sketch import SketchState
from race_dist.training.config import TrainConfig
from race_dist.training.consistency import code_digest

_MIB, _GIB = 2**20, 2**30
_SHARED = {0x6969: "NFS", 0x0BD00BD0: "Lustre", 0x47504653: "GPFS", 0x19830326: "BeeGFS", 0xFF534D42: "CIFS"}
_STATE_BYTES = 12  # per parameter in a checkpoint: the weight and AdamW's two moments, float32


def facts(config: TrainConfig | None, device: torch.device) -> dict[str, str]:
    """Values that must be the same on every rank."""
    values = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "race-dist code": code_digest()[:12],
    }
    if config is not None:
        values["configuration"] = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    if device.type == "cuda":
        from race_dist.training.logging.telemetry import Nvml, device_uuid

        values |= {
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "gpu type": torch.cuda.get_device_name(device),
        }
        try:
            values["driver"] = Nvml(device_uuid(device)).system("GetDriverVersion") or "unknown"
        except (ImportError, OSError):
            values["driver"] = "unknown"
    return values


def node(device: torch.device) -> Iterator[CheckResult]:
    """Check the limits of this process and this node."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield CheckResult(
        "open files",
        "warn" if 0 < files < 4096 else "ok",
        files,
        f"at most {files} open files: raise it with ulimit -n" if 0 < files < 4096 else "",
    )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    low = device.type == "cuda" and locked != resource.RLIM_INFINITY
    yield CheckResult(
        "locked memory",
        "warn" if low else "ok",
        None if locked == resource.RLIM_INFINITY else locked,
        f"at most {locked} bytes: RDMA needs ulimit -l unlimited" if low else "",
    )
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    yield CheckResult(
        "shared memory",
        "warn" if shm < _GIB else "ok",
        shm,
        f"/dev/shm has {shm / _MIB:.0f} MiB: NCCL needs 1 GiB (--ipc=host or --shm-size)" if shm < _GIB else "",
    )
    yield CheckResult("cores", "ok", len(os.sched_getaffinity(0)))
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    kind = file_system(cache)
    yield CheckResult(
        "kernel cache",
        "warn" if kind else "ok",
        str(cache),
        f"{cache} lies on {kind}, which all nodes share: set TRITON_CACHE_DIR or the job's cache" if kind else "",
    )


def file_system(path: Path) -> str | None:
    """The shared file system that holds a path; None for a local one."""
    import ctypes

    while not path.exists():
        path = path.parent
    buffer = ctypes.create_string_buffer(256)  # struct statfs, whose first long is f_type
    if ctypes.CDLL(None, use_errno=True).statfs(str(path).encode(), buffer):
        return None
    return _SHARED.get(ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF)


def disk(folder: Path, megabytes: int = 64) -> Iterator[CheckResult]:
    """Measure the disk for checkpoints, and check that it returns the bytes that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".preflight-{platform.node()}-{os.getpid()}"
    block = os.urandom(_MIB)
    try:
        started = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(megabytes):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        wrote = time.perf_counter() - started
        started = time.perf_counter()
        good = all(piece == block for piece in _pieces(file))
        read = time.perf_counter() - started
    except OSError as error:
        yield CheckResult("disk", "fail", str(folder), str(error))
        return
    finally:
        file.unlink(missing_ok=True)
    yield CheckResult(
        "disk",
        "ok" if good else "fail",
        {"write_mb_s": round(megabytes * 1.048576 / wrote, 1), "read_mb_s": round(megabytes * 1.048576 / read, 1)},
        "" if good else f"{folder} returns other bytes than were written",
    )


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as data:
        while piece := data.read(_MIB):
            yield piece


def space(folder: Path, config: TrainConfig | None) -> Iterator[CheckResult]:
    """Check that the checkpoints that the run keeps fit on the disk."""
    free = shutil.disk_usage(folder).free
    if config is None:
        yield CheckResult("free space", "ok", free)
        return
    from race_dist.models import DecoderLM

    with torch.device("meta"):
        parameters = sum(p.numel() for p in DecoderLM(config.model).parameters())
    kept = getattr(getattr(config, "checkpoint", None), "keep", 1) + 1  # and the one being written
    need = kept * _STATE_BYTES * parameters * (2 if config.precision == "float64" else 1)
    detail = f"{folder} has {free / _GIB:.1f} GiB left, and {kept} checkpoints take {need / _GIB:.1f}"
    yield CheckResult(
        "free space",
        "fail" if free < need else "ok",
        {"free_gib": round(free / _GIB, 2), "needed_gib": round(need / _GIB, 4)},
        detail if free < need else "",
    )


def speed(device: torch.device) -> Iterator[CheckResult]:
    """Measure memory bandwidth and matrix multiplication of this rank's device, to find stragglers."""
    cuda = device.type == "cuda"
    size, dtype = (256 * _MIB, torch.bfloat16) if cuda else (16 * _MIB, torch.float32)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield CheckResult("copy GB/s", "ok", 2 * size / median_time(lambda: target.copy_(source), device) / 1e9)
    side = 8192 if cuda else 512
    a = torch.ones(side, side, dtype=dtype, device=device)
    yield CheckResult("matmul TFLOP/s", "ok", 2 * side**3 / median_time(lambda: a @ a, device) / 1e12)


def median_time(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of a call, after warm-up."""
    times = []
    for _ in range(repeats + 2):
        _sync(device)
        started = time.perf_counter()
        run()
        _sync(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce(group: ProcessGroup | None, device: torch.device) -> Iterator[CheckResult]:
    """Check that an all-reduce of small integers is exact, and measure its speed."""
    rank, world = group_rank(group), group_size(group)
    x = (torch.arange(2**16, device=device, dtype=torch.float32) % 97) * (rank + 1)
    expected = (torch.arange(2**16, device=device, dtype=torch.float32) % 97) * (world * (world + 1) // 2)
    good = bool(torch.equal(all_reduce_sum(x, group), expected))
    yield CheckResult("all-reduce", "ok" if good else "fail", good, "" if good else "the sum over the ranks is wrong")
    for size in (2**10, 2**20, 2**26 if device.type == "cuda" else 2**23):
        data = torch.ones(size // 4, device=device)
        seconds = median_time(lambda data=data: all_reduce_sum(data, group), device)  # type: ignore[misc]
        yield CheckResult(
            f"all-reduce {_bytes(size)}",
            "ok",
            {"microseconds": round(seconds * 1e6, 1), "bus_gb_s": round(2 * (world - 1) / world * size / seconds / 1e9, 3)},
        )


def scan(
    group: ProcessGroup | None,
    device: torch.device,
    *,
    heads: int = 16,
    features: int = 64,
    width: int = 128,
) -> Iterator[CheckResult]:
    """Check the exclusive scan of sketches against a float64 sum over the earlier ranks, and measure its speed."""
    rank = group_rank(group)
    generator = torch.Generator().manual_seed(rank)
    mass = torch.rand(1, heads, features, generator=generator).to(device)
    values = torch.randn(1, heads, features, width, generator=generator).to(device)
    prefix = exclusive_scan(SketchState(mass, values), group)
    error = 0.0
    for scanned, gathered in ((prefix.mass, all_gather_tensor(mass, group)), (prefix.values, all_gather_tensor(values, group))):
        expected = gathered[:rank].double().sum(0)
        error = max(error, float((scanned - expected).abs().max() / expected.abs().max().clamp_min(1.0)))
    limit = 2.0**-22 * max(1, group_size(group))  # one float32 rounding per addition
    yield CheckResult(
        "scan",
        "ok" if error <= limit else "fail",
        error,
        "" if error <= limit else f"differs from the sum of the earlier ranks' sketches by {error:.1e}",
    )
    seconds = median_time(lambda: exclusive_scan(SketchState(mass, values), group), device)
    yield CheckResult("scan, microseconds", "ok", round(seconds * 1e6, 1))


def clock_skew(group: ProcessGroup | None) -> float:
    """Seconds that this rank's clock is ahead of rank 0's, up to the duration of a barrier."""
    differences = []
    for _ in range(7):
        barrier(group)
        now = torch.tensor([time.time()], dtype=torch.float64)
        times = all_gather_tensor(now, group)
        differences.append(float(times[group_rank(group)] - times[0]))
    return statistics.median(differences)


def _bytes(size: int) -> str:
    return f"{size // _MIB} MiB" if size >= _MIB else f"{size // 1024} KiB"
