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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.models.backbone import ModelCarry
from race_dist.models.language import LanguageModel
from race_dist.parallel import all_reduce_sum, group_size
from race_dist.streaming.carries import Carries, Keep, as_leaves
from race_dist.streaming.gradients import Gradients
from race_dist.streaming.text import Chunk, Text, Tokens

HOST_AHEAD = 2  # chunks whose kernels may wait on a device before the host waits for them


@dataclass(frozen=True)
class Progress:
    """How far one streamed step is: given to the ``progress`` callback after every chunk.

    On a device the last chunks may still be running: the host is at most two ahead.

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

    Blocks that are compiled run one graph in both phases, so that they round alike; a last chunk shorter than the others
    compiles another one.

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
        ValueError: the model has a layer that cannot be streamed, a shape or token does not fit, or ``chunk_size < 1``.
    """
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens, progress)
    with Gradients(model) as gradients:
        carries = Carries(keep, stream.first_carry(), stream.text.count)
        stream.forward(carries)
        total = all_reduce_sum(stream.backward(carries, gradients), stream.group)
        gradients.finish(stream.group)
    return total


@torch.no_grad()
def streamed_loss(model: LanguageModel, input_ids: Tokens, labels: Tokens, *, chunk_size: int,
                  group: ProcessGroup | None = None, cu_seqlens: Tensor | None = None,
                  progress: Callable[[Progress], None] | None = None) -> Tensor:
    """The mean loss of :func:`streamed_backward` without gradients: evaluation over any length. Same arguments."""
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens, progress)
    targets, carry = stream.targets(), stream.first_carry()
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for chunk, ids, wanted in stream.text.read(range(stream.text.count)):
        h, carry = stream.hidden(ids, carry, chunk)
        total += model.loss(h, wanted, num_targets=targets).double()
        stream.report("forward", chunk)
    return all_reduce_sum(total, stream.group)


class _Stream:
    """One sequence, cut into chunks, and the model that runs over them."""

    def __init__(self, model: LanguageModel, input_ids: Tokens, labels: Tokens, chunk_size: int,
                 group: ProcessGroup | None, cu_seqlens: Tensor | None,
                 progress: Callable[[Progress], None] | None) -> None:
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model must be a race_dist.models.DecoderLM; got {type(model).__name__}")
        if "S" in model.config.layer_kinds:
            raise ValueError(f"a full-softmax layer cannot be streamed: its carry is every key and value so far; "
                             f"layer_pattern = {model.config.layer_pattern!r} may hold R and W")
        self.model, self.device = model, model.head_weight.device
        self.group = group if group_size(group) > 1 else None
        self.text = Text(input_ids, labels, chunk_size, self.group, cu_seqlens, vocab_size=model.config.vocab_size,
                         device=self.device)
        self.compiled = any(m._compiled_call_impl is not None for m in model.modules())
        self.progress, self.began = progress, time.monotonic()
        self._running: deque[torch.cuda.Event] = deque()

    def targets(self) -> Tensor:
        """How many there are in the whole sequence, on the device."""
        return torch.tensor(self.text.count_targets(), device=self.device)

    def first_carry(self) -> ModelCarry:
        """No tokens yet. The sketches are float64: theirs are sums over the whole sequence."""
        kind, weights = self.device.type, self.model.head_weight.dtype
        narrow = torch.is_autocast_enabled(kind) and weights != torch.float64
        return self.model.zero_carry(self.text.batch, dtype=torch.get_autocast_dtype(kind) if narrow else weights,
                                     state_dtype=torch.float64)

    def hidden(self, ids: Tensor, carry: ModelCarry, chunk: Chunk) -> tuple[Tensor, ModelCarry]:
        """The chunk's hidden states and the carry behind it."""
        h, after = self.model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=self.group)
        assert after is not None
        return h, after

    def forward(self, carries: Carries) -> None:
        """Fill in the carry at each chunk's start. The last chunk is not run: nothing reads what it hands on."""
        carry = self.first_carry()
        carries.push(carry)
        for chunk, ids, _ in self.text.read(range(self.text.count - 1)):
            with torch.set_grad_enabled(self.compiled):  # a compiled graph rounds as it does in the backward phase
                _, carry = self.hidden(ids, as_leaves(carry)[0], chunk)
            carries.push(carry)
            self.report("forward", chunk)

    def backward(self, carries: Carries, gradients: Gradients) -> Tensor:
        """This rank's share of the mean loss, float64; gradients are added up chunk by chunk."""
        targets = self.targets()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        incoming: list[Tensor | None] = []  # gradient of the carry that leaves the chunk
        for chunk, ids, labels in self.text.read(reversed(range(self.text.count))):
            torch.clear_autocast_cache()  # weights cast without gradients must not be taken for these
            carry, leaves = carries.pop()
            with torch.enable_grad():
                h, after = self.hidden(ids, carry, chunk)
                loss = self.model.loss(h, labels, num_targets=targets)
            roots: list[Tensor] = [loss]
            seeds: list[Tensor | None] = [None]
            for tensor, gradient in zip(after.tensors(), incoming):
                if gradient is not None and tensor.requires_grad:
                    roots.append(tensor)
                    seeds.append(gradient)
            torch.autograd.backward(roots, seeds)
            total += loss.detach().double()
            gradients.collect()
            incoming = [None if leaf is None or leaf.grad is None else leaf.grad for leaf in leaves]
            self.report("backward", chunk)
        return total

    def report(self, phase: str, chunk: Chunk) -> None:
        """Tell the callback. A backward chunk is three forward passes' work, as is usual to count it."""
        self._keep_pace()
        if self.progress is None:
            return
        text, seconds = self.text, time.monotonic() - self.began
        done = chunk.index + 1 if phase == "forward" else text.count - chunk.index
        works = done if phase == "forward" else text.count - 1 + 3 * done
        tokens = (chunk.stop if phase == "forward" else text.length - chunk.start) * text.batch
        self.progress(Progress(phase, done, text.count, tokens, seconds, seconds * ((4 * text.count - 1) / works - 1)))

    def _keep_pace(self) -> None:
        """The host waits for the chunk before the last: what it reports has happened, and a key press is soon heard."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._running.append(event)
        if len(self._running) > HOST_AHEAD:
            self._running.popleft().synchronize()
