"""Convolution, window and full softmax attention against their definitions, token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from race_dist.nn import FullAttention, Sequence, ShortConv, WindowAttention, initialize
from race_dist.nn.window import window_attention

F64 = torch.float64


def softmax_over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``q [B, T, Hq, D]``, ``seen [B, T, T]``."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize(("length", "window"), [(1, 4), (3, 4), (4, 4), (17, 5), (24, 6), (9, 30)])
@pytest.mark.parametrize("plain", [True, False])
def test_window_attention(length: int, window: int, plain: bool) -> None:
    before = window - 1
    q = torch.randn(2, length, 4, 6, dtype=F64)
    k, v = torch.randn(2, 2, before + length, 2, 6, dtype=F64)
    visible = torch.ones(2, before + length, dtype=torch.bool)
    visible[0, : before // 2] = False
    documents = None
    if not plain:
        visible[1, before + length // 2] = False
        documents = torch.tensor([0] * (before + length // 3) + [1] * (length - length // 3))
    actual = window_attention(q, k, v, visible, documents, plain=plain)
    i, j = before + torch.arange(length)[:, None], torch.arange(before + length)
    seen = (j <= i) & (j > i - window) & visible[:, None]
    if documents is not None:
        seen &= documents[before:, None] == documents
    expected = softmax_over(q, k, v, seen | (i == j))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plain", [True, False])
def test_more_blocks_than_one_call_takes(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, (k, v) = torch.randn(2, 50, 2, 4, dtype=F64), torch.randn(2, 2, 53, 2, 4, dtype=F64)
    visible = torch.ones(2, 53, dtype=torch.bool)
    expected = window_attention(q, k, v, visible, plain=plain)
    monkeypatch.setattr("race_dist.nn.window.MAX_BLOCKS", 7)
    torch.testing.assert_close(window_attention(q, k, v, visible, plain=plain), expected)


def layer_seen(layer: WindowAttention | FullAttention, total: int, cu: list[int], mask: Tensor | None) -> Tensor:
    i, j = torch.arange(total)[:, None], torch.arange(total)
    document = torch.bucketize(j, torch.tensor(cu[1:-1], dtype=torch.int64), right=True)
    seen = (j <= i) & (document[:, None] == document)
    rank = j[None] if mask is None else mask.cumsum(1)  # a window counts real tokens
    if isinstance(layer, WindowAttention):
        seen = seen & (rank[:, None] > rank[:, :, None] - layer.window)
    return (seen if mask is None else seen & mask[:, None]) | (i == j)


@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_against_a_mask_and_cut_anywhere(kind: str, packed: bool, masked: bool) -> None:
    total, batch = 23, 1 if packed else 2
    make = (lambda **o: WindowAttention(12, 6, 2, 7, **o)) if kind == "window" else (lambda **o: FullAttention(12, 6, 2, **o))
    layer = make(dtype=F64, head_dim=4)
    x = torch.randn(batch, total, 12, dtype=F64, requires_grad=True)
    cu = [0, 0, 4, 15, 15, 23] if packed else [0, total]
    mask = torch.rand(batch, total) > 0.3 if masked else None
    whole = Sequence.of(total, cu_seqlens=torch.tensor(cu) if packed else None, key_mask=mask)
    y, _ = layer(x, None, whole)
    q, k, v = layer.heads(x, whole)
    seen = layer_seen(layer, total, cu, mask)
    expected = layer.o_proj(softmax_over(q, k, v, seen.expand(batch, -1, -1)).flatten(2))
    torch.testing.assert_close(y, expected if mask is None else torch.where(mask[..., None], expected, 0))

    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, x, gradient)[0]
    carry, parts = None, []
    for start, stop in itertools.pairwise([0, 1, 4, 4, 12, 15, 23]):
        begin, inside = max(c for c in cu if c <= start), None
        position = torch.tensor(start - begin) if mask is None else mask[:, begin:start].sum(1)
        if packed:
            inside = torch.tensor([0, *(c - start for c in cu[1:-1] if start <= c < stop), stop - start])
        sequence = Sequence.of(
            stop - start, cu_seqlens=inside, position=position, key_mask=None if mask is None else mask[:, start:stop]
        )
        part, carry = layer(x[:, start:stop], carry, sequence)
        parts.append(part)
    pieces = torch.cat(parts, 1)
    torch.testing.assert_close(pieces, y)
    torch.testing.assert_close(torch.autograd.grad(pieces, x, gradient)[0], expected)


def test_conv() -> None:
    conv = ShortConv(3, 4, dtype=F64)
    initialize(conv, 0)
    x = torch.randn(2, 3 + 8, 3, dtype=F64)
    documents = torch.tensor([0] * 6 + [1] * 5)
    y, packed = conv(x), conv(x, documents)
    for t in range(8):
        taps = torch.arange(t, t + 4)
        torch.testing.assert_close(y[:, t], (conv.weight * x[:, taps]).sum(1))
        same = (documents[taps] == documents[t + 3])[:, None]
        torch.testing.assert_close(packed[:, t], (conv.weight * x[:, taps] * same).sum(1))


def test_errors() -> None:
    with pytest.raises(ValueError, match="window must be at least 2"):
        WindowAttention(8, 2, 2, 1)
    with pytest.raises(ValueError, match="num_heads = 3 must be a multiple of num_kv_heads = 2"):
        FullAttention(9, 3, 2)
    with pytest.raises(ValueError, match="dim = 10 is no multiple of num_heads = 4"):
        FullAttention(10, 4, 2)
