"""``race-dist bench streaming``: one exact optimizer step of a whole model over one very long sequence.

Each length is measured in a process of its own, whose peak memory is nobody else's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from race_dist.benchmarks.machine import machine, peak_resident_bytes
from race_dist.models import DecoderLM
from race_dist.streaming import Keep, Progress, streamed_backward
from race_dist.training.config import TrainConfig
from race_dist.training.data import load_corpus
from race_dist.training.optim import build_optimizer


@dataclass(frozen=True)
class Step:
    """One streamed optimizer step, measured.

    Attributes:
        tokens: of the sequence.
        text_tokens: of the text, which repeats where it is shorter than the sequence.
        chunk_size: tokens whose activations exist at a time.
        parameters: of the model.
        loss: mean, nats a token, before the step.
        gradient_norm: of the whole gradient.
        seconds: forward, backward and optimizer.
        peak_bytes: resident memory of the process (CPU) or allocated on the device (CUDA), at its highest.
        state_bytes: the carries kept at chunk starts, which grow with the sequence.
    """

    tokens: int
    text_tokens: int
    chunk_size: int
    parameters: int
    loss: float
    gradient_norm: float
    seconds: float
    peak_bytes: int
    state_bytes: int

    def json(self) -> dict[str, Any]:
        """As a JSON object, with what follows from the figures."""
        flops = 8 * self.parameters * self.tokens
        return {**asdict(self), "tokens_per_second": round(self.tokens / self.seconds, 1),
                "parameter_tflops_per_second": round(flops / self.seconds / 1e12, 3)}


def run(config: TrainConfig, lengths: list[int], *, chunk_size: int, device: torch.device, keep: Keep = "device",
        compiled: bool = False, threads: int | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """One step at each length, as the JSON that is stored.

    Args:
        config: model, text, optimizer and precision, as for training.
        lengths: tokens of each sequence.
        chunk_size, keep: of :func:`race_dist.streaming.streamed_backward`.
        compiled: compile the blocks with torch.compile first.
        threads: of PyTorch on the CPU; None leaves it alone.
        say: is given a line now and then.
    """
    steps = []
    for length in lengths:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            step = pool.submit(_step, config, length, chunk_size, str(device), keep, compiled, threads).result()
        steps.append(step)
        say(f"{step.tokens:>12,} tokens  {step.seconds:>9.1f} s  {step.tokens / step.seconds:>12,.0f} tokens/s  "
            f"peak {step.peak_bytes / 2**20:>9,.1f} MiB, of it carries {step.state_bytes / 2**20:,.1f} MiB  "
            f"loss {step.loss:.4f}")
    header = machine(device)
    if threads is not None:
        header["torch_threads"] = threads
    return {"machine": header, "chunk_size": chunk_size, "keep": keep, "compiled": compiled,
            "precision": config.precision, "text": config.data.path, "model": config.model.model_dump(mode="json"),
            "rows": [step.json() for step in steps]}


def _step(config: TrainConfig, length: int, chunk_size: int, device_name: str, keep: Keep, compiled: bool,
          threads: int | None) -> Step:
    device = torch.device(device_name)
    if threads is not None:
        torch.set_num_threads(threads)
    text = load_corpus(config.data.path, config.data.pattern).tokens
    tokens = text if len(text) > length else np.resize(text, length + 1)  # repeats from its beginning
    model = DecoderLM(config.model, dtype=torch.float64 if config.precision == "float64" else torch.float32).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    optimizer = build_optimizer(model, config.optim)
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()
    with autocast:
        # libraries, kernels and compiled graphs are loaded once, whatever the length
        warm = min(length, 3 * chunk_size)
        streamed_backward(model, tokens[None, :warm], tokens[None, 1:warm + 1], chunk_size=chunk_size, keep=keep)
        optimizer.zero_grad()
        _reset_peak(device)
        start = time.perf_counter()
        loss = streamed_backward(model, tokens[None, :length], tokens[None, 1:length + 1], chunk_size=chunk_size, keep=keep,
                                 progress=_Reporter())
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    result = float(loss), float(norm)
    carry = sum(t.numel() * t.element_size() for t in model.zero_carry(1, state_dtype=torch.float64).tensors())
    return Step(length, min(len(text), length), chunk_size, sum(p.numel() for p in model.parameters()), *result,
                time.perf_counter() - start, _peak(device), carry * -(-length // chunk_size))


class _Reporter:
    """A line a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.seconds < self._next:
            return
        self._next = progress.seconds + 60
        print(f"  {progress.phase} {progress.chunk}/{progress.chunks}, {progress.seconds:.0f} s, "
              f"{progress.remaining:.0f} s left", flush=True)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
