"""Baselines of the attention benchmark: softmax and linear attention implementations at their best settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from race_dist.benchmarks.attention import Shape

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Baseline:
    """One baseline: ``call(q, k, v)`` on ``[B, T, H, D]``, or the reason why it is ``absent``."""

    name: str
    call: Call | None
    absent: str = ""


def baselines_for(shape: Shape, device: torch.device) -> list[Baseline]:
    """Every baseline, present or absent, for these sizes."""
    if device.type != "cuda":
        return [Baseline("sdpa", _sdpa(shape)), Baseline("elu linear attention", _elu_linear(shape))]
    return [
        Baseline("sdpa cudnn", _sdpa(shape, SDPBackend.CUDNN_ATTENTION)),
        Baseline("sdpa flash", _sdpa(shape, SDPBackend.FLASH_ATTENTION)),
        _flash_attention_3(shape),
        Baseline("race, eager PyTorch", _chunked_race(shape, device)),
        _linear_attention(shape, device),
    ]


def _flash_attention_3(shape: Shape) -> Baseline:
    """FlashAttention-3, where its package is installed."""
    name = "flash attention 3"
    if find_spec("flash_attn_interface") is None:
        return Baseline(name, None, "flash_attn_interface is not installed")
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=shape.causal)
        return out[0] if isinstance(out, tuple) else out

    return Baseline(name, call)


def _chunked_race(shape: Shape, device: torch.device) -> Call:
    """The same attention by the PyTorch backend: the speedup of the kernels."""
    from race_dist.attention import race_attention
    from race_dist.hashing import sample_planes

    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=device, dtype=torch.bfloat16)
    return lambda q, k, v: race_attention(q, k, v, planes, 2.0, causal=shape.causal, backend="chunked")


def _linear_attention(shape: Shape, device: torch.device) -> Baseline:
    """:func:`linear_attention_baseline`, where fla is installed."""
    name = "compiled features + fla"
    if not shape.causal:
        return Baseline(name, None, "is causal only")
    if find_spec("fla") is None:
        return Baseline(name, None, "fla-core is not installed")
    return Baseline(name, linear_attention_baseline(shape, device))


def _sdpa(shape: Shape, backend: SDPBackend | None = None) -> Call:
    """PyTorch's softmax attention."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal).transpose(1, 2)

    return call


def _elu_linear(shape: Shape, chunk: int = 64) -> Call:
    """elu + 1 linear attention in chunks of plain PyTorch: the same complexity with another feature map (D features)."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)))
        if not shape.causal:
            num = q @ (k.mT @ v)
        else:
            length, lacking = q.shape[2], -q.shape[2] % chunk
            if lacking:
                q, k, v = (F.pad(x, (0, 0, 0, lacking)) for x in (q, k, v))
            q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
            sums = k.mT @ v
            num = (q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ v).flatten(2, 3)[:, :, :length]
        return (num[..., :-1] / num[..., -1:]).transpose(1, 2)

    return call


def linear_attention_baseline(shape: Shape, device: torch.device) -> Call:
    """RACE from existing parts: compiled features, then the chunked linear attention of flash-linear-attention.

    Raises:
        ImportError: fla-core is not installed.
    """
    try:
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{error}: pip install fla-core") from error
    from race_dist.hashing import sample_planes, soft_hash

    planes = sample_planes(shape.tables, shape.planes, shape.head_dim, seed=0, device=device, dtype=torch.bfloat16)
    features = torch.compile(lambda x: soft_hash(x.transpose(1, 2), planes, 2.0).transpose(1, 2).contiguous())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk_linear_attn(features(q), features(k), v, scale=1.0, normalize=True)[0]

    return call
