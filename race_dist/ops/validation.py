"""Validation of the arguments of race_attention, and their normal form: :class:`AttentionInputs`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from race_dist import checks
from race_dist.checks import DTYPES, readable
from race_dist.hashing import as_bfloat16, check_tables_and_planes
from race_dist.ops.autograd import is_traced
from race_dist.ops.inputs import NORMALIZATIONS, AttentionInputs, Normalization
from race_dist.sketch import SketchState


class AttentionArguments(NamedTuple):
    """Arguments of race_attention that say what is computed, as the caller gave them."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor
    beta: Tensor | float
    causal: bool
    normalization: Normalization
    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    log_decay: Tensor | None
    initial_state: SketchState | None


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v take its dtype, as in PyTorch's scaled_dot_product_attention; float64 stays."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def validate(arguments: AttentionArguments, *, sharded: bool, check_values: bool = True) -> AttentionInputs:
    """Check the arguments and bring them to the form that backends take.

    Args:
        arguments: of the call.
        sharded: whether q, k and v are shards of a longer sequence, whose length is then unknown here.
        check_values: whether values on the CPU are checked too, and masked rows of q, k and v are set to 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names its value and the fix.
    """
    q, k, v, planes, beta, causal, normalization, cu_seqlens, key_mask, log_decay, initial = arguments
    if check_values:
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.tensor(name, x)
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    checks.flag("causal", causal)
    checks.choice("normalization", normalization, NORMALIZATIONS)
    if normalization == "none" and not causal:
        raise ValueError('normalization="none" is for causal calls, but causal=False: use normalization="global"')
    batch, length, _, dim = q.shape
    heads, dtype = k.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    planes = _validate_planes(planes, heads, dim, q)
    cu_seqlens = _validate_cu_seqlens(cu_seqlens, batch, None if sharded else length, q)
    if key_mask is not None:
        checks.tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, length):
            raise ValueError(f"key_mask must be bool [B, T] = {[batch, length]}; got {key_mask.dtype} {list(key_mask.shape)}")
        _check_same_device("key_mask", key_mask, q)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    features = planes.shape[1] * 2 ** planes.shape[2]
    _check_initial_state(initial, (rows, heads, features, v.shape[3]), q)
    if initial is not None and initial.log_decay is not None:  # the decay of earlier tokens plays no part in this call
        initial = SketchState.unchecked(initial.mass, initial.values)
    betas, decays = _validate_beta(beta, heads, dtype, q), _validate_log_decay(log_decay, causal, k, key_mask)
    if check_values:
        per_head = log_decay is not None and log_decay.dim() == 1  # its values are checked once, not at every token
        _check_values(betas if isinstance(beta, Tensor) else None, log_decay if per_head else decays, initial)
        if key_mask is not None:  # padding may be uninitialized memory, and 0 * NaN is NaN
            q, k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (q, k, v))
    return AttentionInputs(q, k, v, planes, betas, decays, key_mask, cu_seqlens, initial, causal, normalization)


def _check_values(beta: Tensor | None, log_decay: Tensor | None, initial: SketchState | None) -> None:
    """Check the range of values that are on the CPU."""
    if beta is not None and readable(beta) and not all(0 < value < math.inf for value in beta.tolist()):
        raise ValueError(f"beta must be positive and finite; got {checks.short_repr(beta.tolist())}")
    if log_decay is not None and readable(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be 0 or less (a weight of at most 1); its largest value is {log_decay.max().item()}")
    if initial is None or not readable(initial.mass):
        return
    low, high = (bound.item() for bound in initial.mass.detach().aminmax())
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"initial_state.mass must be sums of positive features, finite and at least 0; it holds {high if low >= 0 else low}"
        )
    if readable(initial.values) and not all(math.isfinite(bound.item()) for bound in initial.values.detach().aminmax()):
        raise ValueError("initial_state.values must be finite, but holds NaN or Inf")


def _check_same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it with .to(q.device)")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D]; got a tensor of shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}; race_attention takes float64, float32, bfloat16 or float16")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; q is {q.dtype}, {name} is {x.dtype}")
        _check_same_device(name, x, q)
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"q, k and v must agree in batch and length; q is {list(q.shape)}, {name} is {list(x.shape)}")
        if 0 in x.shape[2:]:
            raise ValueError(f"{name} has no heads or no width: {list(x.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must have one head width; got {q.shape[3]} and {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have the same number of heads; got {k.shape[2]} and {v.shape[2]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the number of query heads must be a multiple of key/value heads; got {q.shape[2]} and {k.shape[2]}")


def _validate_planes(planes: Tensor, heads: int, dim: int, q: Tensor) -> Tensor:
    """``[Hkv, L, P, D]``."""
    checks.tensor("planes", planes)
    if planes.dim() not in (3, 4) or planes.shape[-1] != dim or (planes.dim() == 4 and planes.shape[0] != heads):
        raise ValueError(
            f"planes must be [L, P, D] or [Hkv, L, P, D] with Hkv = {heads} and D = {dim}; got {list(planes.shape)}"
        )
    if planes.dtype not in DTYPES:
        raise TypeError(f"planes must be float64, float32, bfloat16 or float16; got {planes.dtype}")
    check_tables_and_planes(int(planes.shape[-3]), int(planes.shape[-2]))
    _check_same_device("planes", planes, q)
    if q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        planes = as_bfloat16(planes)
    return planes if planes.dim() == 4 else planes.expand(heads, -1, -1, -1)


def _validate_beta(beta: Tensor | float, heads: int, dtype: torch.dtype, q: Tensor) -> Tensor:
    """``[Hkv]``, in the compute dtype, on q's device."""
    if not isinstance(beta, Tensor):
        if not checks.is_number(beta):
            raise TypeError(f"beta must be a number or a tensor; got {checks.typed_repr(beta)}")
        if not 0 < beta <= torch.finfo(dtype).max:
            beyond = f", which {dtype} does not hold" if 0 < beta < math.inf else ""
            raise ValueError(f"beta must be positive and finite; got {checks.short_repr(beta)}{beyond}")
        return _constant(float(beta), heads, dtype, q)
    checks.tensor("beta", beta)
    if beta.dtype not in DTYPES or tuple(beta.shape) not in ((), (1,), (heads,)):
        raise ValueError(f"beta must be a scalar or [Hkv] = [{heads}] in floating point; got {beta.dtype} {list(beta.shape)}")
    _check_same_device("beta", beta, q)
    return beta.to(dtype).expand(heads).contiguous()


def _constant(value: float, count: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``[count]`` on ``like``'s device, cached across calls, because short sequences are launch-bound. Not cached where the
    memory would belong to a CUDA graph, or the tensor to a tracer."""
    if is_traced((like,)) or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.full((count,), value, dtype=dtype, device=like.device)
    return _cached_constant(value, count, dtype, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=64)
def _cached_constant(value: float, count: int, dtype: torch.dtype, device: torch.device, inference: bool) -> Tensor:
    return torch.full((count,), value, dtype=dtype, device=device)


def _validate_log_decay(log_decay: Tensor | None, causal: bool, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """``[B, T, Hkv]``, 0 at masked tokens; without a mask, one constant per head has stride 0 over batch and tokens."""
    if log_decay is None:
        return None
    checks.tensor("log_decay", log_decay)
    batch, length, heads, _ = k.shape
    if not causal:
        raise ValueError("log_decay needs causal=True: without an order of the tokens nothing decays")
    if tuple(log_decay.shape) not in ((heads,), (batch, length, heads)) or log_decay.dtype not in DTYPES:
        raise ValueError(
            f"log_decay must be [Hkv] = [{heads}] or [B, T, Hkv] = {[batch, length, heads]} in floating point; "
            f"got {log_decay.dtype} {list(log_decay.shape)}"
        )
    _check_same_device("log_decay", log_decay, k)
    if key_mask is not None and log_decay.dim() == 3:
        log_decay = torch.where(key_mask[..., None], log_decay, 0)
    if log_decay.dim() == 3:
        return log_decay
    log_decay = log_decay.detach().expand(batch, length, -1)
    return log_decay if key_mask is None else torch.where(key_mask[..., None], log_decay, 0)


def _validate_cu_seqlens(cu_seqlens: Tensor | None, batch: int, length: int | None, q: Tensor) -> Tensor | None:
    """int64 ``[N + 1]``; ``length`` None when the tokens are sharded and only their sum over the ranks is known."""
    if cu_seqlens is None:
        return None
    checks.cu_seqlens(cu_seqlens, length, batch=batch)
    _check_same_device("cu_seqlens", cu_seqlens, q)
    return cu_seqlens.long()


def _check_initial_state(initial: SketchState | None, shape: tuple[int, int, int, int], q: Tensor) -> None:
    if initial is None:
        return
    if not isinstance(initial, SketchState):
        raise TypeError(f"initial_state must be a SketchState; got {checks.typed_repr(initial)}")
    if tuple(initial.values.shape) != shape:
        raise ValueError(
            f"initial_state.values must be [rows, Hkv, S, Dv] = {list(shape)} (one row per batch row or document); "
            f"got {list(initial.values.shape)}"
        )
    if q.dtype == torch.float64 and initial.mass.dtype != torch.float64:
        raise TypeError("initial_state is float32 but q is float64; convert it with .to(torch.float64)")
    _check_same_device("initial_state", initial.mass, q)
