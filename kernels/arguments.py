"""Kernel arguments as named tuples: strided tensors, and the groups of arguments that always travel together.

A NamedTuple keeps its field names inside a kernel; Triton passes its fields as separate parameters. Shapes are those of
docs/notation.md: B batch rows (N documents when packed), T tokens, H key/value heads, Hq query heads, L tables of P planes,
S features, D and Dv columns.

Take the tensors of a nested group out of it before the first loop: from there on Triton 3.6 forgets a stride that is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Pointer = Any  # a Tensor on the host, a pointer in a kernel


class Rows(NamedTuple):
    """A strided tensor ``[B, T, H, X]``."""

    ptr: Pointer
    stride_b: int
    stride_t: int
    stride_h: int
    stride_x: int


class Scalars(NamedTuple):
    """A strided tensor ``[B, T, H]``: one number per token and head."""

    ptr: Pointer
    stride_b: int
    stride_t: int
    stride_h: int


class Planes(NamedTuple):
    """The hyperplanes ``[H, L, P, D]``."""

    ptr: Pointer
    stride_h: int
    stride_l: int
    stride_p: int
    stride_d: int


class KeyMask(NamedTuple):
    """``[B, T]`` as bytes: 0 where a token is absent."""

    ptr: Pointer
    stride_b: int
    stride_t: int


class Inputs(NamedTuple):
    """What the attention is a function of, besides the initial state."""

    q: Rows  # [B, T, Hq, D]
    k: Rows  # [B, T, H, D]
    v: Rows  # [B, T, H, Dv]
    planes: Planes  # [H, L, P, D]
    beta: Pointer  # [H] float32
    log_decay: Scalars | None  # [B, T, H]
    key_mask: KeyMask | None  # [B, T]


class Tiling(NamedTuple):
    """How sequences are divided into tiles. ``table [tiles, 4]`` (packed documents; else None): document, first token, end,
    whether the tile is its document's last. Otherwise every row has ``ceil(T / TILE)`` tiles."""

    table: Pointer
    T: int
    TILE: int
    H: int


class Sketch(NamedTuple):
    """A sketch: values ``[N, H, S, Dv]`` and mass ``[N, H, S]``. (A Triton tuple has a field ``values`` of its own.)"""

    values_ptr: Pointer
    mass_ptr: Pointer


class TileStates(NamedTuple):
    """One state per tile, ``[tiles, H, S (Dv + 1)]`` float32 (values, then mass), and the total log decay of each tile,
    ``[tiles, H]`` float64 in binary units (None without decay)."""

    states: Pointer
    decays: Pointer


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    den: Scalars | None  # [B, T, Hq] float32, normalization "global"
    states: Pointer  # [tiles, H, S (Dv + 1)], the state before each tile (not causal: [N, ...], the totals)
    final: Sketch


class QueryGradients(NamedTuple):
    """What the backward pass over the queries writes."""

    dq: Rows  # [B, T, Hq, D]; of pipelines with partial gradients: of the projections, [B, T, NVB Hq, LPB]
    h: Scalars | None  # [B, T, NVB Hq], the gradient of the denominators ("global")
    dcumulative: Scalars | None  # [B, T, NVB H], sum over the features of phi(q) dphi(q) (decay, not "global")
    suffix: TileStates  # each tile's sum of the suffix state
    dbeta: Pointer  # [tiles, H, NVB], one number per program
    dplanes: Pointer  # [tiles, H, NSB, LPB, BD], one part per program, or None


class KeyGradients(NamedTuple):
    """What the backward pass over the keys writes."""

    dk: Rows  # [B, T, H, D]; of pipelines with partial gradients: of the projections, [B, T, NVB H, LPB]
    dv: Rows  # [B, T, H, Dv]
    dlog_decay: Scalars | None  # [B, T, NVB H]
    dbeta: Pointer  # [tiles, H, NVB], one number per program
    dplanes: Pointer  # [tiles, H, NSB, LPB, BD], one part per program, or None


class SequenceTiles(NamedTuple):
    """Which tiles a sequence has: ``first [N + 1]`` (packed documents), or ``per_row`` of them in each row."""

    first: Pointer
    per_row: int


def rows(x: Tensor) -> Rows:
    """A tensor ``[B, T, H, X]`` as kernels take it."""
    return Rows(x, *x.stride())


def scalars(x: Tensor | None) -> Scalars | None:
    """A tensor ``[B, T, H]`` as kernels take it; None for one that is not there (also given as an empty tensor)."""
    return None if x is None or x.dim() != 3 else Scalars(x, *x.stride())
