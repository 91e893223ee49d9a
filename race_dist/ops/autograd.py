"""The attention on one rank as differentiable custom ops: one pair for every backend.

A custom op is opaque to torch.compile (no graph break, whatever a backend does inside), is replayed by activation
checkpointing, and carries its own autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from race_dist.ops import reference
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Gradients, Into, Normalization, Started, total_log_decay
from race_dist.sketch import SketchState


class Backend(Protocol):
    """What a backend module offers; docs/architecture.md says what each function means."""

    def forward(self, p: AttentionInputs, out: Tensor | None = None, begun: Started | None = None) -> ForwardResult: ...

    def backward(
        self,
        p: AttentionInputs,
        saved: ForwardResult,
        dout: Tensor,
        dfinal: SketchState | None,
        *,
        need_planes: bool,
        need_beta: bool = True,
        into: Into | None = None,
        begun: Started | None = None,
    ) -> Gradients: ...

    def start_forward(self, p: AttentionInputs, out: Tensor | None = None) -> Started: ...

    def start_backward(
        self, p: AttentionInputs, saved: ForwardResult, dout: Tensor, *, need_planes: bool, into: Into | None = None
    ) -> Started: ...

    def states_shape(self, p: AttentionInputs) -> tuple[int, ...]:
        """Shape of ``Forward.states`` (in the compute dtype), from shapes alone."""
        ...

    def unsupported(self, p: AttentionInputs) -> str | None:
        """Why this backend cannot compute ``p``, as a sentence's end; None when it can."""
        ...


BACKENDS = {"chunked": "race_dist.ops.chunked", "triton": "race_dist.ops.triton"}


@cache
def get_backend(name: str) -> Backend:
    """The module of a backend by name.

    Raises:
        ImportError: "triton" without the package installed.
    """
    try:
        return cast(Backend, import_module(BACKENDS[name]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise ImportError(
            'backend="triton" needs the triton package: pip install "race-dist[triton]", or use backend="chunked"'
        ) from error


def unsupported(p: AttentionInputs, backend: str) -> str | None:
    """Why a backend cannot compute ``p``, as a sentence's end; None when it can. Traceable: a compiler cannot import."""
    if not torch.compiler.is_compiling():
        return get_backend(backend).unsupported(p)
    return _unsupported(
        backend,
        p.q.device,
        p.q.dtype,
        p.k.dtype,
        p.v.dtype,
        p.q.shape[3],
        p.v.shape[3],
        *p.planes.shape[1:3],
        p.causal,
        p.normalization,
    )


@torch.compiler.assume_constant_result
def _unsupported(
    backend: str,
    device: torch.device,
    q: torch.dtype,
    k: torch.dtype,
    v: torch.dtype,
    dim: int,
    value_dim: int,
    tables: int,
    number: int,
    causal: bool,
    normalization: str,
) -> str | None:
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, device=device, dtype=dtype)
    p = _problem(
        empty(1, 0, 1, dim, dtype=q),
        empty(1, 0, 1, dim, dtype=k),
        empty(1, 0, 1, value_dim, dtype=v),
        empty(1, tables, number, dim),
        empty(1),
        None,
        None,
        None,
        None,
        None,
        causal,
        normalization,
    )
    return get_backend(backend).unsupported(p)


def single_rank_attention(p: AttentionInputs, backend: str) -> tuple[Tensor, SketchState]:
    """Output ``[B, T, Hq, Dv]`` and final state, differentiable in every float input of ``p``."""
    if backend == "reference":
        with autocast_disabled(p.q):
            return reference.attention(p)
    initial = (None, None) if p.initial is None else (p.initial.mass, p.initial.values)
    given = (p.q, p.k, p.v, p.planes, p.beta, p.log_decay, *initial)
    op = _attention if is_traced(*(x for x in given if x is not None)) else _Direct.apply
    out, _, _, mass, values = op(
        p.q, p.k, p.v, p.planes, p.beta, p.log_decay, p.key_mask, p.cu_seqlens, *initial, p.causal, p.normalization, backend
    )
    return out, SketchState.unchecked(mass, values, total_log_decay(p))


def is_traced(*tensors: Tensor) -> bool:
    """Whether something watches for ops: a compiler, a tracer, a policy of what to recompute, a tensor of another class or
    without elements."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(x.is_meta or type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def check_no_function_transforms(backend: str) -> None:
    """Raise ValueError inside torch.func's transforms and forward-mode differentiation: the fused backends have one formula,
    that of a backward pass, which these do not call (a tangent would silently be 0)."""
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


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mass: Tensor | None,
    values: Tensor | None,
    causal: bool,
    normalization: str,
) -> AttentionInputs:
    initial = None if mass is None or values is None else SketchState.unchecked(mass, values)
    return AttentionInputs(
        q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial, causal, cast(Normalization, normalization)
    )


def autocast_disabled(q: Tensor) -> AbstractContextManager[None]:
    """A backend's own products keep their dtype: autocast stays outside."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_mass: Tensor | None,
    initial_values: Tensor | None,
    causal: bool,
    normalization: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial_mass, initial_values, causal, normalization)
    with autocast_disabled(q):
        result = get_backend(backend).forward(p)
    return result.out, result.den, result.states, result.final.mass, result.final.values


_attention = torch.library.custom_op("race_dist::attention", mutates_args=())(_forward)


@_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    planes,
    beta,
    log_decay,
    key_mask,
    cu_seqlens,
    initial_mass,
    initial_values,
    causal,
    normalization,
    backend,
):
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial_mass, initial_values, causal, normalization)
    rows, heads, features, value_dim = p.num_states, k.shape[2], p.features, v.shape[3]
    return (
        q.new_empty(*q.shape[:3], value_dim),
        q.new_empty(q.shape[:3] if normalization == "global" else (0,), dtype=p.compute_dtype),
        q.new_empty(get_backend(backend).states_shape(p), dtype=p.compute_dtype),
        q.new_empty(rows, heads, features, dtype=p.state_dtype),
        q.new_empty(rows, heads, features, value_dim, dtype=p.state_dtype),
    )


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_mass: Tensor | None,
    initial_values: Tensor | None,
    out: Tensor,
    den: Tensor,
    states: Tensor,
    final_mass: Tensor,
    final_values: Tensor,
    dout: Tensor,
    dmass: Tensor | None,
    dvalues: Tensor | None,
    causal: bool,
    normalization: str,
    backend: str,
    need_planes: bool,
    need_beta: bool,
) -> list[Tensor]:
    """Of every input that there is, in their order; of the planes and beta if asked for."""
    p = _problem(q, k, v, planes, beta, log_decay, key_mask, cu_seqlens, initial_mass, initial_values, causal, normalization)
    dfinal = None if dmass is None or dvalues is None else SketchState.unchecked(dmass, dvalues)
    saved = ForwardResult(out, den, states, SketchState.unchecked(final_mass, final_values))
    with autocast_disabled(q):
        grads = get_backend(backend).backward(p, saved, dout, dfinal, need_planes=need_planes, need_beta=need_beta)
    dinitial = (None, None) if grads.initial is None else (grads.initial.mass, grads.initial.values)
    every = (grads.q, grads.k, grads.v, grads.planes, grads.beta, grads.log_decay, *dinitial)
    return [g for g in every if g is not None]


_attention_backward = torch.library.custom_op("race_dist::attention_backward", mutates_args=())(_gradients)


@_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    planes,
    beta,
    log_decay,
    key_mask,
    cu_seqlens,
    initial_mass,
    initial_values,
    out,
    den,
    states,
    final_mass,
    final_values,
    dout,
    dmass,
    dvalues,
    causal,
    normalization,
    backend,
    need_planes,
    need_beta,
):
    like = (q, k, v, planes if need_planes else None, beta if need_beta else None, log_decay, initial_mass, initial_values)
    return [x.new_empty(x.shape) for x in like if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[10:]
    ctx.save_for_backward(*inputs[:10], *output)


def _backward(
    ctx: Any,
    dout: Tensor | None,
    dden: None,
    dstates: None,
    dmass: Tensor | None,
    dvalues: Tensor | None,
    gradients: Callable[..., list[Tensor]] = _attention_backward,
) -> tuple[Tensor | None, ...]:
    *inputs, out, den, states, mass, values = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    if dmass is not None or dvalues is not None:
        dmass = torch.zeros_like(mass) if dmass is None else dmass
        dvalues = torch.zeros_like(values) if dvalues is None else dvalues
    needs = ctx.needs_input_grad[3:5]  # planes, beta
    found = iter(gradients(*inputs, out, den, states, mass, values, dout, dmass, dvalues, *ctx.options, *needs))
    there = (True, True, True, *needs, inputs[5] is not None, False, False, *(x is not None for x in inputs[8:]))
    every = [next(found) if is_there else None for is_there in there]
    return (*(g if need else None for g, need in zip(every, ctx.needs_input_grad)), None, None, None)


cast(Callable[..., None], _attention.register_autograd)(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same op, not through the dispatcher, which short sequences would wait for: half of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:3])
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dden: None, dstates: None, dmass: Tensor | None, dvalues: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dout, dden, dstates, dmass, dvalues, _gradients)
