"""Exact training of a whole model with activation memory that does not grow with the sequence.

A causal model whose tokens interact only through the carries of its layers can be run chunk by chunk. The forward phase runs
over the chunks and stores the carry at each chunk's start. The backward phase runs over the chunks in reverse: it recomputes
the activations of one chunk at a time and passes the gradient of the chunk's initial carry to the chunk before. The gradients
are those of the whole sequence; nothing is truncated. The cost is one additional forward pass, as in full activation
checkpointing.

Related work that runs a sequence in pieces: Sequence Accumulation (AAAI 2025), RWKV's infctx training, OOMB
(arXiv 2602.02108).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from race_dist import checks
from race_dist.distributed.communication import check_group, pack, unpack
from race_dist.distributed.consistency import max_over_ranks
from race_dist.files import json_digest
from race_dist.models.backbone import ModelCarry
from race_dist.models.language import DecoderLM
from race_dist.models.targets import warn_unshifted_text
from race_dist.nn import kinds_in, streamable_letters
from race_dist.parallel import all_reduce_sum, group_size
from race_dist.streaming.carry_stack import KEEPS, CarryStack, Keep, carry_leaves, subtract
from race_dist.streaming.checkpoint import SavedStep, StepCheckpoint, StepStore, tokens_digest, weights_digest
from race_dist.streaming.chunks import Chunk, ChunkedTokens, Tokens
from race_dist.streaming.gradient_accumulation import GradientAccumulator, Reduce, unwrap_model
from race_dist.streaming.progress import InterruptHandler, Progress, ProgressMeter, StepInterrupted


def streamed_backward(
    model: nn.Module,
    input_ids: Tokens,
    labels: Tokens,
    *,
    chunk_size: int,
    group: ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    num_targets: int | None = None,
    reduce: Reduce = "mean",
    keep: Keep = "device",
    checkpoint: StepCheckpoint | None = None,
    world: ProcessGroup | None = None,
    progress: Callable[[Progress], None] | None = None,
    key_mask: None = None,
) -> Tensor:
    """The mean loss over the whole sequence; adds its exact gradients to every parameter's ``.grad``.

    Compiled blocks run the same graph in both phases, so that both round alike; a shorter last chunk compiles a second graph.
    Ctrl-C ends the step at the next chunk boundary, on all ranks.

    Args:
        model: a DecoderLM whose layers have carries of fixed size (R and W), plain, in DistributedDataParallel or under FSDP2
            (``fully_shard``).
        input_ids: ``[B, T]`` integers, the full sequence on every rank: a tensor, or a NumPy array such as a memory map.
        labels: ``[B, T]`` integers; ``labels[t]`` is the target of position t (the token after it); -100 is ignored.
        chunk_size: tokens of each row whose activations exist at a time on one rank. With W ranks, super-chunks of
            ``W * chunk_size`` tokens are sharded over the ranks, so that no rank waits for another's whole shard.
        group: the ranks that share the sequence. Gradients are summed over it once, after the last chunk.
        cu_seqlens: ``[N + 1]`` int: the boundaries of packed documents (B = 1).
        num_targets: the divisor of the summed loss; None: the number of labels that count.
        reduce: the reduction of gradients after the last chunk. "mean": summed over ``group`` and averaged over replicas, as in
            DDP and FSDP2. "sum": summed over replicas too; FSDP2 must be set to sum with ``set_gradient_divide_factor(1)``.
            "none": gradients stay this rank's share; under FSDP2 a later call reduces them.
        keep: where the carries at chunk starts are stored: "device"; "host": pinned memory, copied beside the computation;
            "subtract": sketches are recovered by subtracting what each chunk has added (needs no decay and no packed
            documents, and costs about one more forward pass).
        checkpoint: where to store the step while it runs, and from where to resume it.
        world: the ranks, replicas included, that make this call together with the same number of chunks: they store and stop
            at the same chunk. None: the ranks of DDP, otherwise ``group``.
        progress: called after every chunk.
        key_mask: must be None. Give texts of several lengths as packed documents (``cu_seqlens``), not as rows with padding.

    Returns:
        The mean over all targets, on every rank; 0 (with gradients 0) if no target counts.

    Raises:
        ValueError: the model has a layer that cannot be streamed, a shape or token does not fit, ``chunk_size < 1``, or the
            checkpoint's folder holds another step or is damaged (a DamagedStepError that names the file).
        StepInterrupted: on Ctrl-C, or when the checkpoint's ``stop`` returns True. Gradients are then unchanged.

    Warns:
        UserWarning: the labels equal the input.
    """
    _refuse_mask(key_mask)
    if checkpoint is not None:
        checks.instance("checkpoint", checkpoint, StepCheckpoint, 'give StepCheckpoint("FOLDER")')
    check_group(world, "world")
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens)
    warn_unshifted_text(input_ids, labels)
    stop = None if checkpoint is None else checkpoint.stop
    with GradientAccumulator(model, stream.group, reduce) as gradients, InterruptHandler(stop) as interrupts:
        together = model.process_group if world is None and isinstance(model, DistributedDataParallel) else world
        step = _Step(stream, gradients, interrupts, keep, num_targets, progress, together or stream.group)
        if checkpoint is not None:
            step.resume(checkpoint)
        step.forward()
        step.backward()
        total = all_reduce_sum(step.total, stream.group)
        gradients.finish()
    return total


@torch.no_grad()
def streamed_loss(
    model: nn.Module,
    input_ids: Tokens,
    labels: Tokens,
    *,
    chunk_size: int,
    group: ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    num_targets: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    key_mask: None = None,
) -> Tensor:
    """The mean loss of :func:`streamed_backward` without gradients, for evaluation over any length. Same arguments."""
    _refuse_mask(key_mask)
    checks.callback("progress", progress)
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens)
    warn_unshifted_text(input_ids, labels)
    targets, carry, meter = stream.targets(num_targets), stream.first_carry(), stream.new_progress_meter()
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for chunk, ids, chunk_labels in stream.tokens.read(range(stream.tokens.count)):
        h, carry = stream.hidden(ids, carry, chunk)
        total += stream.model.loss(h, chunk_labels, num_targets=targets).double()
        if progress is not None:
            progress(meter.chunk_done("forward", chunk.index + 1))
    return all_reduce_sum(total, stream.group)


@torch.no_grad()
def streamed_prompt(
    model: nn.Module, input_ids: Tokens, *, chunk_size: int, group: ProcessGroup | None = None, key_mask: None = None
) -> tuple[Tensor, ModelCarry]:
    """Prefill a prompt of any length: the logits of the token that follows it, and the carry to continue from.

    Args:
        model, chunk_size, group: as for :func:`streamed_backward`.
        input_ids: ``[B, T]`` integers.
        key_mask: must be None. For prompts of several lengths use ``race_dist.models.prefill(model, ids, key_mask=...)``.

    Returns:
        ``[B, vocab]``, and the carry after the last token (for ``model.hidden``), both on every rank.
    """
    if key_mask is not None:
        raise ValueError(
            "streamed_prompt takes no key_mask: prefill prompts of several lengths with "
            "race_dist.models.prefill(model, ids, key_mask=...)"
        )
    stream = _Stream(model, input_ids, input_ids, chunk_size, group, None)
    carry = stream.first_carry()
    for chunk, ids, _ in stream.tokens.read(range(stream.tokens.count)):
        h, carry = stream.hidden(ids, carry, chunk)
    last = h[:, -1] if h.shape[1] else h.new_zeros(h.shape[0], h.shape[2])
    if stream.group is not None:  # shards of a short last chunk may be empty: only the last rank with rows has the last token
        held = max_over_ranks([torch.distributed.get_rank(stream.group) if h.shape[1] else -1], stream.group)[0]
        mine = torch.distributed.get_rank(stream.group) == held
        last = all_reduce_sum(last if mine else torch.zeros_like(last), stream.group)
    return stream.model.logits(last), carry


def _refuse_mask(key_mask: object) -> None:
    if key_mask is not None:
        raise ValueError(
            "key_mask: streamed steps take no padding; lay the texts one after the other in one row and give "
            "their boundaries as cu_seqlens"
        )


class _Stream:
    """One sequence in chunks, and the model that runs over them."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tokens,
        labels: Tokens,
        chunk_size: int,
        group: ProcessGroup | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a race_dist.models.DecoderLM; got {checks.typed_repr(model)}")
        inner = unwrap_model(model)
        if not isinstance(inner, DecoderLM):
            raise TypeError(f"model must be a race_dist.models.DecoderLM; got {type(inner).__name__}")
        for kind in kinds_in(inner.config.layer_kinds):
            if not kind.fixed_size_carry:
                raise ValueError(
                    f"a {kind.adjective} layer cannot be streamed: its carry is {kind.carry_text}; "
                    f"layer_pattern = {inner.config.layer_pattern!r} may hold {streamable_letters()}"
                )
        if inner.norm.weight.is_meta:
            raise ValueError(
                "model is on the meta device, where its weights have no values: give them some with "
                "model.to_empty(device=...) and model.initialize()"
            )
        self.model, self.device = inner, inner.norm.weight.device
        self.group = group if group_size(group) > 1 else None
        self.tokens = ChunkedTokens(
            input_ids, labels, chunk_size, self.group, cu_seqlens, vocab_size=inner.config.vocab_size, device=self.device
        )
        self.packed = cu_seqlens is not None
        self.documents = "one" if cu_seqlens is None else json_digest({"cu_seqlens": cu_seqlens.tolist()})
        self.compiled = any(m._compiled_call_impl is not None for m in inner.modules())

    def new_progress_meter(self) -> ProgressMeter:
        """A new progress meter."""
        return ProgressMeter(self.device, self.tokens.count, self.tokens.length, self.tokens.batch, self.tokens.step)

    def targets(self, given: int | None) -> Tensor:
        """The divisor of the summed loss, on the device."""
        given = None if given is None else checks.integer("num_targets", given, minimum=1, maximum=2**53)
        return torch.tensor(self.tokens.count_targets() if given is None else given, device=self.device)

    def first_carry(self) -> ModelCarry:
        """The carry of no tokens. Sketches are float64, because they sum over the whole sequence."""
        kind, weights = self.device.type, self.model.norm.weight.dtype
        narrow = torch.is_autocast_enabled(kind) and weights != torch.float64
        return self.model.zero_carry(
            self.tokens.batch, dtype=torch.get_autocast_dtype(kind) if narrow else weights, state_dtype=torch.float64
        )

    def hidden(self, ids: Tensor, carry: ModelCarry, chunk: Chunk) -> tuple[Tensor, ModelCarry]:
        """The hidden states of a chunk and the carry after it."""
        h, after = self.model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=self.group)
        assert after is not None
        return h, after


class _Step:
    """A running step: everything that changes from chunk to chunk, which is also what a checkpoint stores.

    Attributes:
        phase, done: the number of chunks done in the current phase.
        carry: forward: the carry after the last chunk that is done; backward: the carry at its start.
        grad_carry: the gradients of that carry's tensors.
        total: this rank's share of the mean loss, float64.
    """

    def __init__(
        self,
        stream: _Stream,
        gradients: GradientAccumulator,
        interrupts: InterruptHandler,
        keep: Keep,
        num_targets: int | None,
        progress: Callable[[Progress], None] | None,
        world: ProcessGroup | None,
    ) -> None:
        _check_keep(keep, stream)
        checks.callback("progress", progress)
        self.world = world
        self.stream, self.gradients, self.interrupts, self.keep, self.progress = stream, gradients, interrupts, keep, progress
        self.targets, self.progress_meter = stream.targets(num_targets), stream.new_progress_meter()
        self.phase, self.done, self.carry = "forward", 0, stream.first_carry()
        self.carries = CarryStack(keep, self.carry, stream.tokens.count)
        self.carries.push(self.carry)
        self.grad_carry: list[Tensor | None] = [None] * len(self.carry.tensors())
        self.total = torch.zeros((), dtype=torch.float64, device=stream.device)
        self.store: StepStore | None = None

    def forward(self) -> None:
        """Store the carry at the start of each chunk. The last chunk is skipped: nothing reads the carry after it."""
        if self.phase != "forward":
            return
        for chunk, ids, _ in self.stream.tokens.read(range(self.done, self.stream.tokens.count - 1)):
            self.carry = self._forward_chunk(chunk, ids)
            self.carries.push(self.carry)
            self._chunk_done("forward", chunk.index + 1)
        self.phase, self.done = "backward", 0

    def _forward_chunk(self, chunk: Chunk, ids: Tensor) -> ModelCarry:
        """The carry after a chunk, detached from its autograd graph."""
        with torch.set_grad_enabled(self.stream.compiled):  # a compiled graph must round as in the backward phase
            _, after = self.stream.hidden(ids, carry_leaves(self.carry)[0], chunk)
        return after.with_tensors(tuple(t.detach() for t in after.tensors()))

    def backward(self) -> None:
        """Accumulate the gradients from the last chunk to the first."""
        tokens = self.stream.tokens
        for chunk, ids, labels in tokens.read(range(tokens.count - 1 - self.done, -1, -1)):
            start = self.carries.pop()
            if self.keep == "subtract":
                is_last = chunk.index == tokens.count - 1  # its carry was kept
                start = self.carry if is_last else subtract(self.stream.model, ids, self.carry, start, self.stream.group)
            self.carry = start
            self._backward_chunk(chunk, ids, labels)
            self._chunk_done("backward", tokens.count - chunk.index)

    def _backward_chunk(self, chunk: Chunk, ids: Tensor, labels: Tensor) -> None:
        torch.clear_autocast_cache()  # do not reuse weights that were cast without gradients
        self.gradients.begin_chunk(last=chunk.index == 0)
        carry, leaves = carry_leaves(self.carry)
        with torch.enable_grad():
            h, after = self.stream.hidden(ids, carry, chunk)
            loss = self.stream.model.loss(h, labels, num_targets=self.targets)
        roots: list[Tensor] = [loss]
        seeds: list[Tensor | None] = [None]
        for tensor, gradient in zip(after.tensors(), self.grad_carry, strict=True):
            if gradient is not None and tensor.requires_grad:
                roots.append(tensor)
                seeds.append(gradient)
        torch.autograd.backward(roots, seeds)
        self.total += loss.detach().double()
        self.gradients.collect()
        self.grad_carry = [None if leaf is None or leaf.grad is None else leaf.grad for leaf in leaves]

    def _chunk_done(self, phase: str, done: int) -> None:
        """Report progress; store the step and stop where that is due."""
        self.phase, self.done = phase, done
        report = self.progress_meter.chunk_done(phase, done)
        due = self.store is not None and self.store.due()
        stop, due = (bool(v) for v in max_over_ranks([self.interrupts.requested(), due], self.world))
        finished = phase == "backward" and done == self.stream.tokens.count
        if self.store is not None and (stop or due or finished):
            self._save(self.store)
        if self.progress is not None:
            self.progress(report)
        if stop and not finished:
            self._stop(report)

    def _stop(self, report: Progress) -> NoReturn:
        where = f"interrupted after {report.chunk} of {report.chunks} chunks of the {report.phase} phase"
        if self.store is None:
            raise StepInterrupted(f"{where}; nothing of this step is kept (use checkpoint=)")
        if self.store.problem is not None:
            rest = f"; the same call resumes from what was stored before in {self.store.folder}" if self.store.stored else ""
            raise StepInterrupted(f"{where}, which could not be stored ({self.store.problem}){rest}")
        raise StepInterrupted(f"{where}; stored in {self.store.folder}: the same call resumes from there")

    # --- storing -------------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: StepCheckpoint) -> None:
        """Store the step from now on; first resume what is stored of it."""
        if self.gradients.sharded:
            raise ValueError(
                "a step under FSDP2 cannot be stored while it runs: FSDP2 holds the gradients of chunks itself; "
                "leave out checkpoint=, or use DDP or no wrapper"
            )
        tokens = self.stream.tokens
        facts: Mapping[str, str] = {
            "text": tokens_digest(tokens.ids),
            "labels": tokens_digest(tokens.labels),
            "chunk size": str(tokens.step),
            "number of ranks": f"{group_size(self.stream.group)} of {group_size(self.world)}",
            "model": self.stream.model.config.model_dump_json(),
            "set of weights": weights_digest(self.stream.model),
            "number of targets": str(int(self.targets)),
            "set of documents": self.stream.documents,
            "way to keep carries": self.keep,
            "precision": str(self.carry.tensors()[-2].dtype),
        }
        self.store = StepStore(checkpoint, facts, self.world)
        saved = self.store.load()
        if saved is not None:
            self._restore(saved)

    def _save(self, store: StepStore) -> None:
        tensors = {"carry": pack(self.carry.tensors()), "total": self.total, **self.gradients.tensors()}
        tensors |= {f"incoming.{i}": g for i, g in enumerate(self.grad_carry) if g is not None}
        store.save(self.phase, self.done, tensors, self.carries.rows)

    def _restore(self, saved: SavedStep) -> None:
        device, tensors = self.stream.device, saved.tensors
        self.phase, self.done = saved.phase, saved.done
        self.total = tensors["total"].to(device)
        self.carry = self.carry.with_tensors(unpack(tensors["carry"].to(device), self.carry.tensors()))
        self.grad_carry = [
            tensors[f"incoming.{i}"].to(device) if f"incoming.{i}" in tensors else None for i in range(len(self.grad_carry))
        ]
        self.gradients.restore(tensors)
        self.carries = CarryStack(self.keep, self.carry, self.stream.tokens.count)
        left = saved.done + 1 if saved.phase == "forward" else self.stream.tokens.count - saved.done
        if left:  # a step that has ended needs no carries
            assert saved.carries is not None
            self.carries.restore(saved.carries[:left])


def _check_keep(keep: str, stream: _Stream) -> None:
    checks.choice("keep", keep, KEEPS)
    if keep != "subtract":
        return
    if stream.packed:
        raise ValueError(
            'keep="subtract" does not go with cu_seqlens: where a document begins, the state before it is lost and '
            'cannot be recovered by subtraction; use keep="host"'
        )
    config = stream.model.config
    for kind in kinds_in(config.layer_kinds):
        reason = kind.why_not_subtracted(config)
        if reason is not None:
            raise ValueError(f'keep="subtract" {reason}; use keep="host"')
