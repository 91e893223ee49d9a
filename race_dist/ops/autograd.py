"""The attention on one rank as a differentiable operator: one autograd formula for every backend.

Usually an autograd function calls the backend directly, because PyTorch's dispatcher takes half of the host time of a short
sequence. Where something traces operators (torch.compile, selective activation checkpointing, a dispatch mode), a custom
operator runs instead: it is opaque, so that the graph has no break whatever the backend does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from race_dist.ops import reference
from race_dist.ops.backends import get_backend
from race_dist.ops.inputs import (
    INPUT_SCHEMA,
    AttentionInputs,
    ForwardResult,
    InputOptions,
    InputTensors,
    ResultTensors,
    differentiable,
    split_arguments,
    take,
    total_log_decay,
)
from race_dist.sketch import SketchState


def single_rank_attention(inputs: AttentionInputs, backend: str) -> tuple[Tensor, SketchState]:
    """Output ``[B, T, Hq, Dv]`` and final state, differentiable in every floating-point input."""
    if backend == "reference":
        with autocast_disabled(inputs.q):
            return reference.attention(inputs)
    tensors, options = inputs.flatten()
    if is_traced(tensors):
        results = _attention(*tensors, *options, backend)
    else:
        results = _Attention.apply(inputs, options, backend, *tensors)
    out, _, _, mass, values = results
    return out, SketchState.unchecked(mass, values, total_log_decay(inputs))


def is_traced(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a compiler, a tracer, a dispatch mode or a tensor subclass observes operators."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(x is not None and (type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta) for x in tensors)
    )


def check_no_function_transforms(backend: str) -> None:
    """Raise ValueError inside torch.func transforms and forward-mode differentiation.

    The fused backends have one derivative formula, that of the backward pass, which these do not call: a tangent would silently
    be 0.
    """
    if backend == "reference" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            f'race_attention with backend="{backend}" has gradients by autograd (backward, torch.autograd.grad) '
            'but does not run inside torch.func (grad, vjp, jvp, vmap, ...): give backend="reference" there'
        )
    if forward_ad._current_level >= 0:
        raise ValueError(
            f'race_attention with backend="{backend}" has no forward-mode derivative (torch.autograd.forward_ad): '
            'give backend="reference" there'
        )


def autocast_disabled(q: Tensor) -> AbstractContextManager[None]:
    """Turn autocast off: the matrix products of a backend keep their dtype."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _run_backward(
    inputs: AttentionInputs,
    results: ResultTensors,
    dout: Tensor,
    dfinal: SketchState | None,
    backend: str,
    *,
    need_planes: bool,
    need_beta: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of :class:`InputTensors`."""
    saved = ForwardResult.unflatten(results)
    with autocast_disabled(inputs.q):
        gradients = get_backend(backend).backward(inputs, saved, dout, dfinal, need_planes=need_planes, need_beta=need_beta)
    return gradients.flatten()


def _final_gradient(results: ResultTensors, dmass: Tensor | None, dvalues: Tensor | None) -> SketchState | None:
    if dmass is None and dvalues is None:
        return None
    return SketchState.unchecked(
        torch.zeros_like(results.final_mass) if dmass is None else dmass,
        torch.zeros_like(results.final_values) if dvalues is None else dvalues,
    )


# --- the autograd function ---------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """``(inputs, options, backend, *tensors) -> ResultTensors``; ``tensors`` are those of ``inputs``, which autograd tracks."""

    @staticmethod
    def forward(
        ctx: Any, inputs: AttentionInputs, options: InputOptions, backend: str, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        with autocast_disabled(inputs.q):
            results = get_backend(backend).forward(inputs).flatten()
        ctx.backend, ctx.options = backend, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *results)
        ctx.mark_non_differentiable(results.den, results.states)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dden: None, dstates: None, dmass: Tensor | None, dvalues: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, needed = iter(ctx.saved_tensors), ctx.needs_input_grad[3:]
        inputs, results = AttentionInputs.unflatten(take(InputTensors, values), ctx.options), take(ResultTensors, values)
        need = take(InputTensors, iter(needed))
        gradients = _run_backward(
            inputs,
            results,
            torch.zeros_like(results.out) if dout is None else dout,
            _final_gradient(results, dmass, dvalues),
            ctx.backend,
            need_planes=cast(bool, need.planes),
            need_beta=cast(bool, need.beta),
        )
        return None, None, None, *(g if n else None for g, n in zip(gradients, needed))


# --- the custom operator -----------------------------------------------------------------------------------------------

_RESULT_SCHEMA = ", ".join(f"Tensor {name}" for name in ResultTensors._fields)


def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options, (backend,) = split_arguments(arguments)
    with autocast_disabled(tensors.q):
        return tuple(get_backend(backend).forward(AttentionInputs.unflatten(tensors, options)).flatten())


_attention = torch.library.custom_op(
    "race_dist::attention",
    _forward_op,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_attention.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options, (backend,) = split_arguments(arguments)
    inputs = AttentionInputs.unflatten(tensors, options)
    q, value_dim = inputs.q, inputs.v.shape[3]
    state = (inputs.num_states, inputs.k.shape[2], inputs.features)
    return (
        q.new_empty(*q.shape[:3], value_dim),
        q.new_empty(q.shape[:3] if inputs.normalization == "global" else (0,), dtype=inputs.compute_dtype),
        q.new_empty(get_backend(backend).states_shape(inputs), dtype=inputs.compute_dtype),
        q.new_empty(state, dtype=inputs.state_dtype),
        q.new_empty(*state, value_dim, dtype=inputs.state_dtype),
    )


def _backward_op(*arguments: Any) -> list[Tensor]:
    """The gradients of the inputs that :func:`differentiable` names, in their order."""
    tensors, options, others = split_arguments(arguments)
    values = iter(others)
    results = take(ResultTensors, values)
    dout, dmass, dvalues, backend, need_planes, need_beta = values
    gradients = _run_backward(
        AttentionInputs.unflatten(tensors, options),
        results,
        dout,
        _final_gradient(results, dmass, dvalues),
        backend,
        need_planes=need_planes,
        need_beta=need_beta,
    )
    return [g for g in gradients if g is not None]


_attention_backward = torch.library.custom_op(
    "race_dist::attention_backward",
    _backward_op,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {_RESULT_SCHEMA}, Tensor dout, Tensor? dmass, Tensor? dvalues, str backend, bool need_planes, "
    "bool need_beta) -> Tensor[]",
)


@_attention_backward.register_fake
def _backward_fake(*arguments: Any) -> list[Tensor]:
    *_, need_planes, need_beta = arguments
    inputs = differentiable(split_arguments(arguments)[0], need_planes=need_planes, need_beta=need_beta)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, (ctx.backend,) = split_arguments(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(
    ctx: Any, dout: Tensor | None, dden: None, dstates: None, dmass: Tensor | None, dvalues: Tensor | None
) -> tuple[Tensor | None, ...]:
    values = iter(ctx.saved_tensors)
    tensors, results = take(InputTensors, values), take(ResultTensors, values)
    need = take(InputTensors, iter(ctx.needs_input_grad))
    needs: dict[str, Any] = {"need_planes": need.planes, "need_beta": need.beta}
    dfinal = _final_gradient(results, dmass, dvalues)
    found = iter(
        _attention_backward(
            *tensors,
            *ctx.options,
            *results,
            torch.zeros_like(results.out) if dout is None else dout,
            *((None, None) if dfinal is None else (dfinal.mass, dfinal.values)),
            ctx.backend,
            need.planes,
            need.beta,
        )
    )
    gradients = [None if x is None else next(found) for x in differentiable(tensors, **needs)]
    return *(g if n else None for g, n in zip(gradients, need)), None, None, None


cast(Callable[..., None], _attention.register_autograd)(_differentiate, setup_context=_save_for_backward)
