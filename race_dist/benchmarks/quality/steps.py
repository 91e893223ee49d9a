"""Training steps as CUDA graphs: after a few eager steps, one graph per shape of a batch.

Small models are otherwise launch-bound, especially several of them on one GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from race_dist.models import DecoderLM
from race_dist.nn import Sequence
from race_dist.nn.norm import compute_dtype
from race_dist.training.config import OptimConfig
from race_dist.training.optim import build_optimizer

WARMUP = 5  # eager steps of a shape before its graph, which compile and tune kernels


class Task(Protocol):
    """The interface of a task for :class:`Steps`."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The inputs of a step."""
        ...

    def length(self, batch: tuple[Tensor, ...]) -> int:
        """Tokens of a row."""
        ...

    def loss(self, model: DecoderLM, batch: tuple[Tensor, ...], sequence: Sequence) -> Tensor:
        """The mean loss."""
        ...


class Steps:
    """Optimizer steps of a model on a task.

    Args:
        model: on ``device``.
        task: its batches and loss.
        optim: AdamW's options.
        bfloat16: whether to run under bfloat16 autocast.
        device: on a GPU, steps are captured in graphs.
    """

    def __init__(self, model: DecoderLM, task: Task, optim: OptimConfig, *, bfloat16: bool, device: torch.device) -> None:
        self.model, self.task, self.optim, self.bfloat16, self.device = model, task, optim, bfloat16, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, optim)
        self.graphed = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.graphed else None
        if self.stream is not None:  # steps before a capture run on the capture's stream
            self.stream.wait_stream(torch.cuda.current_stream(device))
            torch.cuda.set_stream(self.stream)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.graphed
            group["lr"] = torch.tensor(group["lr"], device=device) if self.graphed else group["lr"]
        self.seen: dict[tuple[int, ...], int] = {}
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self.sequences: dict[int, Sequence] = {}

    def step(self, number: int, rate: float) -> Tensor:
        """One step at a learning rate; returns the loss before it, on the device."""
        batch = self.task.batch(number)
        self._set_rate(rate)
        shape = tuple(n for t in batch for n in t.shape)
        self.seen[shape] = self.seen.get(shape, 0) + 1
        if shape in self.graphs:
            graph, inputs, loss = self.graphs[shape]
            for static, new in zip(inputs, batch, strict=True):
                static.copy_(new)
            graph.replay()
            return loss
        if self.graphed and self.seen[shape] > WARMUP and self._capture(shape, batch):
            return self.graphs[shape][2]
        loss = self._eager_step(batch)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def try_loss(self) -> None:
        """Forward and backward of the first batch, without a step."""
        batch = self.task.batch(0)
        with autocast(self.device, bfloat16=self.bfloat16):
            loss = self.task.loss(self.model, batch, self._sequence(batch))
        loss.backward()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            scaled = rate * group.get("scale", 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled

    def _eager_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Forward, backward, clipping, update; gradients remain."""
        with autocast(self.device, bfloat16=self.bfloat16):
            loss = self.task.loss(self.model, batch, self._sequence(batch))
        loss.backward()
        if self.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip)
        self.optimizer.step()
        return loss.detach()

    def _sequence(self, batch: tuple[Tensor, ...]) -> Sequence:
        """The positions of rows of that length; created once per length, because it copies from the host."""
        length = self.task.length(batch)
        if length not in self.sequences:
            sequence = Sequence.of(length, device=self.device, return_carry=False)
            kinds = {
                (block.mixer.head_dim, block.mixer.rope_base)
                for block in self.model._blocks()
                if block.mixer.rope_base is not None
            }
            self.sequences[length] = sequence.with_rotations(kinds, compute_dtype(self.model.embed.weight))
        return self.sequences[length]

    def _capture(self, shape: tuple[int, ...], batch: tuple[Tensor, ...]) -> bool:
        """Capture the graph of a step of this shape and run it once; False (and no more graphs) where that fails."""
        inputs = tuple(t.clone() for t in batch)
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                loss = self._eager_step(inputs)
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            print(f"steps without a CUDA graph: {str(error)[:300]}", flush=True)
            self.graphed = False
            self.optimizer.zero_grad(set_to_none=True)
            return False
        self.graphs[shape] = graph, inputs, loss
        self.optimizer.zero_grad(set_to_none=True)  # the graph's gradients live in its memory pool
        return True


def autocast(device: torch.device, *, bfloat16: bool) -> AbstractContextManager[Any]:
    """bfloat16 autocast, or no autocast."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
