"""Exact training of a whole model with activation memory that does not grow with the sequence.

A causal model whose only path between tokens is what its layers carry can be run piece by piece: forward over the
chunks, keeping the carry at each chunk's start; then backward over the chunks in reverse, computing one chunk's
activations again at a time and handing the gradient of its incoming carry to the chunk before. The gradients are those
of the whole sequence, nothing is truncated. The price is one more forward pass, that of full activation checkpointing.

Related work that runs a sequence in pieces: Sequence Accumulation (AAAI 2025), RWKV's infctx training, OOMB
(arXiv 2602.02108).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.models.backbone import ModelCarry
from race_dist.models.language import LanguageModel
from race_dist.models.loss import IGNORE
from race_dist.parallel import all_reduce_sum, group_size
from race_dist.parallel.layout import shard_sequence

Tokens = Tensor | np.ndarray
Keep = Literal["device", "host"]


@dataclass(frozen=True)
class Progress:
    """How far one streamed step is: given to the ``progress`` callback after every chunk.

    Attributes:
        phase: "forward" (carries only) or "backward" (activations again, and gradients).
        chunk: chunks done in this phase, of ``chunks``.
        tokens: tokens done in this phase, over all ranks and rows.
        seconds: since the step began.
        remaining: seconds left, judged by the pace so far.
    """

    phase: str
    chunk: int
    chunks: int
    tokens: int
    seconds: float
    remaining: float


def streamed_backward(model: LanguageModel, input_ids: Tokens, labels: Tokens, *, chunk_size: int,
                      group: ProcessGroup | None = None, cu_seqlens: Tensor | None = None, keep: Keep = "device",
                      progress: Callable[[Progress], None] | None = None) -> Tensor:
    """The mean loss over the whole sequence; adds its exact gradients to every parameter's ``.grad``.

    Args:
        model: a DecoderLM of R and W layers.
        input_ids: ``[B, T]`` integers, the full sequence on every rank: a tensor, or a NumPy array such as a memory
            map far larger than memory.
        labels: ``[B, T]`` integers, ``labels[t]`` the target of position t; -100 is ignored.
        chunk_size: tokens (of each row) whose activations exist at a time on one rank. With W ranks, super-chunks of
            ``W * chunk_size`` tokens are sharded over the ranks, so that no rank waits for another's whole shard.
        group: the ranks that share the sequence. Gradients are summed over it, once, after the last chunk.
        cu_seqlens: ``[N + 1]`` int, packed documents (B = 1).
        keep: where the carries at chunk starts wait: "device", or "host" (pinned memory, copied beside the work).
        progress: called after every chunk.

    Returns:
        The mean over all targets, on every rank; 0 (with gradients 0) where no target counts.

    Raises:
        ValueError: the model has a layer that cannot be streamed, a shape does not fit, or ``chunk_size < 1``.
    """
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens, progress)
    carries = _Carries(keep)
    with _Gradients(model) as gradients:
        stream.forward_carries(carries)
        total = all_reduce_sum(stream.backward(carries, stream.count_targets(), gradients), stream.group)
        gradients.finish(stream.group)
    return total


@torch.no_grad()
def streamed_loss(model: LanguageModel, input_ids: Tokens, labels: Tokens, *, chunk_size: int,
                  group: ProcessGroup | None = None, cu_seqlens: Tensor | None = None,
                  progress: Callable[[Progress], None] | None = None) -> Tensor:
    """The mean loss of :func:`streamed_backward` without gradients: evaluation over any length. Same arguments."""
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens, progress)
    targets, carry = stream.count_targets(), stream.first_carry()
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for chunk in stream.chunks():
        ids, wanted = stream.load(chunk)
        h, after = model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=stream.group, final=not chunk.last)
        total += model.loss(h, wanted, num_targets=targets).double()
        carry = after if after is not None else carry
        stream.report("forward", chunk)
    return all_reduce_sum(total, stream.group)


@dataclass(frozen=True)
class _Chunk:
    """Tokens ``start`` to ``stop`` of the whole sequence, with the documents that are cut inside it."""

    index: int
    start: int
    stop: int
    last: bool
    cu_seqlens: Tensor | None


class _Stream:
    """One sequence, cut into chunks, and the model that runs over them."""

    def __init__(self, model: LanguageModel, input_ids: Tokens, labels: Tokens, chunk_size: int,
                 group: ProcessGroup | None, cu_seqlens: Tensor | None,
                 progress: Callable[[Progress], None] | None) -> None:
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model must be a race_dist.models.DecoderLM; got {type(model).__name__}")
        for name, tokens in (("input_ids", input_ids), ("labels", labels)):
            _check_tokens(name, tokens)
        if "S" in model.config.layer_kinds:
            raise ValueError(f"a full-softmax layer cannot be streamed: its carry is every key and value so far; "
                             f"layer_pattern = {model.config.layer_pattern!r} may hold R and W")
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1; got {chunk_size!r}")
        if input_ids.ndim != 2 or tuple(input_ids.shape) != tuple(labels.shape):
            raise ValueError(f"input_ids and labels must both be [B, T]; got {list(input_ids.shape)} and "
                             f"{list(labels.shape)}")
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids holds no tokens: [B, T] needs T of at least 1")
        if cu_seqlens is not None and (input_ids.shape[0] != 1 or int(cu_seqlens[-1]) != input_ids.shape[1]):
            raise ValueError(f"cu_seqlens must end at T = {input_ids.shape[1]} with B = 1; it ends at {int(cu_seqlens[-1])} "
                             f"with B = {input_ids.shape[0]}")
        self.model, self.input_ids, self.labels = model, input_ids, labels
        self.group = group if group_size(group) > 1 else None
        self.boundaries = None if cu_seqlens is None else cu_seqlens[1:-1].unique().tolist()
        self.batch, self.length = int(input_ids.shape[0]), int(input_ids.shape[1])
        self.step = chunk_size * group_size(group)
        self.count = -(-self.length // self.step)
        self.device = model.head_weight.device
        self.progress, self.began = progress, time.monotonic()

    def chunks(self, *, reverse: bool = False) -> Iterator[_Chunk]:
        order = range(self.count)
        for index in reversed(order) if reverse else order:
            start = index * self.step
            stop = min(start + self.step, self.length)
            yield _Chunk(index, start, stop, index == self.count - 1, self._documents(start, stop))

    def _documents(self, start: int, stop: int) -> Tensor | None:
        """Boundaries inside a chunk. One that stands at its start leaves the first document, which continues the
        carry, empty; one at its end is the next chunk's."""
        if self.boundaries is None:
            return None
        inside = [b - start for b in self.boundaries if start <= b < stop and b > 0]
        return torch.tensor([0, *inside, stop - start], dtype=torch.int64, device=self.device)

    def load(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """This rank's tokens and labels of a chunk, int64, on the model's device."""
        ids, labels = (_slice(x, chunk, self.device) for x in (self.input_ids, self.labels))
        if self.group is None:
            return ids, labels
        return shard_sequence(ids, self.group, dim=1), shard_sequence(labels, self.group, dim=1)

    def count_targets(self) -> int:
        """Targets of the whole sequence, counted piece by piece."""
        step = max(self.step, 2**22)
        pieces = (self.labels[:, start:start + step] for start in range(0, self.length, step))
        return sum(int((piece != IGNORE).sum()) for piece in pieces)

    def first_carry(self) -> ModelCarry:
        """No tokens yet. The sketches are float64: theirs are sums over the whole sequence."""
        return self.model.zero_carry(self.batch, state_dtype=torch.float64)

    @torch.no_grad()
    def forward_carries(self, carries: _Carries) -> None:
        """Fill in the carry at each chunk's start. The last chunk is not run: nothing reads what it hands on."""
        carry = self.first_carry()
        for chunk in self.chunks():
            carries.push(carry)
            if chunk.last:
                break
            ids, _ = self.load(chunk)
            _, after = self.model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=self.group)
            assert after is not None
            carry = after
            self.report("forward", chunk)

    def backward(self, carries: _Carries, targets: int, gradients: _Gradients) -> Tensor:
        """This rank's share of the mean loss, float64; gradients are added up chunk by chunk."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        incoming: list[Tensor | None] | None = None  # gradient of the carry that leaves the chunk
        for chunk in self.chunks(reverse=True):
            torch.clear_autocast_cache()  # weights cast without gradients must not be taken for these
            carry, leaves = carries.pop(self.device)
            ids, labels = self.load(chunk)
            with torch.enable_grad():
                h, after = self.model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=self.group, final=not chunk.last)
                loss = self.model.loss(h, labels, num_targets=targets)
            roots: list[Tensor] = [loss]
            seeds: list[Tensor | None] = [None]
            for tensor, gradient in zip(after.tensors() if after is not None else (), incoming or ()):
                if gradient is not None and tensor.requires_grad:
                    roots.append(tensor)
                    seeds.append(gradient)
            torch.autograd.backward(roots, seeds)
            total += loss.detach().double()
            gradients.collect()
            incoming = [None if leaf is None or leaf.grad is None else leaf.grad for leaf in leaves]
            self.report("backward", chunk)
        return total

    def report(self, phase: str, chunk: _Chunk) -> None:
        """Tell the callback. A backward chunk is three forward passes' work, as is usual to count it."""
        if self.progress is None:
            return
        seconds = time.monotonic() - self.began
        done = chunk.index + 1 if phase == "forward" else self.count - chunk.index
        works = done if phase == "forward" else self.count - 1 + 3 * done
        tokens = (chunk.stop if phase == "forward" else self.length - chunk.start) * self.batch
        self.progress(Progress(phase, done, self.count, tokens, seconds, seconds * ((4 * self.count - 1) / works - 1)))


def _check_tokens(name: str, x: Tokens) -> None:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array; got {type(x).__name__}")
    whole = np.issubdtype(x.dtype, np.integer) if isinstance(x, np.ndarray) else not x.is_floating_point()
    if not whole:
        raise TypeError(f"{name} must be integers; got {x.dtype}")


def _slice(x: Tokens, chunk: _Chunk, device: torch.device) -> Tensor:
    part: Any = x[:, chunk.start:chunk.stop]
    if isinstance(part, np.ndarray):
        part = torch.from_numpy(part.astype(np.int64))
    if device.type == "cuda" and part.device.type == "cpu":
        part = part.contiguous().pin_memory()
    return part.to(device=device, dtype=torch.int64, non_blocking=True)


class _Carries:
    """The carries at the chunks' starts, last in, first out."""

    def __init__(self, keep: Keep) -> None:
        if keep not in ("device", "host"):
            raise ValueError(f'keep must be "device" or "host"; got {keep!r}')
        self._keep = keep
        self._form: ModelCarry | None = None  # any of them: they differ in their tensors alone
        self._stack: list[tuple[Tensor, ...]] = []

    def push(self, carry: ModelCarry) -> None:
        self._form = carry
        tensors = (t.detach() for t in carry.tensors())
        self._stack.append(tuple(_to_host(t) if self._keep == "host" else t for t in tensors))

    def pop(self, device: torch.device) -> tuple[ModelCarry, list[Tensor | None]]:
        """The last one as leaves of a new graph; and of its tensors, those that can have a gradient (None elsewhere)."""
        assert self._form is not None
        tensors = tuple(t.to(device, non_blocking=True).detach() for t in self._stack.pop())
        leaves = [t.requires_grad_() if t.is_floating_point() else None for t in tensors]
        return self._form.with_tensors(tensors), leaves


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


class _Gradients:
    """Parameter gradients of one step, added up over its chunks in at least float32.

    Entering sets aside what stands in ``.grad``; an exception puts it back as it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._held: list[Tensor | None] = []
        self._wide: dict[int, Tensor] = {}

    def __enter__(self) -> _Gradients:
        self._held = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for p, held in zip(self._parameters, self._held):
                p.grad = held

    def collect(self) -> None:
        """Take the chunk's gradients of narrow parameters away; wide ones add up where they are."""
        for i, p in enumerate(self._parameters):
            if p.grad is None or p.dtype in (torch.float32, torch.float64):
                continue
            self._wide[i] = self._wide[i].add_(p.grad) if i in self._wide else p.grad.float()
            p.grad = None

    def finish(self, group: ProcessGroup | None) -> None:
        """Sum over the ranks and add to what stood in ``.grad`` before."""
        for i, (p, held) in enumerate(zip(self._parameters, self._held)):
            fresh = self._wide.pop(i, p.grad)
            fresh = all_reduce_sum(torch.zeros_like(p) if fresh is None else fresh, group)
            p.grad = (fresh if held is None else fresh + held).to(p.dtype)
