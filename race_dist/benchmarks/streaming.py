"""``race-dist bench streaming``: one exact optimizer step of a whole model over one very long sequence.

Each length is measured in a separate process, whose peak memory includes nothing else. Before the measured step three chunks
are streamed once, which loads libraries and compiles kernels and graphs.
"""

from __future__ import annotations

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

from race_dist.benchmarks.profiling import profile
from race_dist.benchmarks.rates import measured_rates
from race_dist.files import read_json_object, write_json
from race_dist.machine import machine_info, peak_resident_bytes
from race_dist.models import DecoderLM
from race_dist.parallel import all_reduce_max, group_rank, group_size
from race_dist.planning import GPUS, Cluster, Job, Layout, make_plan
from race_dist.planning.clusters import GPU, match_gpu
from race_dist.planning.cost_model import streamed_flops
from race_dist.streaming import Keep, Progress, StepCheckpoint, StepInterrupted, streamed_backward
from race_dist.training.config import TrainConfig
from race_dist.training.data.corpus import load_corpus
from race_dist.training.optim import build_optimizer

WARMUP_CHUNKS = 3
SYNC_EVERY = 16  # chunks after which the ranks of a group compare their clocks


@dataclass(frozen=True)
class Options:
    """Options of a measured step.

    Attributes:
        chunk_size, keep: of :func:`race_dist.streaming.streamed_backward`.
        device: "cpu" or "cuda".
        compiled: compile the blocks and the last norm with torch.compile.
        threads: of PyTorch on the CPU; None: PyTorch's default.
        limit: seconds after which a step ends with partial results; None: it runs to its end.
        store: a folder for checkpoints inside the step, so that it can be run in several calls; None: no checkpoints.
        every: seconds between two checkpoints.
        profile: also list the kernels of a few chunks by time.
    """

    chunk_size: int
    device: str
    keep: Keep = "device"
    compiled: bool = False
    threads: int | None = None
    limit: float | None = None
    store: str | None = None
    every: float = 300.0
    profile: bool = False


def run(
    config: TrainConfig, lengths: list[int], options: Options, *, out: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure one step at each length; the result is the JSON that is stored.

    Args:
        config: model, text, optimizer and precision, as for training.
        lengths: tokens of each sequence.
        options: of the steps.
        out: file to which the JSON is written after every length, with a plot of the memory for several lengths.
        say: receives progress lines.
    """
    header = machine_info(torch.device(options.device))
    if options.threads is not None:
        header["torch_threads"] = options.threads
    report: dict[str, Any] = {
        "machine": header,
        **asdict(options),
        "precision": config.precision,
        "text": config.data.path,
        "model": config.model.model_dump(mode="json"),
        "rows": [],
    }
    for length in lengths:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(measure, config, length, options).result()
        report["rows"].append(row)
        say(_line(row))
        if out is not None:
            store(report, out)
    return report


def measure(config: TrainConfig, length: int, options: Options, group: ProcessGroup | None = None) -> dict[str, Any]:
    """One optimizer step over ``length`` tokens in this process; the ranks of ``group`` share the sequence. Keys of the result:

    ``tokens``, ``text_tokens`` (the text repeats where it is shorter), ``parameters``, ``loss`` (mean, nats per token, before
    the step), ``gradient_norm``, ``warmup_seconds`` (compiling included), ``forward_seconds``, ``backward_seconds``,
    ``optimizer_seconds``, ``seconds`` (their sum), ``flops`` (8 x parameters x tokens and the attention), ``mfu`` (of the
    GPU's dense peak), ``peak_bytes`` (resident memory of the process, or allocated on the device), ``state_bytes`` of it the
    carries at chunk starts, which grow with the sequence. A step that reached its limit has ``stopped``, its progress
    (``reached``) and, from the backward phase on, ``projected_seconds`` in place of ``seconds``. Of a step in several pieces
    times are summed and peaks are maxima. ``planned`` is the planner's prediction; ``rates``, of a profiled run, are the
    input of ``race-dist plan --rates`` (copy them to a file).
    """
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tokens, unique = _text(config, length)
    model = DecoderLM(config.model, dtype=torch.float64 if config.precision == "float64" else torch.float32).to(device)
    if options.compiled or config.compile:
        for part in (*model.blocks, model.norm):
            part.compile(dynamic=False)
    optimizer = build_optimizer(model, config.optim)
    carry = sum(t.numel() * t.element_size() for t in model.zero_carry(1, state_dtype=torch.float64).tensors())
    row: dict[str, Any] = {
        "tokens": length,
        "text_tokens": min(unique, length),
        "chunk_size": options.chunk_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": carry * -(-length // (options.chunk_size * group_size(group))),
    }

    def stream(count: int, timer: _StepTimer | None = None) -> torch.Tensor:
        with _autocast(config, device):
            return streamed_backward(
                model,
                tokens[None, :count],
                tokens[None, 1 : count + 1],
                chunk_size=options.chunk_size,
                keep=options.keep,
                group=group,
                progress=timer,
                checkpoint=None if timer is None else timer.checkpoint,
            )

    step = options.chunk_size * group_size(group)
    warm = min(length, WARMUP_CHUNKS * step + length % step)  # a shorter last chunk has a separate graph
    row["warmup_seconds"] = _seconds(lambda: stream(warm), device)
    if options.profile:
        row["profile"] = {"tokens": warm, **profile(lambda: stream(warm), device)}
        row |= _rates(config, options, warm, row["profile"]["kernels"])
    optimizer.zero_grad()
    _reset_peak(device)
    timer = _StepTimer(device, options, length, group)
    try:
        row["loss"] = float(stream(length, timer))
    except (_TimeLimitReached, StepInterrupted) as stop:
        row |= {"stopped": {"why": str(stop)}} | timer.partial()
    else:
        row |= timer.phases()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        row["gradient_norm"] = float(norm)
        row["optimizer_seconds"] = _seconds(lambda: _apply(model, optimizer, config, norm), device)
        row["seconds"] = row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"]
    row |= _planned(config, length, options, group)
    seconds = row.get("seconds", row.get("projected_seconds"))
    row["flops"] = streamed_flops(config.model, length)
    gpu = _gpu(options) if device.type == "cuda" else None
    if seconds is not None:
        row["tokens_per_second"] = length / seconds
        row["tflops_per_second"] = row["flops"] / seconds / 1e12
        if gpu is not None:
            row["mfu"] = row["flops"] / seconds / (gpu.flops["bfloat16"] * group_size(group))
    return row | timer.peaks("seconds" in row)


def _planned(config: TrainConfig, length: int, options: Options, group: ProcessGroup | None) -> dict[str, Any]:
    """The planner's prediction: ``planned`` seconds by part, and peak bytes of a first step, which is what is measured."""
    gpu, ranks = _gpu(options), group_size(group)
    if options.keep == "subtract" or gpu is None:
        return {}
    job = Job(config.model, length, 1, config.precision, options.compiled or config.compile)
    plan = make_plan(job, Layout(1, ranks, options.chunk_size, keep=options.keep), Cluster(gpu, ranks, ranks))
    return {"planned": {"seconds": plan.step, **plan.seconds, "peak_bytes": plan.memory.first_peak}}


def _rates(config: TrainConfig, options: Options, tokens: int, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """``rates`` for ``race-dist plan --rates``, where the planner knows the GPU."""
    gpu = _gpu(options)
    if gpu is None:
        return {}
    job = Job(config.model, tokens, 1, config.precision, options.compiled or config.compile)
    source = f"a profile of {tokens:,} tokens in chunks of {options.chunk_size:,} on {gpu.name}"
    return {"rates": asdict(measured_rates(job, options.chunk_size, gpu, kernels, source=source))}


def _gpu(options: Options) -> GPU | None:
    device = torch.device(options.device)
    return match_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else GPUS["cpu"]


def _apply(model: DecoderLM, optimizer: torch.optim.Optimizer, config: TrainConfig, norm: torch.Tensor) -> None:
    """Clip gradients and update the weights, as training does."""
    if config.optim.clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip, norm)
    optimizer.step()


def _text(config: TrainConfig, length: int) -> tuple[NDArray[np.uint8], int]:
    """``length + 1`` bytes of the text, repeated from its beginning where it is shorter; and the number of bytes of the
    text."""
    corpus = load_corpus(config.data.path, config.data.pattern)
    text = corpus.tokens
    if corpus.skipped:
        print(corpus.skipped.describe(f"left out of {corpus.name}"), flush=True)
    return (text if len(text) > length else np.resize(text, length + 1)), len(text)


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _TimeLimitReached(Exception):
    """The step has reached its time limit."""


class _StepTimer:
    """Times the phases of a step over all its pieces, prints its progress, and ends it at its time limit."""

    def __init__(self, device: torch.device, options: Options, length: int, group: ProcessGroup | None) -> None:
        self._device, self._limit, self._length, self._group = device, options.limit, length, group
        self._spent, self._peak, self._pieces, self._file = {"forward": 0.0, "backward": 0.0}, 0, 1, None
        self.checkpoint: StepCheckpoint | None = None
        if options.store is not None:
            self.checkpoint = StepCheckpoint(Path(options.store), options.every, f"{length} tokens", lambda: self._stop)
            self._file = Path(options.store) / f"{length}-tokens.json"
        if self._file is not None and self._file.exists():
            before = read_json_object(self._file, {"spent": dict, "peak_bytes": int, "pieces": int})
            self._spent, self._peak, self._pieces = before["spent"], before["peak_bytes"], before["pieces"] + 1
        self._last, self._next_line, self._stop = time.perf_counter(), 0.0, False
        self._progress: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._progress = progress
        if progress.phase == "forward" and progress.chunk == progress.chunks - 1 and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._add(progress.phase)
        if progress.seconds >= self._next_line:
            self._next_line = progress.seconds + 20
            self._write()
            if group_rank(self._group) == 0:
                print(f"  {progress}", flush=True)
        self._stop = self._limit is not None and self._passed(progress, self._limit)
        if self._stop and self.checkpoint is None:
            raise _TimeLimitReached(f"after {progress}")

    def _passed(self, progress: Progress, limit: float) -> bool:
        """Whether the limit has passed on any rank; a group compares its clocks every ``SYNC_EVERY`` chunks."""
        if self._group is None:
            return progress.seconds > limit
        if progress.chunk % SYNC_EVERY:
            return False
        seconds = torch.tensor(progress.seconds, dtype=torch.float64, device=self._device)
        return float(all_reduce_max(seconds, self._group)) > limit

    def _add(self, phase: str) -> None:
        now = time.perf_counter()
        self._spent[phase] += now - self._last
        self._last = now

    def _write(self) -> None:
        if self._file is not None and group_rank(self._group) == 0:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            peak = max(self._peak, _peak(self._device)["peak_bytes"])
            write_json(self._file, {"spent": self._spent, "peak_bytes": peak, "pieces": self._pieces})

    def phases(self) -> dict[str, Any]:
        """Seconds of each phase of a finished step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._add("backward")
        return {"forward_seconds": self._spent["forward"], "backward_seconds": self._spent["backward"], "pieces": self._pieces}

    def partial(self) -> dict[str, Any]:
        """Results of a stopped step: its throughput, and in the backward phase the projected seconds of a whole step."""
        self._write()
        at = self._progress
        result: dict[str, Any] = {"pieces": self._pieces, **{f"{k}_seconds": v for k, v in self._spent.items() if v}}
        if at is not None:
            result["reached"] = {
                "phase": at.phase,
                "chunk": at.chunk,
                "chunks": at.chunks,
                "tokens": at.tokens,
                "tokens_per_second": at.tokens_per_second,
            }
        if at is not None and at.phase == "backward" and self._spent["forward"]:
            result["projected_seconds"] = self._spent["forward"] + self._spent["backward"] * self._length / at.tokens
        return result

    def peaks(self, finished: bool) -> dict[str, int]:
        """Peak memory over all pieces; removes the checkpoints of a finished step."""
        now = _peak(self._device)
        if finished and self.checkpoint is not None:
            self.checkpoint.clear()
            if self._file is not None and group_rank(self._group) == 0:
                self._file.unlink(missing_ok=True)
        return now | {"peak_bytes": max(self._peak, now["peak_bytes"])}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"peak_bytes": peak_resident_bytes()}
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _line(row: dict[str, Any]) -> str:
    seconds, pace = row.get("seconds"), row.get("tokens_per_second")
    text = f"{row['tokens']:>13,} tokens  "
    text += f"stopped {row['stopped']['why']}  " if seconds is None else f"{seconds:.1f} s  "
    text += "" if pace is None else f"{pace:,.0f} tokens/s  "
    text += f"mfu {row['mfu']:.1%}  " if "mfu" in row else ""
    text += f"peak {row['peak_bytes'] / 2**20:,.1f} MiB, carries at chunk starts {row['state_bytes'] / 2**20:,.1f} MiB"
    return text + (f"  loss {row['loss']:.4f}" if "loss" in row else "")


def store(report: dict[str, Any], path: Path) -> None:
    """Write the JSON and, for several lengths, a plot of the memory next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
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
        axes.plot(
            tokens,
            [(row["peak_bytes"] - _carry_bytes_on_device(report, row)) / 2**20 for row in rows],
            marker="o",
            label="without the carries at chunk starts",
        )
        title = f"one exact optimizer step, {rows[0]['parameters']:,} parameters, {where.get('gpu') or where['processor']}"
        axes.set(
            xscale="log",
            xlabel="tokens of one sequence",
            ylabel="MiB",
            title=title,
            ylim=(0, 1.2 * max(row["peak_bytes"] for row in rows) / 2**20),
        )
        axes.grid(visible=True, alpha=0.2)
        axes.legend()
        figure.savefig(path.with_suffix(".png"), dpi=150)


def _carry_bytes_on_device(report: dict[str, Any], row: dict[str, Any]) -> int:
    """Bytes of carries that the peak includes: not those that a GPU run stores on the host."""
    on_host = report["keep"] == "host" and report["device"] == "cuda"
    return 0 if on_host else int(row["state_bytes"])
