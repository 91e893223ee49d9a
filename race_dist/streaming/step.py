"""Exact training of a whole model with activation memory that does not grow with the sequence.

A causal model whose only path between tokens is what its layers carry can be run piece by piece: forward over the
chunks, keeping the carry at each chunk's start; then backward over the chunks in reverse, computing one chunk's
activations again at a time and handing the gradient of its incoming carry to the chunk before. The gradients are those
of the whole sequence, nothing is truncated. The price is one more forward pass, that of full activation checkpointing.

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
from race_dist.parallel import all_reduce_sum, group_size
from race_dist.streaming.carries import KEEPS, Carries, Keep, as_leaves, subtract
from race_dist.streaming.checkpoint import Saved, StepCheckpoint, Store, tokens_digest, weights_digest
from race_dist.streaming.chunks import Chunk, Text, Tokens
from race_dist.streaming.gradients import Gradients, Reduce, unwrapped
from race_dist.streaming.progress import Interrupts, Pace, Progress, StepInterrupted


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

    Blocks that are compiled run one graph in both phases, so that they round alike; a last chunk shorter than the others
    compiles another one. Ctrl-C ends the step at the next chunk's edge, on all ranks.

    Args:
        model: a DecoderLM of R and W layers, by itself, in DistributedDataParallel or under FSDP2 (``fully_shard``).
        input_ids: ``[B, T]`` integers, the full sequence on every rank: a tensor, or a NumPy array such as a memory
            map far larger than memory.
        labels: ``[B, T]`` integers, ``labels[t]`` the target of position t (the token after it); -100 is ignored.
        chunk_size: tokens (of each row) whose activations exist at a time on one rank. With W ranks, super-chunks of
            ``W * chunk_size`` tokens are sharded over the ranks, so that no rank waits for another's whole shard.
        group: the ranks that share the sequence. Gradients are summed over it, once, after the last chunk.
        cu_seqlens: ``[N + 1]`` int, packed documents (B = 1).
        num_targets: what the summed loss is divided by; None: the labels that count.
        reduce: what becomes of the gradients once, after the last chunk. "mean": summed over ``group`` and averaged over
            replicas, as DDP and FSDP2 do. "sum": summed over replicas too; FSDP2 is then to have been told so
            (``set_gradient_divide_factor(1)``). "none": they stay this rank's share; under FSDP2 they wait for a later call.
        keep: where the carries at chunk starts wait: "device", "host" (pinned memory, copied beside the work), or "subtract":
            sketches are recovered by taking away what each chunk has added (no decay, no packed documents; about one more
            forward pass).
        checkpoint: store the step in its middle, and resume it from there.
        world: ranks that make this call together over as many chunks, replicas included: they store and stop at the same
            chunk. None: those of DDP, or else of ``group``.
        progress: called after every chunk.
        key_mask: None. Texts of several lengths are packed documents (``cu_seqlens``) here, not rows with padding.

    Returns:
        The mean over all targets, on every rank; 0 (with gradients 0) where no target counts.

    Raises:
        ValueError: the model has a layer that cannot be streamed, a shape or token does not fit, ``chunk_size < 1``, or
            what the checkpoint's folder holds is not of this step, or damaged (a DamagedStepError, which names the file).
            Labels that are the input are warned of.
        StepInterrupted: Ctrl-C, or the checkpoint's ``stop``. Gradients are then as they were before the call.
    """
    _refuse_mask(key_mask)
    if checkpoint is not None:
        checks.instance("checkpoint", checkpoint, StepCheckpoint, 'give StepCheckpoint("FOLDER")')
    check_group(world, "world")
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens)
    warn_unshifted_text(input_ids, labels)
    stop = None if checkpoint is None else checkpoint.stop
    with Gradients(model, stream.group, reduce) as gradients, Interrupts(stop) as interrupts:
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
    """The mean loss of :func:`streamed_backward` without gradients: evaluation over any length. Same arguments."""
    _refuse_mask(key_mask)
    checks.callback("progress", progress)
    stream = _Stream(model, input_ids, labels, chunk_size, group, cu_seqlens)
    warn_unshifted_text(input_ids, labels)
    targets, carry, pace = stream.targets(num_targets), stream.first_carry(), stream.pace()
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for chunk, ids, wanted in stream.text.read(range(stream.text.count)):
        h, carry = stream.hidden(ids, carry, chunk)
        total += stream.model.loss(h, wanted, num_targets=targets).double()
        if progress is not None:
            progress(pace.chunk_done("forward", chunk.index + 1))
    return all_reduce_sum(total, stream.group)


@torch.no_grad()
def streamed_prompt(
    model: nn.Module, input_ids: Tokens, *, chunk_size: int, group: ProcessGroup | None = None, key_mask: None = None
) -> tuple[Tensor, ModelCarry]:
    """Read a prompt of any length: the logits of the token that follows it, and the carry to go on from.

    Args:
        model, chunk_size, group: as for :func:`streamed_backward`.
        input_ids: ``[B, T]`` integers.
        key_mask: None. Prompts of several lengths: ``race_dist.models.prefill(model, ids, key_mask=...)``.

    Returns:
        ``[B, vocab]``, and the carry behind the last token (for ``model.hidden``), both on every rank.
    """
    if key_mask is not None:
        raise ValueError(
            "streamed_prompt takes no key_mask: read prompts of several lengths with "
            "race_dist.models.prefill(model, ids, key_mask=...)"
        )
    stream = _Stream(model, input_ids, input_ids, chunk_size, group, None)
    carry = stream.first_carry()
    for chunk, ids, _ in stream.text.read(range(stream.text.count)):
        h, carry = stream.hidden(ids, carry, chunk)
    last = h[:, -1] if h.shape[1] else h.new_zeros(h.shape[0], h.shape[2])
    if stream.group is not None:  # shards of a short last chunk may be empty: the last rank with rows has the last token
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
    """One sequence, cut into chunks, and the model that runs over them."""

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
        inner = unwrapped(model)
        if not isinstance(inner, DecoderLM):
            raise TypeError(f"model must be a race_dist.models.DecoderLM; got {type(inner).__name__}")
        if "S" in inner.config.layer_kinds:
            raise ValueError(
                f"a full-softmax layer cannot be streamed: its carry is every key and value so far; "
                f"layer_pattern = {inner.config.layer_pattern!r} may hold R and W"
            )
        if inner.norm.weight.is_meta:
            raise ValueError(
                "model is on the meta device, where its weights have no values: give them some with "
                "model.to_empty(device=...) and model.initialize()"
            )
        self.model, self.device = inner, inner.norm.weight.device
        self.group = group if group_size(group) > 1 else None
        self.text = Text(
            input_ids, labels, chunk_size, self.group, cu_seqlens, vocab_size=inner.config.vocab_size, device=self.device
        )
        self.packed = cu_seqlens is not None
        self.documents = "one" if cu_seqlens is None else json_digest({"cu_seqlens": cu_seqlens.tolist()})
        self.compiled = any(m._compiled_call_impl is not None for m in inner.modules())

    def pace(self) -> Pace:
        """A count of chunks that begins now."""
        return Pace(self.device, self.text.count, self.text.length, self.text.batch, self.text.step)

    def targets(self, given: int | None) -> Tensor:
        """What the summed loss is divided by, on the device."""
        given = None if given is None else checks.integer("num_targets", given, minimum=1, maximum=2**53)
        return torch.tensor(self.text.count_targets() if given is None else given, device=self.device)

    def first_carry(self) -> ModelCarry:
        """No tokens yet. The sketches are float64: theirs are sums over the whole sequence."""
        kind, weights = self.device.type, self.model.norm.weight.dtype
        narrow = torch.is_autocast_enabled(kind) and weights != torch.float64
        return self.model.zero_carry(
            self.text.batch, dtype=torch.get_autocast_dtype(kind) if narrow else weights, state_dtype=torch.float64
        )

    def hidden(self, ids: Tensor, carry: ModelCarry, chunk: Chunk) -> tuple[Tensor, ModelCarry]:
        """The chunk's hidden states and the carry behind it."""
        h, after = self.model.hidden(ids, carry, cu_seqlens=chunk.cu_seqlens, group=self.group)
        assert after is not None
        return h, after


class _Step:
    """A step under way: everything that changes from chunk to chunk, which is also what is stored.

    Attributes:
        phase, done: chunks done of a phase.
        carry: behind the last chunk of the forward phase; then at the start of the chunk that was done last.
        incoming: gradients of that carry's tensors.
        total: this rank's share of the mean loss, float64.
    """

    def __init__(
        self,
        stream: _Stream,
        gradients: Gradients,
        interrupts: Interrupts,
        keep: Keep,
        num_targets: int | None,
        progress: Callable[[Progress], None] | None,
        world: ProcessGroup | None,
    ) -> None:
        _check_keep(keep, stream)
        checks.callback("progress", progress)
        self.world = world
        self.stream, self.gradients, self.interrupts, self.keep, self.progress = stream, gradients, interrupts, keep, progress
        self.targets, self.pace = stream.targets(num_targets), stream.pace()
        self.phase, self.done, self.carry = "forward", 0, stream.first_carry()
        self.carries = Carries(keep, self.carry, stream.text.count)
        self.carries.push(self.carry)
        self.incoming: list[Tensor | None] = [None] * len(self.carry.tensors())
        self.total = torch.zeros((), dtype=torch.float64, device=stream.device)
        self.store: Store | None = None

    def forward(self) -> None:
        """Fill in the carry at each chunk's start. The last chunk is not run: nothing reads what it hands on."""
        if self.phase != "forward":
            return
        for chunk, ids, _ in self.stream.text.read(range(self.done, self.stream.text.count - 1)):
            self.carry = self._forward_chunk(chunk, ids)
            self.carries.push(self.carry)
            self._chunk_done("forward", chunk.index + 1)
        self.phase, self.done = "backward", 0

    def _forward_chunk(self, chunk: Chunk, ids: Tensor) -> ModelCarry:
        """The carry behind a chunk; its graph, if there is one, ends here."""
        with torch.set_grad_enabled(self.stream.compiled):  # a compiled graph rounds as it does in the backward phase
            _, after = self.stream.hidden(ids, as_leaves(self.carry)[0], chunk)
        return after.with_tensors(tuple(t.detach() for t in after.tensors()))

    def backward(self) -> None:
        """Add up the gradients, from the last chunk to the first."""
        text = self.stream.text
        for chunk, ids, labels in text.read(range(text.count - 1 - self.done, -1, -1)):
            start = self.carries.pop()
            if self.keep == "subtract":
                first = chunk.index == text.count - 1  # whose carry is at hand
                start = self.carry if first else subtract(self.stream.model, ids, self.carry, start, self.stream.group)
            self.carry = start
            self._backward_chunk(chunk, ids, labels)
            self._chunk_done("backward", text.count - chunk.index)

    def _backward_chunk(self, chunk: Chunk, ids: Tensor, labels: Tensor) -> None:
        torch.clear_autocast_cache()  # weights cast without gradients must not be taken for these
        self.gradients.begin_chunk(last=chunk.index == 0)
        carry, leaves = as_leaves(self.carry)
        with torch.enable_grad():
            h, after = self.stream.hidden(ids, carry, chunk)
            loss = self.stream.model.loss(h, labels, num_targets=self.targets)
        roots: list[Tensor] = [loss]
        seeds: list[Tensor | None] = [None]
        for tensor, gradient in zip(after.tensors(), self.incoming, strict=True):
            if gradient is not None and tensor.requires_grad:
                roots.append(tensor)
                seeds.append(gradient)
        torch.autograd.backward(roots, seeds)
        self.total += loss.detach().double()
        self.gradients.collect()
        self.incoming = [None if leaf is None or leaf.grad is None else leaf.grad for leaf in leaves]

    def _chunk_done(self, phase: str, done: int) -> None:
        """Report, store and stop, each where it is asked for."""
        self.phase, self.done = phase, done
        report = self.pace.chunk_done(phase, done)
        due = self.store is not None and self.store.due()
        stop, due = (bool(v) for v in max_over_ranks([self.interrupts.wanted(), due], self.world))
        finished = phase == "backward" and done == self.stream.text.count
        if self.store is not None and (stop or due or finished):
            self._save(self.store)
        if self.progress is not None:
            self.progress(report)
        if stop and not finished:
            self._stop(report)

    def _stop(self, report: Progress) -> NoReturn:
        where = f"interrupted after {report.chunk} of {report.chunks} chunks of the {report.phase} phase"
        if self.store is None:
            raise StepInterrupted(f"{where}; nothing of this step is kept (checkpoint= would)")
        if self.store.problem is not None:
            rest = f"; the same call goes on from what was stored before in {self.store.folder}" if self.store.stored else ""
            raise StepInterrupted(f"{where}, which could not be stored ({self.store.problem}){rest}")
        raise StepInterrupted(f"{where}; stored in {self.store.folder}: the same call goes on from there")

    # --- storing -------------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: StepCheckpoint) -> None:
        """Store the step from now on; first go on from what is stored of it."""
        if self.gradients.sharded:
            raise ValueError(
                "a step under FSDP2 cannot be stored in its middle: FSDP2 holds the gradients of chunks itself; "
                "leave out checkpoint=, or use DDP or no wrapper"
            )
        text = self.stream.text
        facts: Mapping[str, str] = {
            "text": tokens_digest(text.ids),
            "labels": tokens_digest(text.labels),
            "chunk size": str(text.step),
            "number of ranks": f"{group_size(self.stream.group)} of {group_size(self.world)}",
            "model": self.stream.model.config.model_dump_json(),
            "set of weights": weights_digest(self.stream.model),
            "number of targets": str(int(self.targets)),
            "set of documents": self.stream.documents,
            "way to keep carries": self.keep,
            "precision": str(self.carry.tensors()[-2].dtype),
        }
        self.store = Store(checkpoint, facts, self.world)
        saved = self.store.load()
        if saved is not None:
            self._restore(saved)

    def _save(self, store: Store) -> None:
        tensors = {"carry": pack(self.carry.tensors()), "total": self.total, **self.gradients.tensors()}
        tensors |= {f"incoming.{i}": g for i, g in enumerate(self.incoming) if g is not None}
        store.save(self.phase, self.done, tensors, self.carries.rows)

    def _restore(self, saved: Saved) -> None:
        device, tensors = self.stream.device, saved.tensors
        self.phase, self.done = saved.phase, saved.done
        self.total = tensors["total"].to(device)
        self.carry = self.carry.with_tensors(unpack(tensors["carry"].to(device), self.carry.tensors()))
        self.incoming = [
            tensors[f"incoming.{i}"].to(device) if f"incoming.{i}" in tensors else None for i in range(len(self.incoming))
        ]
        self.gradients.restore(tensors)
        self.carries = Carries(self.keep, self.carry, self.stream.text.count)
        left = saved.done + 1 if saved.phase == "forward" else self.stream.text.count - saved.done
        if left:  # nothing is left of a step that has ended
            assert saved.carries is not None
            self.carries.restore(saved.carries[:left])


def _check_keep(keep: str, stream: _Stream) -> None:
    checks.choice("keep", keep, KEEPS)
    if keep != "subtract":
        return
    if stream.packed:
        raise ValueError(
            'keep="subtract" does not go with cu_seqlens: where a document begins, nothing of the state before '
            'it is left to subtract from; use keep="host"'
        )
    config = stream.model.config
    if "R" in config.layer_kinds and config.race.decay != "none":
        raise ValueError(
            f'keep="subtract" needs race.decay = "none", but it is {config.race.decay!r}: what has decayed '
            'cannot be brought back; use keep="host"'
        )
