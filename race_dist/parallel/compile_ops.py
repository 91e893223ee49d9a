"""Context parallelism inside compiled graphs: each exchange is one opaque custom operator, so that a block stays one graph.

For causal layers over contiguous shards without packed documents, which is how a long sequence is streamed; other calls break
the graph. All ranks read the results of each operator: on a rank that did not, the compiler would remove the operator, and the
collectives of the other ranks would wait for it forever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

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
    SavedCall,
    check_same_attention,
    head_groups,
    run_backward,
    run_forward,
)
from race_dist.sketch import SketchState


class CallOptions(NamedTuple):
    """Options of the operators besides those of the inputs; an operator's arguments are constants and tensors."""

    backend: str
    group: str
    output_final: bool

    def call(self) -> ContextParallelCall:
        """The call that these options describe."""
        return ContextParallelCall(
            _find_group(self.group), "contiguous", get_backend(self.backend), 0, self.output_final, "auto"
        )

    def num_final(self, tensors: InputTensors) -> int:
        """Number of the final state's tensors."""
        return 0 if not self.output_final else 2 if tensors.log_decay is None else 3


_OPTIONS_SCHEMA = "str backend, str group, bool output_final"


def compiled_context_parallel_attention(
    inputs: AttentionInputs, group: ProcessGroup, backend: str, *, output_final: bool
) -> tuple[Tensor, SketchState | None]:
    """:func:`race_dist.parallel.attention.context_parallel_attention`, contiguous, without documents."""
    tensors, options = inputs.flatten()
    call_options = CallOptions(backend, group.group_name, output_final)
    out, *rest = _context_parallel_attention(*tensors, *options, *call_options)
    return out, SketchState.unchecked(*rest[: call_options.num_final(tensors)]) if output_final else None


def _find_group(name: str) -> ProcessGroup:
    """As PyTorch's functional collectives find it."""
    return cast(Any, c10d)._resolve_process_group(name)


def _forward_op(*arguments: Any) -> list[Tensor]:
    tensors, options, others = split_arguments(arguments)
    inputs, call = AttentionInputs.unflatten(tensors, options), CallOptions(*others).call()
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
    tensors, options, others = split_arguments(arguments)
    inputs, call_options = AttentionInputs.unflatten(tensors, options), CallOptions(*others)
    empty = inputs.q.new_empty

    def empty_state(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        shape, dtype = (inputs.num_states, inputs.k.shape[2], inputs.features), inputs.state_dtype
        return empty(shape, dtype=dtype), empty(*shape, inputs.v.shape[3], dtype=dtype)

    final: tuple[Tensor, ...] = ()
    if call_options.output_final:
        final = empty_state(inputs)
        if inputs.log_decay is not None:
            final = *final, empty(inputs.num_states, inputs.k.shape[2], dtype=inputs.state_dtype)
    saved = []
    for heads in head_groups(inputs, _find_group(call_options.group)):
        den_shape = heads.inputs.q.shape[:3] if inputs.normalization == "global" else (0,)
        states_shape = get_backend(call_options.backend).states_shape(heads.inputs)
        den, states = empty(den_shape, dtype=inputs.compute_dtype), empty(states_shape, dtype=inputs.compute_dtype)
        saved.append(SavedCall(den, states, *empty_state(heads.inputs), *empty_state(heads.inputs)))
    return ContextParallelResult(empty(*inputs.q.shape[:3], inputs.v.shape[3]), final, saved).flatten()


def _backward_op(*arguments: Any) -> list[Tensor]:
    """The gradients of the inputs that :func:`differentiable` names, in their order."""
    tensors, options, others = split_arguments(arguments)
    values = iter(others)
    call_options = take(CallOptions, values)
    need_planes, results, dout, dfinal = values
    result = ContextParallelResult.unflatten(results, call_options.num_final(tensors))
    inputs = AttentionInputs.unflatten(tensors, options)
    gradients = run_backward(inputs, call_options.call(), result, dout, dfinal, need_planes=need_planes)
    asked = differentiable(tensors, need_planes=need_planes)
    q, k, v, *small = [g for x, g in zip(asked, gradients) if x is not None and g is not None]
    return [q, k, v, *(g.clone() for g in small)]  # the small gradients may be views of each other


_context_parallel_attention_backward = torch.library.custom_op(
    "race_dist::context_parallel_attention_backward",
    _backward_op,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {_OPTIONS_SCHEMA}, bool need_planes, Tensor[] results, Tensor dout, Tensor[] dfinal) -> Tensor[]",
)


@_context_parallel_attention_backward.register_fake
def _backward_fake(*arguments: Any) -> list[Tensor]:
    *_, need_planes, _, _, _ = arguments
    tensors, _, _ = split_arguments(arguments)
    return [x.new_empty(x.shape) for x in differentiable(tensors, need_planes=need_planes) if x is not None]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.options, others = split_arguments(inputs)
    ctx.call_options = CallOptions(*others)
    ctx.save_for_backward(*tensors, *output)


def _attention_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    values = iter(ctx.saved_tensors)
    tensors, results = take(InputTensors, values), list(values)
    outputs = 1 + ctx.call_options.num_final(tensors)
    dout, *dfinal = (torch.zeros_like(t) if g is None else g for g, t in zip(grads[:outputs], results))
    need = take(InputTensors, iter(ctx.needs_input_grad))
    need_planes: Any = need.planes
    found = iter(
        _context_parallel_attention_backward(*tensors, *ctx.options, *ctx.call_options, need_planes, results, dout, dfinal)
    )
    gradients = [None if x is None else next(found) for x in differentiable(tensors, need_planes=need_planes)]
    return *(g if n else None for g, n in zip(gradients, need)), *(None,) * len((*ctx.options, *ctx.call_options))


cast(Callable[..., None], _context_parallel_attention.register_autograd)(_attention_gradients, setup_context=_save_attention)


# --- halo exchange: the last tokens of the previous shard ---------------------------------------------------------------


def compiled_halo_exchange(
    own: Sequence[Tensor], before: Sequence[Tensor], group: ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """The tail before this rank's shard, and the tail of the whole sequence: those of the previous and of the last rank.

    Args:
        own: the last tokens of this rank's shard, floating point, of the same shapes on every rank.
        before: the tail before the sequence, which the first rank gets; like ``own``, the same on every rank.
    """
    result = _halo_exchange(list(own), list(before), group.group_name)
    return result[: len(own)], result[len(own) :]


@torch.library.custom_op("race_dist::halo_exchange", mutates_args=())
def _halo_exchange(own: list[Tensor], before: list[Tensor], group: str) -> list[Tensor]:
    ranks = _find_group(group)
    rank, device = group_rank(ranks), own[0].device
    check_same_call("halo_exchange", {"shapes": [list(t.shape) for t in own], "dtypes": [t.dtype for t in own]}, ranks, device)
    gathered = unpack(start_all_gather(pack(own), ranks).wait(), own)
    previous = [b.clone() if rank == 0 else t[rank - 1].clone() for b, t in zip(before, gathered, strict=True)]
    return previous + [t[-1].clone() for t in gathered]


@_halo_exchange.register_fake
def _(own, before, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (*before, *own)]


@torch.library.custom_op("race_dist::halo_exchange_backward", mutates_args=())
def _halo_exchange_backward(dprevious: list[Tensor], dlast: list[Tensor], group: str) -> list[Tensor]:
    """Gradients of ``own``, then of ``before``: the tail of a rank was read by the next rank, that of the last rank by all."""
    ranks = _find_group(group)
    rank, world, count = group_rank(ranks), group_size(ranks), len(dprevious)
    gathered = unpack(start_all_gather(pack([*dprevious, *dlast]), ranks).wait(), [*dprevious, *dlast])
    is_last = rank == world - 1
    own = [
        tree_sum(last) if is_last else previous[rank + 1].clone()
        for previous, last in zip(gathered[:count], gathered[count:], strict=True)
    ]
    return own + [g.clone() if rank == 0 else torch.zeros_like(g) for g in dprevious]


@_halo_exchange_backward.register_fake
def _(dprevious, dlast, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (*dlast, *dprevious)]


def _save_halo_exchange(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.group, ctx.count = inputs[2], len(inputs[0])
    ctx.save_for_backward(*output)


def _halo_exchange_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    gradients = [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, ctx.saved_tensors)]
    found = _halo_exchange_backward(gradients[: ctx.count], gradients[ctx.count :], ctx.group)
    return found[: ctx.count], found[ctx.count :], None


cast(Callable[..., None], _halo_exchange.register_autograd)(_halo_exchange_gradients, setup_context=_save_halo_exchange)


# --- all-gather ---------------------------------------------------------------------------------------------------------


def compiled_all_gather(own: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, ``[W, ...]`` each, of the same shapes and dtypes; differentiable if floating point."""
    return _all_gather(list(own), group.group_name)


@torch.library.custom_op("race_dist::all_gather", mutates_args=())
def _all_gather(own: list[Tensor], group: str) -> list[Tensor]:
    ranks = _find_group(group)
    facts = {"shapes": [list(t.shape) for t in own], "dtypes": [t.dtype for t in own]}
    check_same_call("all_gather", facts, ranks, own[0].device)
    return [t.clone() for t in unpack(start_all_gather(pack(own), ranks).wait(), own)]


@_all_gather.register_fake
def _(own, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(group_size(_find_group(group)), *t.shape) for t in own]


@torch.library.custom_op("race_dist::all_gather_backward", mutates_args=())
def _all_gather_backward(gradients: list[Tensor], group: str) -> list[Tensor]:
    """Gradients of this rank's tensors, summed over the ranks, which all read them."""
    ranks = _find_group(group)
    packed = pack(gradients, rows=group_size(ranks))
    return [tree_sum(g).clone() for g in unpack(start_all_to_all(packed, ranks).wait(), [g[0] for g in gradients])]


@_all_gather_backward.register_fake
def _(gradients, group):  # type: ignore[no-untyped-def]
    return [g.new_empty(g.shape[1:]) for g in gradients]


def _save_all_gather(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.group = inputs[1]
    ctx.save_for_backward(*output)


def _all_gather_gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    gradients = [
        torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, ctx.saved_tensors) if t.is_floating_point()
    ]
    found = iter(_all_gather_backward(gradients, ctx.group))
    return [next(found) if t.is_floating_point() else None for t in ctx.saved_tensors], None


cast(Callable[..., None], _all_gather.register_autograd)(_all_gather_gradients, setup_context=_save_all_gather)
