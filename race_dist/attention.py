"""The public attention: validates its arguments, selects a backend, and runs on one rank or a group of ranks."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from race_dist import checks
from race_dist.distributed.communication import group_rank, group_size
from race_dist.ops.autograd import check_no_function_transforms, single_rank_attention
from race_dist.ops.backends import BackendName, check_backend, get_backend, select_backend
from race_dist.ops.inputs import AttentionInputs, Normalization
from race_dist.ops.validation import AttentionArguments, validate
from race_dist.parallel.sharding import Layout, check_layout
from race_dist.sketch import SketchState

__all__ = ["BackendName", "layer_attention", "race_attention"]


@overload
def race_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = ...,
    normalization: Normalization = ...,
    cu_seqlens: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    log_decay: Tensor | None = ...,
    initial_state: SketchState | None = ...,
    output_final_state: Literal[False] = ...,
    group: dist.ProcessGroup | None = ...,
    layout: Layout = ...,
    backend: BackendName = ...,
) -> Tensor: ...
@overload
def race_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = ...,
    normalization: Normalization = ...,
    cu_seqlens: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    log_decay: Tensor | None = ...,
    initial_state: SketchState | None = ...,
    output_final_state: Literal[True],
    group: dist.ProcessGroup | None = ...,
    layout: Layout = ...,
    backend: BackendName = ...,
) -> tuple[Tensor, SketchState]: ...
@overload
def race_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = ...,
    normalization: Normalization = ...,
    cu_seqlens: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    log_decay: Tensor | None = ...,
    initial_state: SketchState | None = ...,
    output_final_state: bool,
    group: dist.ProcessGroup | None = ...,
    layout: Layout = ...,
    backend: BackendName = ...,
) -> Tensor | tuple[Tensor, SketchState]: ...
def race_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool = True,
    normalization: Normalization = "global",
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: SketchState | None = None,
    output_final_state: bool = False,
    group: dist.ProcessGroup | None = None,
    layout: Layout = "contiguous",
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, SketchState]:
    """RACE Attention (arXiv 2510.04008, Algorithms 1 and 2), exact in linear time, differentiable.

    With ``phi`` the soft hash of :func:`race_dist.hashing.soft_hash` and ``k_ij = <phi(q_i), phi(k_j)>``,

        "global"   o_i = sum_j k_ij v_j / sum_j k_ij
        "bucket"   o_i = sum_s phi_s(q_i) * values_s(i) / (mass_s(i) + 1e-6)
        "none"     o_i = sum_j k_ij v_j

    over j <= i when causal, over all j otherwise. Where the denominator of "global" is below 2**-96 (float32 states) or
    2**-960 (float64), as after a decay of hundreds in the exponent, the output row and all its gradients are 0.

    Args:
        q: ``[B, T, Hq, D]``, float64, float32, bfloat16 or float16, any strides.
        k: ``[B, T, Hkv, D]``; Hq is a multiple of Hkv and query head h reads key/value head ``h // (Hq // Hkv)``.
        v: ``[B, T, Hkv, Dv]``.
        planes: ``[L, P, D]`` or ``[Hkv, L, P, D]``, from :func:`race_dist.sample_planes`; differentiable.
        beta: sharpness > 0: a float, a scalar tensor or ``[Hkv]``; differentiable.
        causal: whether a token attends only to itself and earlier tokens.
        normalization: "global" (the paper), "bucket" (its released code) or "none" (apply a norm afterwards).
        cu_seqlens: ``[N + 1]`` int, packed documents (B = 1): document n is tokens ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``; the state is reset at each. Empty documents are allowed.
        key_mask: ``[B, T]`` bool; a masked (False) token is absent: other outputs, states and gradients are those of the
            sequence without it, whatever its q, k, v and log_decay hold (NaN too). Its own output is 0, without a gradient.
        log_decay: at most 0, causal only: ``[Hkv]`` (no gradient) or ``[B, T, Hkv]`` (differentiable). Token j has in
            the output of token i the weight ``exp(sum of log_decay over j < t <= i)``.
        initial_state: state before the first token, one row per batch row or document; differentiable.
        output_final_state: also return the state after the last token of each row or document (initial state included).
        group: context-parallel group, of whose ranks each holds a shard of the sequence. ``cu_seqlens`` (masked tokens
            included) and ``initial_state`` are then those of the whole sequence, the same on every rank, and so is the final
            state. The loss is the sum of the ranks' losses.
        layout: order of the shards, "contiguous" or "zigzag" (see :func:`race_dist.parallel.shard_sequence`).
        backend: "chunked" (PyTorch, any device), "triton" (GPU), "reference" (all pairs, small T), or "auto".

    Returns:
        ``out [B, T, Hq, Dv]`` in q's dtype, or ``(out, final_state)``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names its value and the fix. Values are checked
            only where they are Python numbers or CPU tensors.
        ImportError: backend="triton" without triton.
    """
    checks.flag("output_final_state", output_final_state)
    arguments = AttentionArguments(q, k, v, planes, beta, causal, normalization, cu_seqlens, key_mask, log_decay, initial_state)
    return _attention(arguments, group, layout, backend, output_final_state, check_values=True)


def layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    *,
    causal: bool,
    normalization: Normalization,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    log_decay: Tensor | None,
    initial_state: SketchState | None,
    output_final_state: bool,
    group: dist.ProcessGroup | None,
    layout: Layout,
    backend: BackendName,
) -> Tensor | tuple[Tensor, SketchState]:
    """:func:`race_attention` for a layer, which has computed its arguments itself: their values are not checked.

    NaN and Inf of a diverging run come out as they do on a GPU, and the training loop decides what to do.
    """
    arguments = AttentionArguments(q, k, v, planes, beta, causal, normalization, cu_seqlens, key_mask, log_decay, initial_state)
    return _attention(arguments, group, layout, backend, output_final_state, check_values=False)


def _attention(
    arguments: AttentionArguments,
    group: dist.ProcessGroup | None,
    layout: Layout,
    backend: BackendName,
    output_final_state: bool,
    *,
    check_values: bool,
) -> Tensor | tuple[Tensor, SketchState]:
    check_backend(backend)
    check_no_function_transforms(backend)
    group_rank(group)  # raises where it is no group, or this process no member
    sharded = group is not None and group_size(group) > 1
    inputs = validate(arguments, sharded=sharded, check_values=check_values)
    check_layout(layout)
    name = select_backend(inputs, backend).name
    final: SketchState | None
    if group is not None and sharded:
        out, final = _sharded_attention(inputs, group, layout, name, output_final_state)
    else:
        out, final = single_rank_attention(inputs, name)
    if inputs.key_mask is not None:
        out = torch.where(inputs.key_mask[..., None, None], out, 0)
    if not output_final_state or final is None:
        return out
    initial = arguments.initial_state
    if initial is not None and initial.log_decay is not None:
        total = initial.log_decay if final.log_decay is None else initial.log_decay + final.log_decay
        final = SketchState.unchecked(final.mass, final.values, total)
    return out, final


def _sharded_attention(
    inputs: AttentionInputs, group: dist.ProcessGroup, layout: Layout, backend: str, output_final: bool
) -> tuple[Tensor, SketchState | None]:
    if backend == "reference":
        raise ValueError('backend="reference" runs on one rank; under a group use "chunked" or "auto"')
    if torch.compiler.is_compiling() and inputs.causal and inputs.cu_seqlens is None and layout == "contiguous":
        from race_dist.parallel.compile_ops import compiled_context_parallel_attention

        return compiled_context_parallel_attention(inputs, group, backend, output_final=output_final)
    from race_dist.parallel.attention import context_parallel_attention

    return context_parallel_attention(inputs, group, layout, get_backend(backend), output_final=output_final)
