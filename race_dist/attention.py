"""The public attention: checks its inputs, picks a backend, runs on one rank or a group."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from race_dist import checks
from race_dist.checks import DTYPES, readable
from race_dist.distributed.communication import group_rank, group_size
from race_dist.hashing import as_bfloat16, check_tables_and_planes
from race_dist.ops.autograd import check_no_function_transforms, get_backend, is_traced, single_rank_attention, unsupported
from race_dist.ops.explain import warn_slow
from race_dist.ops.inputs import NORMALIZATIONS, AttentionInputs, Normalization
from race_dist.parallel.sharding import Layout, check_cu_seqlens, check_layout
from race_dist.sketch import SketchState

BackendName = Literal["auto", "reference", "chunked", "triton"]
BACKEND_NAMES: tuple[BackendName, ...] = ("auto", "reference", "chunked", "triton")
HAS_TRITON = find_spec("triton") is not None


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
        planes: ``[L, P, D]`` or ``[Hkv, L, P, D]``, from :func:`race_dist.sample_planes`; gets a gradient if it wants one.
        beta: sharpness > 0: a float, a scalar tensor or ``[Hkv]``; gets a gradient if it wants one.
        causal: whether a token reads only itself and what came before.
        normalization: "global" (the paper), "bucket" (its released code) or "none" (follow it by a norm).
        cu_seqlens: ``[N + 1]`` int, packed documents (B = 1): document n is tokens ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``; the state starts anew at each. Empty documents are legal.
        key_mask: ``[B, T]`` bool; a False token is absent: the others, the states and all gradients are what they would be
            without it, whatever its q, k, v and log_decay hold (NaN too). Its own output is 0, without a gradient.
        log_decay: at most 0, causal only: ``[Hkv]`` (no gradient) or ``[B, T, Hkv]`` (differentiable). Token i sees token
            j with weight ``exp(sum of log_decay over j < t <= i)``.
        initial_state: what came before, one row a batch row or document; differentiable.
        output_final_state: also return the state after the last token of each row or document (initial state included).
        group: ranks that each hold a shard of the sequence; ``cu_seqlens`` (masked tokens included) and ``initial_state`` are
            then those of the whole sequence, the same on every rank, and so is the final state. The loss is the sum of the
            ranks' losses.
        layout: order of the shards, "contiguous" or "zigzag" (see :func:`race_dist.parallel.shard_sequence`).
        backend: "chunked" (PyTorch, any device), "triton" (GPU), "reference" (all pairs, small T), or "auto".

    Returns:
        ``out [B, T, Hq, Dv]`` in q's dtype, or ``(out, final_state)``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names its value and the fix. Values are looked at
            only where they are Python numbers or CPU tensors.
        ImportError: backend="triton" without triton.
    """
    checks.flag("output_final_state", output_final_state)
    return layer_attention(
        q,
        k,
        v,
        planes,
        beta,
        causal=causal,
        normalization=normalization,
        cu_seqlens=cu_seqlens,
        key_mask=key_mask,
        log_decay=log_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        group=group,
        layout=layout,
        backend=backend,
        check_values=True,
    )


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
    check_values: bool = False,
) -> Tensor | tuple[Tensor, SketchState]:
    """:func:`race_attention` for a layer, which has computed its arguments itself: their values are not looked at, so that NaN
    and Inf of a run that diverges come out as they do on a device, and whoever trains decides."""
    check_backend(backend)
    check_no_function_transforms(backend)
    if check_values:
        for argument, x in (("q", q), ("k", k), ("v", v)):
            checks.tensor(argument, x)
    q, k, v = _autocast(q, k, v)
    group_rank(group)  # raises where it is no group, or this process no member
    sharded = group is not None and group_size(group) > 1
    problem = _problem(
        q,
        k,
        v,
        planes,
        beta,
        causal,
        normalization,
        cu_seqlens,
        key_mask,
        log_decay,
        initial_state,
        sharded=sharded,
        check_values=check_values,
    )
    check_layout(layout)
    name = _pick_backend(problem, backend)
    final: SketchState | None
    if group is not None and sharded:
        if name == "reference":
            raise ValueError('backend="reference" runs on one rank; under a group use "chunked" or "auto"')
        if torch.compiler.is_compiling() and causal and cu_seqlens is None and layout == "contiguous":
            from race_dist.parallel.compile_ops import compiled_context_parallel_attention

            out, final = compiled_context_parallel_attention(problem, group, name, output_final=output_final_state)
        else:
            from race_dist.parallel.attention import context_parallel_attention

            out, final = context_parallel_attention(problem, group, layout, get_backend(name), output_final=output_final_state)
    else:
        out, final = single_rank_attention(problem, name)
    if key_mask is not None:
        out = torch.where(key_mask[..., None, None], out, 0)
    if not output_final_state or final is None:
        return out
    if initial_state is not None and initial_state.log_decay is not None:
        total = initial_state.log_decay if final.log_decay is None else initial_state.log_decay + final.log_decay
        final = SketchState.unchecked(final.mass, final.values, total)
    return out, final


def check_backend(backend: object) -> None:
    """Raise ValueError unless there is such a backend."""
    if not isinstance(backend, str) or backend not in BACKEND_NAMES:
        raise ValueError(f'backend must be "auto", "reference", "chunked" or "triton"; got {checks.short_repr(backend)}')


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v take its dtype, as torch's own attention does; float64 stays."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _pick_backend(p: AttentionInputs, backend: str) -> str:
    if backend == "auto":
        reason = unsupported(p, "triton") if p.q.is_cuda and HAS_TRITON else "needs triton and a CUDA device"
        if reason is not None and p.q.is_cuda and p.q.dtype != torch.float64 and not torch.compiler.is_compiling():
            warn_slow(f'race_attention runs in PyTorch, without GPU kernels: backend="triton" {reason}')
        return "triton" if reason is None else "chunked"
    if backend == "triton" and (reason := unsupported(p, "triton")) is not None:
        raise ValueError(f'backend="triton" {reason}; use backend="chunked"')
    return backend


# --- checks ------------------------------------------------------------------------------------------------------------


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float,
    causal: bool,
    normalization: Normalization,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    log_decay: Tensor | None,
    initial: SketchState | None,
    *,
    sharded: bool,
    check_values: bool = True,
) -> AttentionInputs:
    """The inputs, checked and brought to the form that backends take."""
    _check_qkv(q, k, v)
    checks.flag("causal", causal)
    checks.choice("normalization", normalization, NORMALIZATIONS)
    if normalization == "none" and not causal:
        raise ValueError('normalization="none" is for causal calls, but causal=False: use normalization="global"')
    batch, length, _, dim = q.shape
    heads, dtype = k.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    planes = _check_planes(planes, heads, dim, q)
    cu_seqlens = _check_documents(cu_seqlens, batch, None if sharded else length, q)
    if key_mask is not None:
        checks.tensor("key_mask", key_mask)
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, length):
            raise ValueError(f"key_mask must be bool [B, T] = {[batch, length]}; got {key_mask.dtype} {list(key_mask.shape)}")
        _same_device("key_mask", key_mask, q)
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    features = planes.shape[1] * 2 ** planes.shape[2]
    _check_initial(initial, (rows, heads, features, v.shape[3]), q)
    betas, rates = _check_beta(beta, heads, dtype, q), _check_decay(log_decay, causal, k, key_mask)
    if check_values:
        per_head = log_decay is not None and log_decay.dim() == 1  # looked at as given, not at every token
        _check_values(betas if isinstance(beta, Tensor) else None, log_decay if per_head else rates, initial)
        if key_mask is not None:  # a user's padding may be memory that nobody has written: 0 * NaN is NaN
            q, k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (q, k, v))
    return AttentionInputs(q, k, v, planes, betas, rates, key_mask, cu_seqlens, initial, causal, normalization)


def _check_values(beta: Tensor | None, log_decay: Tensor | None, initial: SketchState | None) -> None:
    """What cannot be right of values that are on the CPU."""
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


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
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
        _same_device(name, x, q)
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


def _check_planes(planes: Tensor, heads: int, dim: int, q: Tensor) -> Tensor:
    """``[Hkv, L, P, D]``."""
    checks.tensor("planes", planes)
    if planes.dim() not in (3, 4) or planes.shape[-1] != dim or (planes.dim() == 4 and planes.shape[0] != heads):
        raise ValueError(
            f"planes must be [L, P, D] or [Hkv, L, P, D] with Hkv = {heads} and D = {dim}; got {list(planes.shape)}"
        )
    if planes.dtype not in DTYPES:
        raise TypeError(f"planes must be float64, float32, bfloat16 or float16; got {planes.dtype}")
    check_tables_and_planes(int(planes.shape[-3]), int(planes.shape[-2]))
    _same_device("planes", planes, q)
    if q.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        planes = as_bfloat16(planes)
    return planes if planes.dim() == 4 else planes.expand(heads, -1, -1, -1)


def _check_beta(beta: Tensor | float, heads: int, dtype: torch.dtype, q: Tensor) -> Tensor:
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
    _same_device("beta", beta, q)
    return beta.to(dtype).expand(heads).contiguous()


def _constant(value: float, count: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``[count]`` on ``like``'s device, kept from call to call: short sequences wait for the host. Not where the memory
    would be a graph's own, or the tensor a tracer's."""
    if is_traced(like) or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.full((count,), value, dtype=dtype, device=like.device)
    return _kept_constant(value, count, dtype, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=64)
def _kept_constant(value: float, count: int, dtype: torch.dtype, device: torch.device, inference: bool) -> Tensor:
    return torch.full((count,), value, dtype=dtype, device=device)


def _check_decay(log_decay: Tensor | None, causal: bool, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """``[B, T, Hkv]``, 0 at masked tokens; without a mask a constant a head has stride 0 over batch and tokens."""
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
    _same_device("log_decay", log_decay, k)
    if key_mask is not None and log_decay.dim() == 3:
        log_decay = torch.where(key_mask[..., None], log_decay, 0)
    if log_decay.dim() == 3:
        return log_decay
    log_decay = log_decay.detach().expand(batch, length, -1)
    return log_decay if key_mask is None else torch.where(key_mask[..., None], log_decay, 0)


def _check_documents(cu_seqlens: Tensor | None, batch: int, length: int | None, q: Tensor) -> Tensor | None:
    """int64 ``[N + 1]``; ``length`` None when the tokens are sharded and only their sum over the ranks is known."""
    if cu_seqlens is None:
        return None
    check_cu_seqlens(cu_seqlens, length)
    if batch != 1:
        raise ValueError(f"packed documents (cu_seqlens) need a batch of 1; got B = {batch}: pack them into one row")
    _same_device("cu_seqlens", cu_seqlens, q)
    return cu_seqlens.long()


def _check_initial(initial: SketchState | None, shape: tuple[int, int, int, int], q: Tensor) -> None:
    if initial is None:
        return
    if not isinstance(initial, SketchState):
        raise TypeError(f"initial_state must be a SketchState; got {checks.typed_repr(initial)}")
    if tuple(initial.values.shape) != shape:
        raise ValueError(
            f"initial_state.values must be [rows, Hkv, S, Dv] = {list(shape)} (a row a batch row or document); "
            f"got {list(initial.values.shape)}"
        )
    if q.dtype == torch.float64 and initial.mass.dtype != torch.float64:
        raise TypeError("initial_state is float32 but q is float64; convert it with .to(torch.float64)")
    _same_device("initial_state", initial.mass, q)
