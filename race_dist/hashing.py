"""Soft locality-sensitive hashing: hyperplanes, buckets and the feature map (arXiv 2510.04008, section 3)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from race_dist import checks

MAX_PLANES = 10  # 2**10 buckets per table: no document fills a larger table
MAX_NUMBERS = 2**31  # numbers in the hyperplanes of one call: 16 GiB while they are drawn


def bucket_signs(num_planes: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The signs of the buckets, ``c [R, P]`` with ``R = 2**P``: +1 where bit p of r, most significant first, is 1, else -1."""
    r = torch.arange(2**num_planes, device=device)
    bits = r[:, None] >> torch.arange(num_planes - 1, -1, -1, device=device) & 1
    return (2 * bits - 1).to(dtype)


def sample_planes(
    num_tables: int,
    num_planes: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    seed: int,
    layer: int = 0,
    head_offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Hyperplanes with rows drawn i.i.d. from N(0, I), the same on every device and rank.

    They come from a counter-based generator (Philox) addressed by ``(seed, layer, global head)``: a rank that holds heads 8 to
    15 gets the rows that a rank with all heads has there, whatever either drew before. Values are rounded to bfloat16, so that
    every backend projects with the same planes. To change them in place, use ``torch.no_grad()``, not ``.data``: PyTorch does
    not count the latter as a change.

    Args:
        num_tables: ``L >= 1``.
        num_planes: ``P``, 1 to 10; a table has ``2**P`` buckets.
        head_dim: ``D >= 1``.
        num_heads: number of key/value heads to draw for; None draws one set, that of head ``head_offset``.
        seed: ``0 <= seed < 2**64``.
        layer: index of the layer, 0 or more.
        head_offset: global index of the first head drawn.
        device, dtype: of the result.

    Returns:
        ``[L, P, D]`` when ``num_heads`` is None, ``[num_heads, L, P, D]`` otherwise.

    Raises:
        ValueError: an argument is out of its range, or there is no such device.
        TypeError: an argument is not an integer, or the dtype is not floating point.
    """
    num_tables, num_planes = check_tables_and_planes(num_tables, num_planes)
    head_dim = checks.integer("head_dim", head_dim, minimum=1, maximum=2**31 - 1)
    number = 1 if num_heads is None else checks.integer("num_heads", num_heads, minimum=1, maximum=2**31 - 1)
    seed = checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
    layer = checks.integer("layer", layer, minimum=0, maximum=2**63 - 1)
    head_offset = checks.integer("head_offset", head_offset, minimum=0, maximum=2**63 - number)
    dtype, place = checks.dtype("dtype", dtype), checks.device("device", device)
    count = num_tables * num_planes * head_dim
    if count * number > MAX_NUMBERS:
        raise ValueError(
            f"num_tables = {checks.short_repr(num_tables)} times num_planes = {num_planes}, head_dim = {head_dim} and "
            f"num_heads = {number} are more than {MAX_NUMBERS:,} numbers of hyperplanes: make one smaller"
        )
    heads = [_standard_normal(count, seed, layer, head_offset + h) for h in range(number)]
    narrow = torch.from_numpy(np.stack(heads)).to(torch.bfloat16).to(device=place)
    narrow = narrow.view(-1, num_tables, num_planes, head_dim)
    narrow = narrow if num_heads is not None else narrow[0]
    planes = narrow.to(dtype)
    if planes is not narrow and not planes.is_inference():  # writes to inference tensors are not counted
        setattr(planes, _NARROW, (narrow, planes._version))
    return planes


_NARROW = "_race_dist_bfloat16"


def as_bfloat16(planes: Tensor) -> Tensor:
    """The same planes in bfloat16, if that rounds nothing, else ``planes``; kernels then project once instead of twice.

    Nothing is rounded where :func:`sample_planes` returned this tensor, it has not been written to since, and it requires no
    gradient.
    """
    narrow: Tensor | None
    narrow, version = getattr(planes, _NARROW, (None, 0))
    if narrow is None or planes.is_inference() or planes.requires_grad:
        return planes
    return narrow if version == planes._version and narrow.shape == planes.shape else planes


def _standard_normal(count: int, seed: int, layer: int, head: int) -> np.ndarray:
    """``count`` draws from N(0, 1), float64, by Box-Muller over Philox's raw words.

    Only the raw words are taken from numpy: their stream is fixed for good, that of its ``standard_normal`` is not.
    """
    words = np.random.Philox(key=[seed, layer], counter=[0, 0, head, 0]).random_raw(2 * ((count + 1) // 2))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never 0
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * math.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def check_tables_and_planes(num_tables: int, num_planes: int) -> tuple[int, int]:
    """``L`` and ``P``; ValueError or TypeError unless they are integers with ``L >= 1`` and ``1 <= P <= 10``."""
    return (
        checks.integer("num_tables", num_tables, minimum=1),
        checks.integer("num_planes", num_planes, minimum=1, maximum=MAX_PLANES),
    )


def soft_hash(x: Tensor, planes: Tensor, beta: Tensor | float) -> Tensor:
    """The feature map ``phi``: how much of a row falls into each bucket.

    ``u = tanh(planes x)``, ``phi[l, r] = prod_p sigmoid(2 beta c[r, p] u[l, p])``: a softmax over the corners of a
    table, written as the product it factors into (P sigmoids in place of 2**P exponentials, and no cancellation).

    Args:
        x: ``[..., H, T, D]``: rows to hash, heads before tokens.
        planes: ``[L, P, D]`` or ``[H, L, P, D]``.
        beta: sharpness, a float, a scalar tensor or ``[H]``.

    Returns:
        ``[..., H, T, S]`` with ``S = L * 2**P``, table-major, then corner; each table's features sum to 1.
    """
    u = project(x, planes).tanh()
    if isinstance(beta, Tensor) and beta.dim() == 1:
        beta = beta[:, None, None, None]
    return bucket_probabilities(2 * beta * u).flatten(-2)


def project(x: Tensor, planes: Tensor) -> Tensor:
    """``<planes[l, p], x>`` as ``[..., H, T, L, P]`` for x ``[..., H, T, D]``."""
    tables, number = planes.shape[-3:-1]
    return (x @ planes.flatten(-3, -2).mT).unflatten(-1, (tables, number))


def bucket_probabilities(t: Tensor) -> Tensor:
    """``prod_p sigmoid(c[r, p] t[..., p])`` as ``[..., R]`` for t ``[..., P]``."""
    pair = torch.stack([torch.sigmoid(-t), torch.sigmoid(t)], dim=-1)  # [..., P, 2]
    phi = pair[..., 0, :]
    for p in range(1, t.shape[-1]):
        phi = (phi[..., :, None] * pair[..., p, None, :]).flatten(-2)
    return phi
