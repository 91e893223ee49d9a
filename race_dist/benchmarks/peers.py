"""What RACE is timed against: what people use today for the same job, at its best settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from race_dist.benchmarks.attention import Shape

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A competitor: ``call(q, k, v)`` on ``[B, T, H, D]``, or why it is ``absent``."""

    name: str
    call: Call | None
    absent: str = ""


def peers_of(shape: Shape, device: torch.device) -> list[Peer]:
    """Every peer, present or absent, for one problem."""
    if device.type != "cuda":
        return [Peer("sdpa", _sdpa(shape)), Peer("elu linear attention", _elu_linear(shape))]
    return [Peer("sdpa cudnn", _sdpa(shape, SDPBackend.CUDNN_ATTENTION)),
            Peer("sdpa flash", _sdpa(shape, SDPBackend.FLASH_ATTENTION))]


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
    """elu + 1 linear attention in chunks of plain PyTorch: the same order of work, another feature map (D features)."""
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)))
        if not shape.causal:
            num = q @ (k.mT @ v)
        else:
            q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
            sums = k.mT @ v
            num = (q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ v).flatten(2, 3)
        return (num[..., :-1] / num[..., -1:]).transpose(1, 2)
    return call


def linear_attention_peer(shape: Shape, device: torch.device) -> Call:
    """RACE as it is built today: compiled features, then the chunked linear attention of flash-linear-attention.

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
