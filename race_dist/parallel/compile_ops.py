"""Context parallelism inside compiled graphs: each exchange is one opaque custom operator, so that a block stays one graph.

For causal layers over contiguous shards without packed documents, which is how a long sequence is streamed; other calls break
the graph. All ranks read the results of each operator: on a rank that did not, the compiler would remove the operator, and the
collectives of the other ranks would wait for it forever.
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
from race_dist.ops.backends import get_backend
from race_dist.ops.inputs import INPUT_SCHEMA, AttentionInputs, InputTensors, differentiable, split_arguments, take
from race_dist.parallel.attention import (
    ContextParallelCall,
    ContextParallelResult,
    check_same_attention,
    head_groups,
    run_backward,
    run_forward,
)
from race_dist.sketch import SketchState

_OPTIONS_SCHEMA = "str backend, str group, bool output_final"


def compiled_context_parallel_attention(
    inputs: AttentionInputs, group: ProcessGroup, backend: str, *, output_final: bool
) -> tuple[Tensor, SketchState | None]:
    """:func:`race_dist.parallel.attention.context_parallel_attention`, contiguous, without documents."""
    tensors, options = inputs.flatten()
    results = _context_parallel_attention(*tensors, *options, backend, group.group_name, output_final)
    if not output_final:
        return results[0], None
    return results[0], SketchState.unchecked(*results[1 : 1 + _num_final(tensors, output_final)])


def _num_final(tensors: InputTensors, output_final: bool) -> int:
    """Number of the final state's tensors."""
    return 0 if not output_final else 2 if tensors.log_decay is None else 3


def _find_group(name: str) -> ProcessGroup:
    """As PyTorch's functional collectives find it."""
    return cast(Any, c10d)._resolve_process_group(name)


def _call(backend: str, group: str, output_final: bool) -> ContextParallelCall:
    return ContextParallelCall(_find_group(group), "contiguous", get_backend(backend), 0, output_final, "auto")


def _forward_op(*arguments: Any) -> list[Tensor]:
    tensors, options, others = split_arguments(arguments)
    inputs, call = AttentionInputs.unflatten(tensors, options), _call(*others)
    check_same_attention(inputs, call.group, call.layout, call.backend, call.output_final, call.algorithm)
    result = run_forward(inputs, call)
    final, saved = tuple(t.clone() for t in result.final), [each.copy_states() for each in result.saved]
    return ContextParallelResult(result.out, final, saved).flatten()


_context_parallel_attention = torch.library.custom_op(
    "race_dist::context_parallel_attention",
    _forward_op,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {_OPTIONS_SCHEMA}) -> Tensor[]",
)


@_context_parallel_attention.register_fake
def _forward_fake(*arguments: Any) -> list[Tensor]:
    tensors, options, (backend, group, output_final) = split_arguments(arguments)
    inputs = AttentionInputs.unflatten(tensors, options)

    def state(inputs: AttentionInputs) -> list[Tensor]:
        shape = inputs.num_states, inputs.k.shape[2], inputs.features
        dtype = inputs.state_dtype
        return [inputs.q.new_empty(shape, dtype=dtype), inputs.q.new_empty(*shape, inputs.v.shape[3], dtype=dtype)]

    results = [inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])]
    if output_final:
        results += state(inputs)
        if inputs.log_decay is not None:
            results.append(inputs.q.new_empty(inputs.num_states, inputs.k.shape[2], dtype=inputs.state_dtype))
    for heads in head_groups(inputs, _find_group(group)):
        some = heads.inputs
        den = some.q.shape[:3] if inputs.normalization == "global" else (0,)
        results += [
            some.q.new_empty(den, dtype=some.compute_dtype),
            some.q.new_empty(get_backend(backend).states_shape(some), dtype=some.compute_dtype),
            *state(some),
            *state(some),
        ]
    return results


def _backward_op(*arguments: Any) -> list[Tensor]:
    """The gradients of the inputs that :func:`differentiable` names, in their order."""
    tensors, options, (*call, need_planes, results, dout, dfinal) = split_arguments(arguments)
    result = ContextParallelResult.unflatten(results, _num_final(tensors, output_final=call[-1]))
    inputs = AttentionInputs.unflatten(tensors, options)
    gradients = run_backward(inputs, _call(*call), result, dout, dfinal, need_planes=need_planes)
    asked = differentiable(tensors, need_planes=need_planes)
    found = InputTensors._make(None if x is None else g for x, g in zip(asked, gradients))
    # the gradients of q, k and v are new tensors; the small ones may be views of each other
    return [*found[:3], *(g.clone() for g in found[3:] if g is not None)]


_context_parallel_attention_backward = torch.library.custom_op(
    "race_dist::context_parallel_attention_backward",
    _backward_op,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {_OPTIONS_SCHEMA}, bool need_planes, Tensor[] results, Tensor dout, Tensor[] dfinal) -> Tensor[]",
)


@_context_parallel_attention_backward.register_fake
def _backward_fake(*arguments: Any) -> list[Tensor]:
    tensors, _, (*_, need_planes, _, _, _) = split_arguments(arguments)
    return [x.new_empty(x.shape) for x in differentiable(tensors, need_planes=need_planes) if x is not None]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, options, ctx.call = split_arguments(inputs)
    ctx.options = options
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    values = iter(ctx.saved_tensors)
    tensors, results = take(InputTensors, values), list(values)
    num_final = _num_final(tensors, output_final=ctx.call[-1])
    dout, *dfinal = (torch.zeros_like(t) if g is None else g for g, t in zip(grads[: 1 + num_final], results))
    need = take(InputTensors, iter(ctx.needs_input_grad))
    need_planes: Any = need.planes
    found = iter(_context_parallel_attention_backward(*tensors, *ctx.options, *ctx.call, need_planes, results, dout, dfinal))
    gradients = [None if x is None else next(found) for x in differentiable(tensors, need_planes=need_planes)]
    return *(g if n else None for g, n in zip(gradients, need)), *(None,) * (len(ctx.options) + len(ctx.call))


cast(Callable[..., None], _context_parallel_attention.register_autograd)(_attention_gradients, setup_context=_save_attention)


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
    ranks = _find_group(group)
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
    ranks = _find_group(group)
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
    ranks = _find_group(group)
    facts = {"shapes": [list(t.shape) for t in own], "dtypes": [t.dtype for t in own]}
    check_same_call("gather", facts, ranks, own[0].device)
    return [t.clone() for t in unpack(start_all_gather(pack(own), ranks).wait(), own)]


@_gather.register_fake
def _(own, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(group_size(_find_group(group)), *t.shape) for t in own]


@torch.library.custom_op("race_dist::gather_backward", mutates_args=())
def _gather_backward(gradients: list[Tensor], group: str) -> list[Tensor]:
    """Of each rank's tensors, summed over the ranks that read them."""
    ranks = _find_group(group)
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
