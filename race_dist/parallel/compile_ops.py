"""The exchanges of a sequence inside compiled graphs: each is one opaque operator, so that a block stays one graph.

For causal layers over contiguous shards without packed documents, which is what a long sequence is streamed as; anything
else leaves the graph. Each operator's results are read on every rank: an operator that is read on some ranks alone would be
taken out of the other ranks' graphs, and they would not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from race_dist.distributed.collectives import tree_sum
from race_dist.distributed.communication import group_rank, group_size, pack, start_all_gather, start_all_to_all, unpack
from race_dist.distributed.consistency import check_same_call
from race_dist.ops.autograd import get_backend
from race_dist.ops.inputs import AttentionInputs, Normalization
from race_dist.parallel.attention import Call, backward_pass, check_same_attention, forward_pass, head_halves
from race_dist.sketch import SketchState

KEPT = 6  # tensors that the backward pass wants of each half of the heads


def compiled_context_parallel_attention(
    p: AttentionInputs, group: ProcessGroup, backend: str, *, output_final: bool
) -> tuple[Tensor, SketchState | None]:
    """:func:`race_dist.parallel.attention.context_parallel_attention`, contiguous, without documents."""
    initial = (None, None) if p.initial is None else (p.initial.mass, p.initial.values)
    out, *rest = _group_attention(
        p.q,
        p.k,
        p.v,
        p.planes,
        p.beta,
        p.log_decay,
        p.key_mask,
        *initial,
        p.causal,
        p.normalization,
        backend,
        group.group_name,
        output_final,
    )
    if not output_final:
        return out, None
    return out, SketchState.unchecked(*rest[: 2 if p.log_decay is None else 3])


def _group(name: str) -> ProcessGroup:
    """As torch's own functional collectives find it."""
    return cast(Any, c10d)._resolve_process_group(name)


def _call(p: AttentionInputs, backend: str, group: ProcessGroup, output_final: bool) -> Call:
    return Call(group, "contiguous", get_backend(backend), 0, output_final, "auto", p.causal, p.normalization)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    mass: Tensor | None,
    values: Tensor | None,
    causal: bool,
    normalization: str,
) -> AttentionInputs:
    initial = None if mass is None or values is None else SketchState.unchecked(mass, values)
    return AttentionInputs(
        q, k, v, planes, beta, log_decay, key_mask, None, initial, causal, cast(Normalization, normalization)
    )


@torch.library.custom_op("race_dist::context_parallel_attention", mutates_args=())
def _group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    mass: Tensor | None,
    values: Tensor | None,
    causal: bool,
    normalization: str,
    backend: str,
    group: str,
    output_final: bool,
) -> list[Tensor]:
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, mass, values, causal, normalization)
    call = _call(p, backend, _group(group), output_final)
    check_same_attention(p, call.group, call.layout, call.backend, output_final, call.algorithm)
    results, kept = forward_pass(call, _inputs(p))
    small = [t if n % KEPT < 2 else t.clone() for n, t in enumerate(kept)]  # states may be views of each other or of inputs
    return [results[0], *(t.clone() for t in results[1:]), *small]


def _inputs(p: AttentionInputs) -> list[Tensor | None]:
    return [
        p.q,
        p.k,
        p.v,
        p.planes,
        p.beta,
        p.log_decay,
        p.key_mask,
        None,
        *((None, None) if p.initial is None else (p.initial.mass, p.initial.values)),
    ]


@_group_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    planes,
    beta,
    log_decay,
    key_mask,
    mass,
    values,
    causal,
    normalization,
    backend,
    group,
    output_final,
):
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, mass, values, causal, normalization)
    rows, heads, features, width = p.num_states, k.shape[2], p.features, v.shape[3]
    state = lambda count: [
        q.new_empty(rows, count, features, dtype=p.state_dtype),
        q.new_empty(rows, count, features, width, dtype=p.state_dtype),
    ]
    results = [q.new_empty(*q.shape[:3], width)]
    if output_final:
        results += state(heads) + ([] if log_decay is None else [q.new_empty(rows, heads, dtype=p.state_dtype)])
    for half in head_halves(p, _group(group)):
        den = half.q.shape[:3] if normalization == "global" else (0,)
        results += [
            q.new_empty(den, dtype=p.compute_dtype),
            q.new_empty(get_backend(backend).states_shape(half), dtype=p.compute_dtype),
            *state(half.k.shape[2]),
            *state(half.k.shape[2]),
        ]
    return results


@torch.library.custom_op("race_dist::context_parallel_attention_backward", mutates_args=())
def _group_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    mass: Tensor | None,
    values: Tensor | None,
    out: Tensor,
    kept: list[Tensor],
    dout: Tensor,
    dfinal: list[Tensor],
    causal: bool,
    normalization: str,
    backend: str,
    group: str,
    output_final: bool,
    need_planes: bool,
) -> list[Tensor]:
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, mass, values, causal, normalization)
    call = _call(p, backend, _group(group), output_final)
    grads = backward_pass(call, _inputs(p), out, kept, dout, dfinal, need_planes=need_planes)
    like = (q, k, v, planes, beta, log_decay, mass, values)
    chosen = zip(like, (*grads[:6], *grads[8:]), strict=True)
    return [q.new_empty(0) if x is None or g is None else g.clone() if n > 2 else g for n, (x, g) in enumerate(chosen)]


@_group_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    planes,
    beta,
    log_decay,
    key_mask,
    mass,
    values,
    out,
    kept,
    dout,
    dfinal,
    causal,
    normalization,
    backend,
    group,
    output_final,
    need_planes,
):
    like = (q, k, v, planes if need_planes else None, beta, log_decay, mass, values)
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in like]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.options = inputs[9:]
    ctx.save_for_backward(*inputs[:9], *output)


def _attention_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *_, output_final = ctx.options
    inputs, results = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    finals = 0 if not output_final else 2 if inputs[5] is None else 3
    dout, *dfinal = (torch.zeros_like(t) if g is None else g for g, t in zip(grads[: 1 + finals], results))
    found = _group_attention_backward(
        *inputs, results[0], list(results[1 + finals :]), dout, dfinal, *ctx.options, ctx.needs_input_grad[3]
    )
    every = (*found[:6], None, *found[6:])
    return *(g if need else None for g, need in zip(every, ctx.needs_input_grad)), None, None, None, None, None


cast(Callable[..., None], _group_attention.register_autograd)(_attention_gradients, setup_context=_save_attention)


# --- the last tokens of the shard before --------------------------------------------------------------------------------


def compiled_halo_exchange(
    own: Sequence[Tensor], before: Sequence[Tensor], group: ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """What enters a rank's shard and what leaves the sequence, of tails that are full: the tail of the rank before (on the
    first rank ``before``, that of the sequence's beginning), and that of the last rank.

    Args:
        own: a shard's last tokens, floating, the same shapes on every rank.
        before: like them, the same on every rank.
    """
    result = _edges(list(own), list(before), group.group_name)
    return result[: len(own)], result[len(own) :]


@torch.library.custom_op("race_dist::edges", mutates_args=())
def _edges(own: list[Tensor], before: list[Tensor], group: str) -> list[Tensor]:
    ranks = _group(group)
    rank, device = group_rank(ranks), own[0].device
    check_same_call("edges", {"shapes": [list(t.shape) for t in own], "dtypes": [t.dtype for t in own]}, ranks, device)
    every = unpack(start_all_gather(pack(own), ranks).wait(), own)
    entering = [b.clone() if rank == 0 else t[rank - 1].clone() for b, t in zip(before, every, strict=True)]
    return entering + [t[-1].clone() for t in every]


@_edges.register_fake
def _(own, before, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (*before, *own)]


@torch.library.custom_op("race_dist::edges_backward", mutates_args=())
def _edges_backward(dentering: list[Tensor], dleaving: list[Tensor], group: str) -> list[Tensor]:
    """Gradients of ``own``, then of ``before``: what a rank's tail gives, it gives to the rank after it; the last rank's to
    every rank that reads what leaves."""
    ranks = _group(group)
    rank, world, count = group_rank(ranks), group_size(ranks), len(dentering)
    every = unpack(start_all_gather(pack([*dentering, *dleaving]), ranks).wait(), [*dentering, *dleaving])
    last = rank == world - 1
    own = [
        tree_sum(leaving) if last else entering[rank + 1].clone()
        for entering, leaving in zip(every[:count], every[count:], strict=True)
    ]
    return own + [g.clone() if rank == 0 else torch.zeros_like(g) for g in dentering]


@_edges_backward.register_fake
def _(dentering, dleaving, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (*dleaving, *dentering)]


def _save_edges(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.group, ctx.count = inputs[2], len(inputs[0])
    ctx.save_for_backward(*output)


def _edges_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    whole = [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, ctx.saved_tensors)]
    found = _edges_backward(whole[: ctx.count], whole[ctx.count :], ctx.group)
    return found[: ctx.count], found[ctx.count :], None


cast(Callable[..., None], _edges.register_autograd)(_edges_gradients, setup_context=_save_edges)


# --- every rank's tensors -------------------------------------------------------------------------------------------------


def compiled_all_gather(own: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """``[W, ...]`` each: every rank's tensors, of the same shapes and dtypes; differentiable where they are floating."""
    return _gather(list(own), group.group_name)


@torch.library.custom_op("race_dist::gather", mutates_args=())
def _gather(own: list[Tensor], group: str) -> list[Tensor]:
    ranks = _group(group)
    facts = {"shapes": [list(t.shape) for t in own], "dtypes": [t.dtype for t in own]}
    check_same_call("gather", facts, ranks, own[0].device)
    return [t.clone() for t in unpack(start_all_gather(pack(own), ranks).wait(), own)]


@_gather.register_fake
def _(own, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(group_size(_group(group)), *t.shape) for t in own]


@torch.library.custom_op("race_dist::gather_backward", mutates_args=())
def _gather_backward(gradients: list[Tensor], group: str) -> list[Tensor]:
    """Of each rank's tensors, summed over the ranks that read them."""
    ranks = _group(group)
    packed = pack(gradients, rows=group_size(ranks))
    return [tree_sum(g).clone() for g in unpack(start_all_to_all(packed, ranks).wait(), [g[0] for g in gradients])]


@_gather_backward.register_fake
def _(gradients, group):  # type: ignore[no-untyped-def]
    return [g.new_empty(g.shape[1:]) for g in gradients]


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.group = inputs[1]
    ctx.save_for_backward(*output)


def _gather_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    whole = [
        torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, ctx.saved_tensors) if t.is_floating_point()
    ]
    found = iter(_gather_backward(whole, ctx.group))
    return [next(found) if t.is_floating_point() else None for t in ctx.saved_tensors], None


cast(Callable[..., None], _gather.register_autograd)(_gather_gradients, setup_context=_save_gather)
