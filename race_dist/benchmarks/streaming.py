"""``race-dist bench streaming``: one exact optimizer step of a whole model over one very long sequence.

Each length is measured in a process of its own, whose peak memory is nobody else's. Before the step that counts, three
chunks are streamed once, so that libraries, kernels and compiled graphs are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from race_dist.benchmarks.machine import machine, peak_resident_bytes
from race_dist.benchmarks.profiling import profile
from race_dist.models import DecoderLM
from race_dist.models.backbone import SwiGLU
from race_dist.nn import RMSNorm
from race_dist.parallel import all_reduce_max, group_rank, group_size
from race_dist.planning.cluster import match_gpu
from race_dist.planning.costs import streamed_flops
from race_dist.streaming import Keep, Progress, streamed_backward
from race_dist.training.config import TrainConfig
from race_dist.training.corpus import load_corpus
from race_dist.training.optim import build_optimizer

WARM_CHUNKS = 3
AGREE_EVERY = 16  # chunks after which the ranks of a group compare their clocks


@dataclass(frozen=True)
class Options:
    """How a step is run.

    Attributes:
        chunk_size, keep: of :func:`race_dist.streaming.streamed_backward`.
        device: "cpu" or "cuda".
        compiled: compile with torch.compile first: the blocks and the last norm; under a group what exchanges nothing.
        threads: of PyTorch on the CPU; None leaves it alone.
        limit: seconds after which a step ends with what it has; None: it runs to its end.
        profile: also list the kernels of a few chunks by their time.
    """

    chunk_size: int
    device: str
    keep: Keep = "device"
    compiled: bool = False
    threads: int | None = None
    limit: float | None = None
    profile: bool = False


def run(config: TrainConfig, lengths: list[int], options: Options, *, out: Path | None = None,
        say: Callable[[str], None] = print) -> dict[str, Any]:
    """One step at each length, as the JSON that is stored.

    Args:
        config: model, text, optimizer and precision, as for training.
        lengths: tokens of each sequence.
        options: how.
        out: where the JSON is written after every length; a picture of the memory beside it, if there are several.
        say: is given a line now and then.
    """
    header = machine(torch.device(options.device))
    if options.threads is not None:
        header["torch_threads"] = options.threads
    report: dict[str, Any] = {"machine": header, **asdict(options), "precision": config.precision, "text": config.data.path,
                              "model": config.model.model_dump(mode="json"), "rows": []}
    for length in lengths:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(measure, config, length, options).result()
        report["rows"].append(row)
        say(_line(row))
        if out is not None:
            store(report, out)
    return report


def measure(config: TrainConfig, length: int, options: Options, group: ProcessGroup | None = None) -> dict[str, Any]:
    """One optimizer step over ``length`` tokens, in this process, its sequence shared by the ranks of ``group``. The keys of
    the result:

    ``tokens``, ``text_tokens`` (the text repeats where it is shorter), ``parameters``, ``loss`` (mean, nats a token, before
    the step), ``gradient_norm``, ``warmup_seconds`` (compiling included), ``forward_seconds``, ``backward_seconds``,
    ``optimizer_seconds``, ``seconds`` (their sum), ``flops`` (8 x parameters x tokens and the attention), ``mfu`` (of the
    GPU's dense peak), ``peak_bytes`` (resident memory of the process, or allocated on the device), ``state_bytes`` of it
    the carries at chunk starts, which grow with the sequence. A step that met its limit has ``stopped``, and
    ``projected_seconds`` in place of ``seconds``.
    """
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tokens, unique = _text(config, length)
    model = DecoderLM(config.model, dtype=torch.float64 if config.precision == "float64" else torch.float32).to(device)
    if options.compiled:
        for part in _compilable(model, group):
            part.compile(dynamic=False)
    optimizer = build_optimizer(model, config.optim)
    carry = sum(t.numel() * t.element_size() for t in model.zero_carry(1, state_dtype=torch.float64).tensors())
    row: dict[str, Any] = {"tokens": length, "text_tokens": min(unique, length), "chunk_size": options.chunk_size,
                           "parameters": sum(p.numel() for p in model.parameters()),
                           "state_bytes": carry * -(-length // (options.chunk_size * group_size(group)))}

    def stream(count: int, watch: _Watch | None = None) -> torch.Tensor:
        with _autocast(config, device):
            return streamed_backward(model, tokens[None, :count], tokens[None, 1:count + 1], chunk_size=options.chunk_size,
                                     keep=options.keep, group=group, progress=watch)

    warm = min(length, WARM_CHUNKS * options.chunk_size * group_size(group))
    row["warmup_seconds"] = _seconds(lambda: stream(warm), device)
    if options.profile:
        row["profile"] = {"tokens": warm, **profile(lambda: stream(warm), device)}
    optimizer.zero_grad()
    _reset_peak(device)
    watch = _Watch(device, options.limit, group)
    try:
        row["loss"] = float(stream(length, watch))
    except _OutOfTime as stop:
        row |= watch.partial(stop.progress, length)
    else:
        row |= watch.phases()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        row["gradient_norm"] = float(norm)
        row["optimizer_seconds"] = _seconds(lambda: _apply(model, optimizer, config, norm), device)
        row["seconds"] = row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"]
    seconds = row.get("seconds", row.get("projected_seconds"))
    row["flops"] = streamed_flops(config.model, length)
    gpu = match_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if seconds is not None:
        row["tokens_per_second"] = length / seconds
        row["tflops_per_second"] = row["flops"] / seconds / 1e12
        if gpu is not None:
            row["mfu"] = row["flops"] / seconds / (gpu.flops["bfloat16"] * group_size(group))
    return row | _peak(device)


def _compilable(model: DecoderLM, group: ProcessGroup | None) -> list[torch.nn.Module]:
    """Whole blocks on one rank; under a group the parts of them that exchange nothing: collectives break a graph."""
    if group is None:
        return [*model.blocks, model.norm]
    return [m for m in model.modules() if isinstance(m, SwiGLU | RMSNorm)]


def _apply(model: DecoderLM, optimizer: torch.optim.Optimizer, config: TrainConfig, norm: torch.Tensor) -> None:
    """Clip and step, as training does."""
    if config.optim.clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip, norm)
    optimizer.step()


def _text(config: TrainConfig, length: int) -> tuple[NDArray[np.uint8], int]:
    """``length + 1`` bytes of the text, repeated from its beginning where it is shorter; and how many it has."""
    text = load_corpus(config.data.path, config.data.pattern).tokens
    return (text if len(text) > length else np.resize(text, length + 1)), len(text)


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _OutOfTime(Exception):
    """The step's limit has passed."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self.progress = progress


class _Watch:
    """Times the phases, says how far the step is, and ends it at its limit."""

    def __init__(self, device: torch.device, limit: float | None, group: ProcessGroup | None) -> None:
        self._device, self._limit, self._group = device, limit, group
        self._began, self._next = time.perf_counter(), 0.0
        self._forward: float | None = None

    def __call__(self, progress: Progress) -> None:
        if self._forward is None and (progress.phase == "backward" or progress.chunk == progress.chunks - 1):
            self._forward = self._now()
        if progress.seconds >= self._next:
            self._next = progress.seconds + 20
            if group_rank(self._group) == 0:
                print(f"  {progress.phase} {progress.chunk}/{progress.chunks}, {progress.seconds:.0f} s, "
                      f"{progress.remaining:.0f} s left", flush=True)
        if self._limit is not None and self._over(progress, self._limit):
            raise _OutOfTime(progress)

    def _over(self, progress: Progress, limit: float) -> bool:
        """Whether the limit has passed: on any rank of a group, which asks now and then."""
        if self._group is None:
            return progress.seconds > limit
        if progress.chunk % AGREE_EVERY:
            return False
        seconds = torch.tensor(progress.seconds, dtype=torch.float64, device=self._device)
        return float(all_reduce_max(seconds, self._group)) > limit

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._began

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of a step that has ended."""
        now, forward = self._now(), self._forward or 0.0
        return {"forward_seconds": forward, "backward_seconds": now - forward}

    def partial(self, at: Progress, length: int) -> dict[str, Any]:
        """What a step that was stopped has shown: its pace, and from it the seconds of a whole step, if it came so far."""
        now = self._now()
        result: dict[str, Any] = {"stopped": {"phase": at.phase, "chunk": at.chunk, "chunks": at.chunks, "tokens": at.tokens,
                                              "seconds": now}}
        if at.phase == "backward" and self._forward is not None:
            result["forward_seconds"] = self._forward
            result["projected_seconds"] = self._forward + (now - self._forward) * length / at.tokens
        return result


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"peak_bytes": peak_resident_bytes()}
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}


def _line(row: dict[str, Any]) -> str:
    seconds, pace = row.get("seconds"), row.get("tokens_per_second")
    text = f"{row['tokens']:>13,} tokens  "
    text += f"stopped in the {row['stopped']['phase']} phase  " if seconds is None else f"{seconds:.1f} s  "
    text += "" if pace is None else f"{pace:,.0f} tokens/s  "
    text += f"mfu {row['mfu']:.1%}  " if "mfu" in row else ""
    text += f"peak {row['peak_bytes'] / 2**20:,.1f} MiB, carries at chunk starts {row['state_bytes'] / 2**20:,.1f} MiB"
    return text + (f"  loss {row['loss']:.4f}" if "loss" in row else "")


def store(report: dict[str, Any], path: Path) -> None:
    """Write the JSON and, where there are several lengths, a picture of memory and pace beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if len(report["rows"]) < 2:
        return
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows, where = report["rows"], report["machine"]
    tokens = [row["tokens"] for row in rows]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(tokens, [row["peak_bytes"] / 2**20 for row in rows], marker="o", label="peak")
        axes.plot(tokens, [(row["peak_bytes"] - _on_device(report, row)) / 2**20 for row in rows], marker="o",
                  label="without the carries at chunk starts")
        axes.set(xscale="log", xlabel="tokens of one sequence", ylabel="MiB", ylim=(0, None),
                 title=f"one exact optimizer step, {rows[0]['parameters']:,} parameters, "
                       f"{where.get('gpu') or where['processor']}")
        axes.grid(visible=True, alpha=0.2)
        axes.legend()
        figure.savefig(path.with_suffix(".png"), dpi=150)


def _on_device(report: dict[str, Any], row: dict[str, Any]) -> int:
    """Bytes of carries among the peak: on a GPU those that wait on the host are not."""
    waits_elsewhere = report["keep"] == "host" and report["device"] == "cuda"
    return 0 if waits_elsewhere else int(row["state_bytes"])
