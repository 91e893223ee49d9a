"""What every backend is given: one rank's attention, checked and brought to one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from race_dist.sketch import SketchState

Normalization = Literal["global", "bucket", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("global", "bucket", "none")
BUCKET_EPS = 1e-6  # of the "bucket" normalization, as in the paper's released code


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one call on one rank. Tensors may have any strides; nothing here is ever expanded over query heads.

    Attributes:
        q: ``[B, T, Hq, D]``.
        k: ``[B, T, Hkv, D]``.
        v: ``[B, T, Hkv, Dv]``.
        planes: ``[Hkv, L, P, D]`` (stride 0 over heads that share them).
        beta: ``[Hkv]``, on the device, state dtype.
        log_decay: ``[B, T, Hkv]`` or None, 0 or less (stride 0 over batch and tokens when constant).
        key_mask: ``[B, T]`` bool or None; False keys add nothing (race_attention has set their decay to 0).
        cu_seqlens: ``[N + 1]`` int64 on the device or None; with it B = 1.
        initial: state before the first token, one row a batch row or document, or None.
        causal: whether token i reads tokens j <= i only.
        normalization: "global", "bucket" or "none".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial: SketchState | None
    causal: bool
    normalization: Normalization

    @property
    def features(self) -> int:
        """``S = L * 2**P``."""
        return self.planes.shape[1] * 2 ** self.planes.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Of states that come out: the initial state's where there is one, the compute dtype otherwise."""
        return self.compute_dtype if self.initial is None else self.initial.mass.dtype

    @property
    def num_states(self) -> int:
        """Rows of the initial and final state: documents if packed, batch rows otherwise."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


def den_floor(dtype: torch.dtype) -> float:
    """Below this denominator a row of the "global" normalization, and all its gradients, are 0."""
    return 2.0**-960 if dtype == torch.float64 else 2.0**-96


class ForwardResult(NamedTuple):
    """What a forward pass returns.

    ``out [B, T, Hq, Dv]`` in q's dtype; ``den [B, T, Hq]`` in the compute dtype ("global" only, else empty);
    ``states``: the backend's own saved states; ``final``: the state after the last token of each row.
    """

    out: Tensor
    den: Tensor
    states: Tensor
    final: SketchState


class Started(NamedTuple):
    """The part of a pass that needs nothing from other ranks: the state that goes on to them (forwards the final state,
    backwards the gradient of the initial state), and what the backend has by then and goes on from."""

    state: SketchState
    rest: Any


class Into(NamedTuple):
    """Tensors, of any strides, that a backward pass writes its largest gradients to, like ``q``, ``k`` and ``v``."""

    q: Tensor
    k: Tensor
    v: Tensor


class Gradients(NamedTuple):
    """What a backward pass returns: like the inputs; None where nothing was asked or there is no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor | None
    beta: Tensor | None
    log_decay: Tensor | None
    initial: SketchState | None


def total_log_decay(p: AttentionInputs) -> Tensor | None:
    """Sum of each row's (or document's) log decays, ``[B or N, Hkv]`` in the state dtype; differentiable."""
    if p.log_decay is None:
        return None
    log_decay = p.log_decay.to(p.state_dtype)
    if p.cu_seqlens is None:
        return log_decay.sum(1)
    total = log_decay.new_zeros(p.num_states, log_decay.shape[2])
    return total.index_add(0, document_ids(p.cu_seqlens, p.q.shape[1]), log_decay[0])


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """``[T]``: the document each token belongs to."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)
