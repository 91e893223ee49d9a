"""Sliding-window softmax attention in linear time; its carry is the tail of its keys and values."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist import checks
from race_dist.nn.layer_checks import check_layer_call, check_zero_carry
from race_dist.nn.registry import BuildOptions, LayerKind, ModelShape
from race_dist.nn.sequence import Sequence
from race_dist.nn.short_conv import ConvolvedCarry
from race_dist.nn.softmax import SoftmaxAttention, SoftmaxOptions, softmax_options
from race_dist.nn.tail_carry import SpanWithTail, TailCarry, run_with_tail

WindowCarry = TailCarry | ConvolvedCarry[TailCarry]
MAX_BLOCKS = 2**15  # per call: CUDA kernels map batch rows to a grid dimension of at most 65535


class WindowAttention(SoftmaxAttention):
    """Each token sees itself and the ``window - 1`` tokens before it, in linear time; with grouped queries.

    The carry is the tail of the last ``window - 1`` keys and values and of their padding mask; with a convolution also the
    tail of its inputs.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, window: int, **options: Unpack[SoftmaxOptions]) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        if checks.integer("window", window, maximum=2**40) < 2:
            raise ValueError(f"window must be at least 2 (a token and the one before it); got {window}")
        self.window = window

    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> WindowCarry:
        """The carry of no tokens; keys and values have ``dtype`` (``state_dtype`` is unused)."""
        batch = check_zero_carry(batch, device, dtype, state_dtype)
        k = torch.zeros(batch, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        seen = TailCarry.empty((k, k, torch.zeros(batch, 0, device=device, dtype=torch.bool)), self.window - 1)
        carry: WindowCarry = self._join_carry(seen, self._zero_tail(batch, device, dtype))
        return carry

    def forward(
        self, x: Tensor, carry: WindowCarry | None = None, sequence: Sequence | None = None
    ) -> tuple[Tensor, WindowCarry | None]:
        """``x [B, T, dim]`` to the same, and the outgoing carry."""
        check_layer_call(
            self,
            x,
            carry,
            sequence,
            dim=self.q_proj.in_features,
            weight=self.q_proj.weight,
            carry_type=ConvolvedCarry if self.config.short_conv else TailCarry,
        )
        sequence = sequence or Sequence.of_one_document(x, carry, self.rope_base)
        x = sequence.mask_padding(x)
        seen, tail = self._split_carry(carry)
        (q, k, v), tail = self._heads(x, tail, sequence)
        masked = sequence.key_mask
        real = masked if masked is not None else k.new_ones(x.shape[:2], dtype=torch.bool)

        def attend(piece: SpanWithTail) -> tuple[Tensor]:
            keys, values, kept = piece.tensors
            plain = piece.documents is None and masked is None
            return (window_attention(piece.of(q), keys, values, kept & piece.held, piece.documents, plain=plain),)

        (out,), seen = run_with_tail((k, v, real), self.window - 1, seen, sequence, attend)
        return self.output(out, x), self._join_carry(seen, tail)


def window_attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, documents: Tensor | None = None, *, plain: bool = False
) -> Tensor:
    """Softmax attention in which query t sees keys t to t + n.

    Queries are processed in blocks of up to ``n + 1``, each with the keys of its own block and the ``n`` keys before it. A
    query always sees its own key, visible or not, so that no row of the softmax is empty.

    Args:
        q: ``[B, T, Hq, D]``.
        keys, values: ``[B, n + T, Hkv, D]``: those carried in, then those of the piece.
        visible: ``[B, n + T]`` bool.
        documents: ``[n + T]``: the document of each key, or None if all are in one.
        plain: whether every key of the piece is visible and in one document: then only the first block needs its own mask.

    Returns:
        ``[B, T, Hq, D]``.
    """
    length, before = q.shape[1], keys.shape[1] - q.shape[1]
    block = min(max(length, 1), before + 1)
    padding = (
        -length % block if length else block
    )  # an empty piece still reads its initial tail, so that all ranks exchange gradients
    q = F.pad(q, (0, 0, 0, 0, 0, padding))
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (keys, values))
    head = block if plain and length > block else q.shape[1]
    visible = F.pad(visible, (0, padding))[:, : head + before]
    if documents is not None:
        documents = F.pad(documents, (0, padding), value=-1)
    mask = _block_masks(visible, documents, block, before)
    out = _attend_blocks(q[:, :head], keys[:, : head + before], values[:, : head + before], mask, block, before)
    if head < q.shape[1]:
        mask = _band(block, before, q.device)
        out = torch.cat([out, _attend_blocks(q[:, head:], keys[:, head:], values[:, head:], mask, block, before)], 1)
    return out[:, :length]


def _band(block: int, before: int, device: torch.device) -> Tensor:
    """``[1, C, C + n]``: query i of a block sees keys i to i + n of the block's keys."""
    distance = torch.arange(block + before, device=device) - torch.arange(block, device=device)[:, None]
    return ((distance >= 0) & (distance <= before))[None]


def _block_masks(visible: Tensor, documents: Tensor | None, block: int, before: int) -> Tensor:
    """``[B * blocks, C, C + n]``."""
    reach = block + before
    seen = visible.unfold(1, reach, block)[:, :, None]  # [B, blocks, 1, C + n]
    if documents is not None:
        stretch = documents.unfold(0, reach, block)  # [blocks, C + n]
        seen = seen & (stretch[:, before:, None] == stretch[:, None, :])
    band = _band(block, before, visible.device)
    own = torch.arange(reach, device=visible.device) == before + torch.arange(block, device=visible.device)[:, None]
    return (band & seen | own).flatten(0, 1)


def _attend_blocks(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, block: int, before: int) -> Tensor:
    """Attention with blocks as batch rows and the queries of a group as rows of one head, as every SDPA kernel supports."""
    batch, heads = q.shape[0], keys.shape[2]
    q = q.unflatten(1, (-1, block)).unflatten(3, (heads, -1))  # [B, blocks, C, Hkv, G, D]
    blocks, group = q.shape[1], q.shape[4]
    rows = q.permute(0, 1, 3, 4, 2, 5).reshape(batch * blocks, heads, group * block, -1)
    near_keys, near_values = (x.unfold(1, block + before, block).mT.flatten(0, 1) for x in (keys, values))
    out = _attend(rows, near_keys, near_values, mask.repeat(1, group, 1)[:, None])
    out = out.view(batch, blocks, heads, group, block, -1).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, blocks * block, heads * group, -1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` over any number of batch rows; the mask has as many rows or one row."""
    count = q.shape[0]
    if count <= MAX_BLOCKS:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    masks = mask.split(MAX_BLOCKS) if mask.shape[0] == count else [mask] * -(-count // MAX_BLOCKS)
    pieces = zip(*(x.split(MAX_BLOCKS) for x in (q, keys, values)), masks, strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c, attn_mask=m) for a, b, c, m in pieces])


class WindowKind(LayerKind):
    """W: sliding-window softmax attention, with ``ModelConfig.softmax`` and ``window``."""

    letter = "W"
    name = "sliding-window softmax"
    options_name = "softmax"
    direction = "causal"

    def build(self, model: ModelShape, layer: int, *, causal: bool, **options: Unpack[BuildOptions]) -> WindowAttention:
        return WindowAttention(model.dim, model.num_heads, model.kv_heads, model.window, **softmax_options(model) | options)
