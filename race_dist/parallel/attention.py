"""The attention over a group: exchange what enters, run the local call, in the forward pass and in the backward.

Heads go in two halves, so that the exchange of one half runs while the other half computes:

    begin(half 0)  begin(half 1)  finish(half 0)  finish(half 1)
                   [exchange of half 0]  [exchange of half 1]

Not among the GPUs of a node, where an exchange takes less time than the host does to launch everything twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank, group_size, start_all_reduce
from race_dist.distributed.consistency import check_same_call
from race_dist.distributed.eager import eager
from race_dist.ops.autograd import Backend, autocast_disabled
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Gradients, Into
from race_dist.parallel.packed_documents import Documents
from race_dist.parallel.scan import Algorithm
from race_dist.parallel.sharding import Layout, check_layout, check_zigzag
from race_dist.parallel.state_exchange import Prefix, Route, Total
from race_dist.rank_environment import ranks_per_node
from race_dist.sketch import SketchState


@eager
def context_parallel_attention(
    problem: AttentionInputs,
    group: ProcessGroup,
    layout: str,
    backend: Backend,
    *,
    output_final: bool = True,
    algorithm: Algorithm = "auto",
) -> tuple[Tensor, SketchState | None]:
    """The attention over a sequence that the ranks of ``group`` share.

    Differentiable in q, k, v, planes, beta, log_decay and the initial state. The loss is the sum of the ranks' losses:
    gradients of q, k, v and log_decay are whole, those of planes, beta and the initial state are this rank's share.

    Args:
        problem: q, k, v, log_decay and key_mask are this rank's shard; cu_seqlens and initial are those of the whole
            sequence, the same on every rank.
        group: the ranks that hold the sequence, in order.
        layout: "contiguous" (shards of any lengths) or "zigzag".
        backend: computes the local calls.
        output_final: whether the final state is wanted; without it its exchange is saved.
        algorithm: of the scan, as for :func:`race_dist.parallel.exclusive_scan`.

    Returns:
        ``out [B, T, Hq, Dv]`` of this rank's rows, and the final state of the whole sequence, the same on every rank.

    Raises:
        ValueError: no such layout, shards that do not fit ``cu_seqlens`` or the layout, or calls that differ between
            ranks (compared at every call on the CPU, at the first of its kind on CUDA).
        RankFailure: another rank died or did not come.
    """
    layout = check_layout(layout)
    offset = check_same_attention(problem, group, layout, backend, output_final, algorithm)
    p = problem
    initial = (None, None) if p.initial is None else (p.initial.mass, p.initial.values)
    call = Call(group, layout, backend, offset, output_final, algorithm, p.causal, p.normalization)
    out, *final = _GroupAttention.apply(call, p.q, p.k, p.v, p.planes, p.beta, p.log_decay, p.key_mask, p.cu_seqlens, *initial)
    return out, SketchState.unchecked(*final) if final else None


def check_same_attention(
    p: AttentionInputs, group: ProcessGroup, layout: Layout, backend: Backend, output_final: bool, algorithm: Algorithm
) -> int | Tensor:
    """Compare the ranks' calls; the number of rows on earlier ranks where documents are packed, 0 otherwise."""
    length, on_cpu = p.q.shape[1], p.q.device.type == "cpu"
    documents: object = None
    if p.cu_seqlens is not None:
        documents = p.cu_seqlens.numel() - 1
        if on_cpu:
            documents = f"{documents} (digest {hashlib.sha256(p.cu_seqlens.numpy().tobytes()).hexdigest()[:12]})"
    asked = (p.q, p.k, p.v, p.planes, p.beta, p.log_decay, *(() if p.initial is None else p.initial.tensors()))
    facts = {
        "q": [p.q.shape[0], "T", *p.q.shape[2:]],
        "k": [p.k.shape[0], "T", *p.k.shape[2:]],
        "v": [p.v.shape[0], "T", *p.v.shape[2:]],
        "dtype": p.q.dtype,
        "planes": list(p.planes.shape),
        "causal": p.causal,
        "normalization": p.normalization,
        "layout": layout,
        "documents": documents,
        "log_decay": p.log_decay is not None,
        "initial_state": None if p.initial is None else p.state_dtype,
        "backend": getattr(backend, "__name__", type(backend).__name__),
        "output_final_state": output_final,
        "algorithm": algorithm,
        "ranks_per_node": ranks_per_node(),
        "requires_grad": torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in asked),
    }
    need_offset = layout == "contiguous" and p.cu_seqlens is not None
    lengths = check_same_call("race_attention", facts, group, p.q.device, length=length, need_lengths=need_offset)
    if on_cpu and lengths is not None:
        _check_lengths(lengths.tolist(), layout, p.cu_seqlens)
    elif layout == "zigzag":
        check_zigzag(length * group_size(group), group_size(group))
    if not need_offset:
        return 0
    assert lengths is not None
    before = lengths[: group_rank(group)].sum()
    return int(before) if on_cpu else before


def _check_lengths(lengths: list[int], layout: Layout, cu_seqlens: Tensor | None) -> None:
    """The same verdict on every rank."""
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
class Call:
    """What a call is made of besides tensors."""

    group: ProcessGroup
    layout: Layout
    backend: Backend
    offset: int | Tensor
    output_final: bool
    algorithm: Algorithm
    causal: bool
    normalization: Any

    def problem(self, tensors: Sequence[Tensor | None]) -> AttentionInputs:
        q, k, v, planes, beta = cast(list[Tensor], tensors[:5])
        log_decay, key_mask, cu_seqlens, mass, values = tensors[5:]
        initial = None if mass is None or values is None else SketchState.unchecked(mass, values)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        return AttentionInputs(q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial, self.causal, self.normalization)

    def route(self, p: AttentionInputs) -> Route:
        if p.cu_seqlens is not None and self.layout == "contiguous":
            return Documents(self.group, p, self.offset, self.algorithm)
        return Prefix(self.group, self.layout, p, self.algorithm) if p.causal else Total(self.group, p)


class _GroupAttention(torch.autograd.Function):
    """(q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial) -> out, and the final state where it is wanted."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, kept = forward_pass(call, tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors, results[0], *kept)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under activation checkpointing it cannot be read twice
        tensors, (out, *kept) = saved[:_INPUTS], saved[_INPUTS:]
        every = backward_pass(ctx.call, tensors, out, kept, dout, dfinal, need_planes=ctx.needs_input_grad[4])
        return None, *(g if need else None for g, need in zip(every, ctx.needs_input_grad[1:]))


def forward_pass(call: Call, tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The results (out, and the final state's tensors where it is wanted), and what the backward pass wants."""
    p = call.problem(tensors)
    route, backend, halves = call.route(p), call.backend, head_halves(p, call.group)
    calls = [route.cut.calls(half) for half in halves]
    out = p.q.new_empty(*p.q.shape[:3], p.v.shape[3])
    places = [route.cut.of(part) for part in _split_heads(out, halves, queries=True)]
    finals, kept = [], []
    with autocast_disabled(p.q):
        begun, finishes = [], []
        for half, each, place in zip(halves, calls, places):
            initial = _initial(half)
            begun.append(
                [
                    backend.start_forward(replace(one, initial=state), o)
                    for one, state, o in zip(each, route.known(initial), place)
                ]
            )
            finishes.append(route.start_forward([b.state for b in begun[-1]], initial))
        for each, place, begins, finish in zip(calls, places, begun, finishes):
            entering = finish()
            done = [
                backend.forward(replace(one, initial=state), o, b) for one, state, o, b in zip(each, entering, place, begins)
            ]
            if call.output_final:
                finals.append(_StateSum(route.final([f.final for f in done]), call.group))
            for f, state in zip(done, entering):
                kept += [f.den, f.states, f.final.mass, f.final.values, state.mass, state.values]
    states = [each.wait().tensors() for each in finals]
    return (out, *(_join(parts, 1) for parts in zip(*states))), kept


def backward_pass(
    call: Call,
    tensors: Sequence[Tensor | None],
    out: Tensor,
    kept: list[Tensor],
    dout: Tensor,
    dfinal: Sequence[Tensor],
    *,
    need_planes: bool,
) -> tuple[Tensor | None, ...]:
    """A gradient of each tensor of a problem, None where there can be none."""
    p = call.problem(tensors)
    route, backend, halves = call.route(p), call.backend, head_halves(p, call.group)
    arriving = _StateSum(SketchState.unchecked(*dfinal), call.group) if call.output_final else None
    gradients = [x.new_empty(x.shape) for x in (p.q, p.k, p.v)]
    places = _places(route, halves, gradients)
    work = _backward_calls(p, route, halves, out, dout, kept)
    with autocast_disabled(p.q):
        begun, finishes = [], []
        for i, (half, each, place) in enumerate(zip(halves, work, places)):
            begun.append(
                [
                    backend.start_backward(one, saved, d, need_planes=need_planes, into=into)
                    for one, saved, d, into in zip(each.calls, each.saved, each.douts, place)
                ]
            )
            finishes.append(route.start_backward([b.state for b in begun[-1]], _arriving(arriving, half, p, i)))
        grads = [
            [
                backend.backward(one, saved, d, state, need_planes=need_planes, into=into, begun=b)
                for one, saved, d, state, into, b in zip(each.calls, each.saved, each.douts, finish(), place, begins)
            ]
            for each, place, begins, finish in zip(work, places, begun, finishes)
        ]
    merged = _merge(route, gradients, grads)
    if merged.log_decay is not None and arriving is not None:
        dtotal = arriving.wait().log_decay
        assert dtotal is not None
        rows = route.rows(p.q.shape[1])
        merged.log_decay.add_(dtotal[:, None] if rows is None else dtotal[rows])
    initial = (None, None) if merged.initial is None else (merged.initial.mass, merged.initial.values)
    return *merged[:6], None, None, *initial


_INPUTS = 10  # tensors of a problem


class _StateSum:
    """The sum of the ranks' shares of a state, under way: one all-reduce."""

    def __init__(self, share: SketchState, group: ProcessGroup) -> None:
        self._like = share
        self._pending = start_all_reduce(torch.cat([t.reshape(-1) for t in share.tensors()]), group)

    def wait(self) -> SketchState:
        tensors = self._like.tensors()
        parts = self._pending.wait().split([t.numel() for t in tensors])
        return self._like.with_tensors(tuple(part.view_as(t) for part, t in zip(parts, tensors)))


class _Work(NamedTuple):
    """One half's local calls in the backward pass."""

    calls: list[AttentionInputs]
    saved: list[ForwardResult]
    douts: list[Tensor]


def _backward_calls(
    p: AttentionInputs, route: Route, halves: Sequence[AttentionInputs], out: Tensor, dout: Tensor, kept: list[Tensor]
) -> list[_Work]:
    """The local calls with their initial states, outputs and saved states."""
    work = []
    for half, *parts in zip(halves, *(_split_heads(x, halves, queries=True) for x in (out, dout))):
        outs, douts = map(route.cut.of, parts)
        calls, saved = [], []
        for one, part in zip(route.cut.calls(half), outs):
            den, states, mass, values, initial_mass, initial_values = kept[:6]
            kept = kept[6:]
            calls.append(replace(one, initial=SketchState.unchecked(initial_mass, initial_values)))
            saved.append(ForwardResult(part, den, states, SketchState.unchecked(mass, values)))
        work.append(_Work(calls, saved, douts))
    return work


def _places(route: Route, halves: Sequence[AttentionInputs], gradients: Sequence[Tensor]) -> list[list[Into]]:
    """Where each half's local calls write dq, dk and dv: views of the rank's gradients."""
    parts = (_split_heads(x, halves, queries=i == 0) for i, x in enumerate(gradients))
    return [[Into(*each) for each in zip(*map(route.cut.of, half))] for half in zip(*parts)]


def _merge(route: Route, qkv: Sequence[Tensor], grads: Sequence[Sequence[Gradients]]) -> Gradients:
    """The gradients of all local calls, as those of the rank's problem."""

    def decays() -> Tensor:
        return _join([route.cut.merge([g.log_decay for g in half if g.log_decay is not None]) for half in grads], 2)

    def shares(name: str) -> Tensor:
        return _join([torch.stack([getattr(g, name) for g in half]).sum(0) for half in grads], 0)

    some = grads[0][0]
    initials = [route.dinitial([g.initial for g in half if g.initial is not None]).tensors() for half in grads]
    initial = SketchState.unchecked(*(_join(parts, 1) for parts in zip(*initials)))
    return Gradients(
        qkv[0],
        qkv[1],
        qkv[2],
        None if some.planes is None else shares("planes"),
        shares("beta"),
        None if some.log_decay is None else decays(),
        initial,
    )


def splits_heads(on_gpu: bool, ranks: int, ranks_per_node: int) -> bool:
    """Whether a layer's heads are exchanged in two halves or all at once, which costs less among the GPUs of a node."""
    return not on_gpu or ranks > ranks_per_node


def head_halves(p: AttentionInputs, group: ProcessGroup) -> list[AttentionInputs]:
    """The problem of each half of the key/value heads and their query heads, views; or the whole problem alone."""
    heads, repeats = p.k.shape[2], p.q.shape[2] // p.k.shape[2]
    in_halves = heads > 1 and splits_heads(p.q.is_cuda, group_size(group), ranks_per_node())
    bounds = [0, heads // 2, heads] if in_halves else [0, heads]
    return [_heads(p, a, b, repeats) for a, b in zip(bounds, bounds[1:])]


def _split_heads(x: Tensor, halves: Sequence[AttentionInputs], *, queries: bool) -> tuple[Tensor, ...]:
    """x ``[B, T, Hq or Hkv, ...]`` as views of the halves' heads."""
    return x.split([(half.q if queries else half.k).shape[2] for half in halves], 2)


def _heads(p: AttentionInputs, a: int, b: int, repeats: int) -> AttentionInputs:
    return replace(
        p,
        q=p.q[:, :, a * repeats : b * repeats],
        k=p.k[:, :, a:b],
        v=p.v[:, :, a:b],
        planes=p.planes[a:b],
        beta=p.beta[a:b],
        log_decay=None if p.log_decay is None else p.log_decay[:, :, a:b],
        initial=None if p.initial is None else p.initial.with_tensors(tuple(t[:, a:b] for t in p.initial.tensors())),
    )


def _initial(p: AttentionInputs) -> SketchState:
    """The state that enters the whole sequence."""
    if p.initial is not None:
        return p.initial
    return SketchState.empty(p.num_states, p.k.shape[2], p.features, p.v.shape[3], dtype=p.state_dtype, device=p.q.device)


def _arriving(dfinal: _StateSum | None, half: AttentionInputs, p: AttentionInputs, index: int) -> Callable[[], SketchState]:
    """How to get one half's gradient of the final state of the whole sequence."""
    heads = half.k.shape[2]
    first = index * (p.k.shape[2] // 2)

    def wait() -> SketchState:
        if dfinal is None:
            return _initial(half).zero()
        state = dfinal.wait()
        return SketchState.unchecked(state.mass[:, first : first + heads], state.values[:, first : first + heads])

    return wait


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
