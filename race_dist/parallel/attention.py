"""Context-parallel attention: each rank computes its shard, and the ranks exchange the states between the shards.

Forward: every local call sums up its keys and values (``start_forward``), the ranks exchange the sums, and every local call
finishes from the state that enters it (``finish_forward``). The backward pass is the mirror image. Heads are split into two
groups, so that the exchange of one group overlaps the computation of the other:

    start(group 0)  start(group 1)        finish(group 0)        finish(group 1)
                    [exchange of group 0] [exchange of group 1]

Within one node heads are not split: there an exchange takes less time than the host needs to launch everything twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank, group_size, start_all_reduce
from race_dist.distributed.consistency import check_same_call
from race_dist.distributed.eager import eager
from race_dist.ops.autograd import autocast_disabled
from race_dist.ops.backends import Backend
from race_dist.ops.inputs import AttentionInputs, ForwardResult, GradBuffers, Gradients, InputTensors, Started, take
from race_dist.parallel.packed_documents import PackedDocumentsExchange
from race_dist.parallel.scan import Algorithm
from race_dist.parallel.sharding import Layout, check_layout, check_zigzag
from race_dist.parallel.state_exchange import PrefixExchange, StateExchange, SumExchange
from race_dist.rank_environment import ranks_per_node
from race_dist.sketch import SketchState


@eager
def context_parallel_attention(
    inputs: AttentionInputs,
    group: ProcessGroup,
    layout: str,
    backend: Backend,
    *,
    output_final: bool = True,
    algorithm: Algorithm = "auto",
) -> tuple[Tensor, SketchState | None]:
    """The attention over a sequence that is sharded over the ranks of ``group``.

    Differentiable in q, k, v, planes, beta, log_decay and the initial state. The loss is the sum of the ranks' losses:
    gradients of q, k, v and log_decay are complete, those of planes, beta and the initial state are this rank's share.

    Args:
        inputs: q, k, v, log_decay and key_mask are this rank's shard; cu_seqlens and initial are those of the whole
            sequence, the same on every rank.
        group: the ranks that hold the sequence, in order.
        layout: "contiguous" (shards of any lengths) or "zigzag".
        backend: computes the local calls.
        output_final: whether to return the final state; without it its exchange is saved.
        algorithm: of the scan, as for :func:`race_dist.parallel.exclusive_scan`.

    Returns:
        ``out [B, T, Hq, Dv]`` of this rank's rows, and the final state of the whole sequence, the same on every rank.

    Raises:
        ValueError: no such layout, shards that do not fit ``cu_seqlens`` or the layout, or calls that differ between
            ranks (compared at every call on the CPU, at the first of its kind on CUDA).
        RankFailure: another rank died or did not make the call.
    """
    layout = check_layout(layout)
    offset = check_same_attention(inputs, group, layout, backend, output_final, algorithm)
    call = ContextParallelCall(group, layout, backend, offset, output_final, algorithm)
    out, *final = _ContextParallelAttention.apply(inputs, call, *inputs.flatten()[0])
    return out, SketchState.unchecked(*final) if final else None


def check_same_attention(
    inputs: AttentionInputs,
    group: ProcessGroup,
    layout: Layout,
    backend: Backend,
    output_final: bool,
    algorithm: Algorithm,
) -> int | Tensor:
    """Compare the calls of the ranks; return the number of rows on earlier ranks where documents are packed, else 0."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    length, on_cpu = q.shape[1], q.device.type == "cpu"
    documents: object = None
    if cu_seqlens is not None:
        documents = cu_seqlens.numel() - 1
        if on_cpu:
            documents = f"{documents} (digest {hashlib.sha256(cu_seqlens.numpy().tobytes()).hexdigest()[:12]})"
    shape = lambda x: [x.shape[0], "T", *x.shape[2:]]
    facts = {
        "q": shape(q),
        "k": shape(inputs.k),
        "v": shape(inputs.v),
        "dtype": q.dtype,
        "planes": list(inputs.planes.shape),
        "causal": inputs.causal,
        "normalization": inputs.normalization,
        "layout": layout,
        "documents": documents,
        "log_decay": inputs.log_decay is not None,
        "initial_state": None if inputs.initial is None else inputs.state_dtype,
        "backend": getattr(backend, "__name__", type(backend).__name__),
        "output_final_state": output_final,
        "algorithm": algorithm,
        "ranks_per_node": ranks_per_node(),
        "requires_grad": torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.flatten()[0]),
    }
    need_offset = layout == "contiguous" and cu_seqlens is not None
    lengths = check_same_call("race_attention", facts, group, q.device, length=length, need_lengths=need_offset)
    if on_cpu and lengths is not None:
        _check_lengths(lengths.tolist(), layout, cu_seqlens)
    elif layout == "zigzag":
        check_zigzag(length * group_size(group), group_size(group))
    if not need_offset:
        return 0
    assert lengths is not None
    before = lengths[: group_rank(group)].sum()
    return int(before) if on_cpu else before


def _check_lengths(lengths: list[int], layout: Layout, cu_seqlens: Tensor | None) -> None:
    """Check the lengths of all shards; every rank comes to the same result."""
    world, total = len(lengths), sum(lengths)
    if layout == "zigzag":
        if len(set(lengths)) > 1:
            raise ValueError(f"zigzag shards must have equal lengths; the ranks hold {lengths} rows")
        check_zigzag(total, world, cu_seqlens)
    if cu_seqlens is not None and total != cu_seqlens[-1]:
        raise ValueError(
            f"cu_seqlens must be that of the whole sequence: it ends at {int(cu_seqlens[-1])}, but the ranks "
            f"hold {lengths}, together {total} rows"
        )


@dataclass(frozen=True)
class ContextParallelCall:
    """What determines a call besides its inputs."""

    group: ProcessGroup
    layout: Layout
    backend: Backend
    offset: int | Tensor
    output_final: bool
    algorithm: Algorithm

    def exchange(self, inputs: AttentionInputs) -> StateExchange:
        """The exchange of states that such inputs need."""
        if inputs.cu_seqlens is not None and self.layout == "contiguous":
            return PackedDocumentsExchange(self.group, inputs, self.offset, self.algorithm)
        if inputs.causal:
            return PrefixExchange(self.group, self.layout, inputs, self.algorithm)
        return SumExchange(self.group, inputs)


class SavedCall(NamedTuple):
    """Tensors that one local call keeps for its backward pass, besides its inputs and its rows of the output."""

    den: Tensor
    states: Tensor
    final_mass: Tensor
    final_values: Tensor
    initial_mass: Tensor
    initial_values: Tensor

    @classmethod
    def flatten(cls, result: ForwardResult, initial: SketchState) -> SavedCall:
        """The tensors of a local call's result and of the state that entered it."""
        _, den, states, final_mass, final_values = result.flatten()
        return cls(den, states, final_mass, final_values, initial.mass, initial.values)

    @classmethod
    def take_all(cls, values: Iterator[Tensor]) -> list[SavedCall]:
        """Read the tensors of all local calls back."""
        tensors = list(values)
        return [take(cls, iter(tensors[i:])) for i in range(0, len(tensors), len(cls._fields))]

    def unflatten(self, out: Tensor) -> tuple[ForwardResult, SketchState]:
        """The inverse of :meth:`flatten`."""
        final = SketchState.unchecked(self.final_mass, self.final_values)
        return ForwardResult(out, self.den, self.states, final), SketchState.unchecked(self.initial_mass, self.initial_values)

    def copy_states(self) -> SavedCall:
        """With its own copies of the final and initial state, which may be views of each other or of the inputs."""
        return self._replace(
            final_mass=self.final_mass.clone(),
            final_values=self.final_values.clone(),
            initial_mass=self.initial_mass.clone(),
            initial_values=self.initial_values.clone(),
        )


class ContextParallelResult(NamedTuple):
    """Result of this rank's forward pass.

    Attributes:
        out: ``[B, T, Hq, Dv]``.
        final: tensors of the final state of the whole sequence; empty unless asked for.
        saved: of each local call, group of heads after group of heads.
    """

    out: Tensor
    final: tuple[Tensor, ...]
    saved: list[SavedCall]

    def flatten(self) -> list[Tensor]:
        """All tensors; :meth:`unflatten` is the inverse."""
        return [self.out, *self.final, *(t for saved in self.saved for t in saved)]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], num_final: int) -> ContextParallelResult:
        """The inverse of :meth:`flatten`; ``num_final`` is the number of the final state's tensors."""
        values = iter(tensors)
        out, final = next(values), tuple(islice(values, num_final))
        return cls(out, final, SavedCall.take_all(values))


class _ContextParallelAttention(torch.autograd.Function):
    """``(inputs, call, *InputTensors) -> (out, *final)``."""

    @staticmethod
    def forward(ctx: Any, inputs: AttentionInputs, call: ContextParallelCall, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        result = run_forward(inputs, call)
        ctx.call, ctx.options = call, inputs.flatten()[1]
        ctx.save_for_backward(*tensors, *result._replace(final=()).flatten())
        return result.out, *result.final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *dfinal: Tensor) -> tuple[Tensor | None, ...]:
        values = iter(ctx.saved_tensors)  # read once: activation checkpointing allows no second time
        inputs = AttentionInputs.unflatten(take(InputTensors, values), ctx.options)
        result = ContextParallelResult.unflatten(list(values), num_final=0)
        needed = ctx.needs_input_grad[2:]
        need_planes = bool(take(InputTensors, iter(needed)).planes)
        gradients = run_backward(inputs, ctx.call, result, dout, dfinal, need_planes=need_planes)
        return None, None, *(g if need else None for g, need in zip(gradients, needed))


def run_forward(inputs: AttentionInputs, call: ContextParallelCall) -> ContextParallelResult:
    """The forward pass of this rank."""
    exchange, backend, groups = call.exchange(inputs), call.backend, head_groups(inputs, call.group)
    out = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])
    started: list[list[Started]] = []
    pending, finals, saved = [], [], []
    with autocast_disabled(inputs.q):
        for heads in groups:
            initial, buffers = _initial(heads.inputs), exchange.partition.split(out[:, :, heads.query_heads])
            calls = exchange.partition.calls(heads.inputs, exchange.known_initial(initial))
            started.append([backend.start_forward(local, buffer) for local, buffer in zip(calls, buffers)])
            pending.append(exchange.start_exchange([s.state for s in started[-1]], initial))
        for group_started, finish_exchange in zip(started, pending):
            initials = finish_exchange()
            results = [backend.finish_forward(s, initial) for s, initial in zip(group_started, initials)]
            if call.output_final:
                finals.append(_StateSum(exchange.final_share([r.final for r in results]), call.group))
            saved += [SavedCall.flatten(result, initial) for result, initial in zip(results, initials)]
    states = [final.wait().tensors() for final in finals]
    return ContextParallelResult(out, tuple(_concatenate(parts, 1) for parts in zip(*states)), saved)


def run_backward(
    inputs: AttentionInputs,
    call: ContextParallelCall,
    result: ContextParallelResult,
    dout: Tensor,
    dfinal: Sequence[Tensor],
    *,
    need_planes: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of :class:`InputTensors`, None where there can be none."""
    exchange, backend, groups = call.exchange(inputs), call.backend, head_groups(inputs, call.group)
    dfinal_sum = _StateSum(SketchState.unchecked(*dfinal), call.group) if call.output_final else None
    grad_buffers = GradBuffers.empty_like(inputs)
    calls = _backward_calls(exchange, groups, result, dout, grad_buffers)
    started: list[list[Started]] = []
    pending = []
    with autocast_disabled(inputs.q):
        for heads, local_calls in zip(groups, calls):
            started.append(
                [
                    backend.start_backward(c.inputs, c.saved, c.dout, need_planes=need_planes, grad_buffers=c.grad_buffers)
                    for c in local_calls
                ]
            )
            wait_dfinal = partial(_wait_dfinal, dfinal_sum, heads)
            pending.append(exchange.start_reverse_exchange([s.state for s in started[-1]], wait_dfinal))
        gradients = [
            [backend.finish_backward(s, state) for s, state in zip(group_started, finish_exchange())]
            for group_started, finish_exchange in zip(started, pending)
        ]
    merged = _merge(exchange, grad_buffers, gradients)
    if merged.log_decay is not None and dfinal_sum is not None:
        dtotal = dfinal_sum.wait().log_decay
        assert dtotal is not None
        documents = exchange.document_ids(inputs.q.shape[1])
        merged.log_decay.add_(dtotal[:, None] if documents is None else dtotal[documents])
    return merged.flatten()


class _StateSum:
    """The sum of the ranks' shares of a state: one asynchronous all-reduce."""

    def __init__(self, share: SketchState, group: ProcessGroup) -> None:
        self._like = share
        self._pending = start_all_reduce(torch.cat([t.reshape(-1) for t in share.tensors()]), group)

    def wait(self) -> SketchState:
        tensors = self._like.tensors()
        parts = self._pending.wait().split([t.numel() for t in tensors])
        return self._like.with_tensors(tuple(part.view_as(t) for part, t in zip(parts, tensors)))


class _BackwardCall(NamedTuple):
    """Arguments of one local call of the backward pass."""

    inputs: AttentionInputs
    saved: ForwardResult
    dout: Tensor
    grad_buffers: GradBuffers


def _backward_calls(
    exchange: StateExchange,
    groups: Sequence[HeadGroup],
    result: ContextParallelResult,
    dout: Tensor,
    grad_buffers: GradBuffers,
) -> list[list[_BackwardCall]]:
    """The local calls of each group of heads, with their initial states, saved results and views of the buffers."""
    partition, saved_calls, calls = exchange.partition, iter(result.saved), []
    for heads in groups:
        outs, douts, dqs = (partition.split(x[:, :, heads.query_heads]) for x in (result.out, dout, grad_buffers.q))
        dks, dvs = (partition.split(x[:, :, heads.heads]) for x in (grad_buffers.k, grad_buffers.v))
        restored = [next(saved_calls).unflatten(out) for out in outs]
        local_inputs = partition.calls(heads.inputs, [initial for _, initial in restored])
        buffers = [GradBuffers(dq, dk, dv) for dq, dk, dv in zip(dqs, dks, dvs)]
        saved = [result for result, _ in restored]
        calls.append([_BackwardCall(*each) for each in zip(local_inputs, saved, douts, buffers)])
    return calls


def _merge(exchange: StateExchange, grad_buffers: GradBuffers, gradients: Sequence[Sequence[Gradients]]) -> Gradients:
    """The gradients of all local calls as those of the rank's inputs."""

    def sum_calls(name: str) -> Tensor:
        return _concatenate([torch.stack([getattr(g, name) for g in calls]).sum(0) for calls in gradients], 0)

    def merge_log_decay() -> Tensor:
        merge = exchange.partition.merge
        return _concatenate([merge([g.log_decay for g in calls if g.log_decay is not None]) for calls in gradients], 2)

    def merge_initial() -> SketchState:
        share = exchange.initial_gradient_share
        shares = [share([g.initial for g in calls if g.initial is not None]).tensors() for calls in gradients]
        return SketchState.unchecked(*(_concatenate(parts, 1) for parts in zip(*shares)))

    first = gradients[0][0]
    return Gradients(
        *grad_buffers,
        planes=None if first.planes is None else sum_calls("planes"),
        beta=sum_calls("beta"),
        log_decay=None if first.log_decay is None else merge_log_decay(),
        initial=merge_initial(),
    )


def splits_heads(on_gpu: bool, ranks: int, ranks_per_node: int) -> bool:
    """Whether a layer's heads are exchanged in two halves or all at once, which costs less among the GPUs of a node."""
    return not on_gpu or ranks > ranks_per_node


class HeadGroup(NamedTuple):
    """Some key/value heads and their query heads.

    Attributes:
        inputs: views of the heads' inputs.
        heads: key/value heads.
        query_heads: query heads.
    """

    inputs: AttentionInputs
    heads: slice
    query_heads: slice


def head_groups(inputs: AttentionInputs, group: ProcessGroup) -> list[HeadGroup]:
    """Two groups of heads, or one."""
    heads, repeats = inputs.k.shape[2], inputs.q.shape[2] // inputs.k.shape[2]
    split = heads > 1 and splits_heads(inputs.q.is_cuda, group_size(group), ranks_per_node())
    bounds = [0, heads // 2, heads] if split else [0, heads]
    groups = []
    for start, end in zip(bounds, bounds[1:]):
        some, queries = slice(start, end), slice(start * repeats, end * repeats)
        groups.append(HeadGroup(_select_heads(inputs, some, queries), some, queries))
    return groups


def _select_heads(inputs: AttentionInputs, heads: slice, queries: slice) -> AttentionInputs:
    initial = inputs.initial
    return replace(
        inputs,
        q=inputs.q[:, :, queries],
        k=inputs.k[:, :, heads],
        v=inputs.v[:, :, heads],
        planes=inputs.planes[heads],
        beta=inputs.beta[heads],
        log_decay=None if inputs.log_decay is None else inputs.log_decay[:, :, heads],
        initial=None if initial is None else initial.with_tensors(tuple(t[:, heads] for t in initial.tensors())),
    )


def _initial(inputs: AttentionInputs) -> SketchState:
    """The initial state of the whole sequence."""
    if inputs.initial is not None:
        return inputs.initial
    sizes = (inputs.num_states, inputs.k.shape[2], inputs.features, inputs.v.shape[3])
    return SketchState.empty(*sizes, dtype=inputs.state_dtype, device=inputs.q.device)


def _wait_dfinal(dfinal_sum: _StateSum | None, heads: HeadGroup) -> SketchState:
    """The gradient of the final state of the whole sequence, of a group of heads."""
    if dfinal_sum is None:
        return _initial(heads.inputs).zero()
    state = dfinal_sum.wait()
    return SketchState.unchecked(state.mass[:, heads.heads], state.values[:, heads.heads])


def _concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
