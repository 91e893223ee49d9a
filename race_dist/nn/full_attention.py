"""Full softmax attention: quadratic time, and a carry of every key and value so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.layer_checks import check_layer_call, check_zero_carry
from race_dist.nn.mixing_layer import LayerCarry
from race_dist.nn.registry import BuildOptions, LayerKind, ModelShape
from race_dist.nn.sequence import Sequence
from race_dist.nn.short_conv import ConvolvedCarry
from race_dist.nn.softmax import SoftmaxAttention, SoftmaxOptions, softmax_options


@dataclass(frozen=True)
class HistoryCarry(LayerCarry):
    """Every key and value so far: the carry of full softmax attention. It grows with the sequence, so it serves decoding only.

    Attributes:
        keys, values: ``[B, n, Hkv, D]``.
        visible: ``[B, n]`` bool: False for padding and for documents that have ended.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor

    def zero(self) -> Self:
        return self.with_tensors(tuple(t[:, :0] for t in self.tensors()))

    def combine(self, later: Self) -> Self:
        checks.instance("later", later, HistoryCarry)
        pairs = zip(self.tensors(), later.tensors(), strict=True)
        return self.with_tensors(tuple(torch.cat([a.to(b.dtype), b], 1) for a, b in pairs))

    def with_reset(self) -> Self:
        raise NotImplementedError("a history hides earlier documents by its mask: nothing combines it across documents")

    def tensors(self) -> tuple[Tensor, ...]:
        """``(keys, values, visible)``."""
        return self.keys, self.values, self.visible

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        return type(self)(*tensors)

    def row_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        return tuple((None, *t.shape[2:]) for t in self.tensors())


pytree.register_pytree_node(
    HistoryCarry,
    lambda h: ([h.keys, h.values, h.visible], None),
    lambda leaves, _: HistoryCarry(*leaves),
    serialized_type_name="race_dist.HistoryCarry",
)


FullCarry = HistoryCarry | ConvolvedCarry[HistoryCarry]


class FullAttention(SoftmaxAttention):
    """Each token sees all tokens before it (all tokens, if not ``causal``), in quadratic time and with a carry that grows.

    Under a group every rank gathers the keys and values of all ranks.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, *, causal: bool = True, **options: Unpack[SoftmaxOptions]
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        self.causal = checks.flag("causal", causal)

    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> FullCarry:
        """The carry of no tokens; keys and values have ``dtype`` (``state_dtype`` is unused)."""
        batch = check_zero_carry(batch, device, dtype, state_dtype)
        carry: FullCarry = self._join_carry(self._empty_history(batch, device, dtype), self._zero_tail(batch, device, dtype))
        return carry

    def _empty_history(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> HistoryCarry:
        k = torch.zeros(batch, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        return HistoryCarry(k, k, torch.zeros(batch, 0, device=device, dtype=torch.bool))

    def forward(
        self, x: Tensor, carry: FullCarry | None = None, sequence: Sequence | None = None
    ) -> tuple[Tensor, FullCarry | None]:
        """``x [B, T, dim]`` to the same, and the outgoing carry."""
        check_layer_call(
            self,
            x,
            carry,
            sequence,
            dim=self.q_proj.in_features,
            weight=self.q_proj.weight,
            carry_type=ConvolvedCarry if self.config.short_conv else HistoryCarry,
        )
        sequence = sequence or Sequence.of_one_document(x, carry, self.rope_base)
        x = sequence.mask_padding(x)
        history, tail = self._split_carry(carry)
        (q, k, v), tail = self._heads(x, tail, sequence)
        plain = history is None and sequence.group is None and sequence.cu_seqlens is None and sequence.key_mask is None
        history = self._empty_history(x.shape[0], x.device, v.dtype) if history is None else history
        real = sequence.key_mask if sequence.key_mask is not None else k.new_ones(x.shape[:2], dtype=torch.bool)
        whole = history.combine(HistoryCarry(*(sequence.gather(t) for t in (k, v, real))))
        queries, keys, values = (t.transpose(1, 2) for t in (q, whole.keys, whole.values))
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if plain else self._mask(sequence, history, whole),
            is_causal=plain and self.causal,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        out = out.transpose(1, 2)
        if sequence.key_mask is not None:
            out = torch.where(sequence.key_mask[..., None, None], out, 0)  # padding has no output and no gradient
        y = self.output(out, x)
        return y, self._join_carry(self._outgoing(sequence, history, whole), tail) if sequence.return_carry else None

    def _mask(self, sequence: Sequence, carry: HistoryCarry, whole: HistoryCarry) -> Tensor:
        """``[B, 1, T, n + total]`` bool. A query always sees its own key, so that no row of the softmax is empty."""
        before, device = carry.visible.shape[1], whole.visible.device
        row = before + sequence.rows()[:, None]
        column = torch.arange(whole.visible.shape[1], device=device)
        seen = column <= row if self.causal else torch.ones_like(column <= row)
        if sequence.cu_seqlens is not None:
            document = torch.searchsorted(sequence.cu_seqlens[1:-1].clone(), column - before, right=True)
            seen = seen & (document[row] == document)
        return (seen & whole.visible[:, None] | (column == row))[:, None]

    @staticmethod
    def _outgoing(sequence: Sequence, carry: HistoryCarry, whole: HistoryCarry) -> HistoryCarry:
        if sequence.cu_seqlens is None or sequence.cu_seqlens.numel() == 2:
            return whole
        column = torch.arange(whole.visible.shape[1], device=whole.visible.device) - carry.visible.shape[1]
        return HistoryCarry(whole.keys, whole.values, whole.visible & (column >= sequence.cu_seqlens[-2]))


class FullKind(LayerKind):
    """S: full softmax attention, with ``ModelConfig.softmax``."""

    letter = "S"
    name = "full softmax"
    options_name = "softmax"
    direction = "either"
    fixed_size_carry = False
    carry_text = "every key and value so far"

    def build(self, model: ModelShape, layer: int, *, causal: bool, **options: Unpack[BuildOptions]) -> FullAttention:
        return FullAttention(model.dim, model.num_heads, model.kv_heads, causal=causal, **softmax_options(model) | options)
