"""A transformers attention module whose attention is RACE Attention: the projections stay, the rest is new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from race_dist.integrations.transformers.cache import cache_layer
from race_dist.integrations.transformers.rows import Rows, rows_of
from race_dist.nn import RaceAttention, RaceCarry, RaceConfig, Sequence
from race_dist.nn.norm import compute_dtype

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")  # Llama, Qwen, Mistral and their kin
FUSED = ("query_key_value", "dense")  # GPT-NeoX


class RaceSelfAttention(RaceAttention):
    """RACE Attention with the projections (and the query and key norms, if any) of a transformers attention module.

    Args:
        attention: the module to replace.
        config: of the RACE layer; its widths must be the module's.
        layer_idx: index of the layer.
        inherit_rope: whether the model's own rotary positions turn queries and keys.
        device, dtype: of the new parameters.

    Raises:
        ValueError: the module is of no known kind.
    """

    query_key_value: nn.Module
    dense: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: nn.Module, config: RaceConfig, layer_idx: int, *, inherit_rope: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, layer_idx, draw=False, device=device, dtype=dtype)
        self.layer_idx, self.inherit_rope, self.is_causal = layer_idx, inherit_rope, True
        self._fused = hasattr(attention, FUSED[0])
        for name in (*(FUSED if self._fused else SEPARATE), *(n for n in ("q_norm", "k_norm") if hasattr(attention, n))):
            setattr(self, name, getattr(attention, name))

    def _build_projections(self, dim: int, output_gain: float, where: dict[str, Any]) -> None:
        """None: they are the replaced module's."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._fused:
            q, k, v = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(3)
            return q.flatten(2), k.flatten(2), v.flatten(2)
        q, k, v = super().project(x)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(2)
        return q, k, v

    def output(self, y: Tensor) -> Tensor:
        projected: Tensor = self.dense(y) if self._fused else super().output(y)
        return projected

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None,  # type: ignore[override]
                attention_mask: Tensor | None = None, cache: Any = None, past_key_values: Any = None,
                layer_past: Any = None, position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
                race_rows: Rows | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        """``hidden_states [B, T, dim]`` to the same, and no attention weights.

        The past comes from and goes to a cache by whichever name this version of transformers gives it. ``race_rows`` is
        what :func:`attach` has found out for all layers; a layer called by itself takes padding masks, positions and
        cu_seq_lens.
        """
        past = next((c for c in (cache, past_key_values, layer_past) if c is not None), None)
        batch, length, _ = hidden_states.shape
        store = None if past is None else cache_layer(past, self.layer_idx)
        if race_rows is None:
            race_rows = rows_of(batch, length, hidden_states.device, attention_mask=attention_mask, position_ids=position_ids,
                                cu_seqlens=cu_seq_lens_q, past=0 if store is None else store.seen, final=store is not None)
        if not race_rows.sequence.final:
            store = None  # in training a cache is made that nobody reads
        sequence = self._turned(race_rows, position_embeddings, hidden_states)
        carry = None if store is None else self._past(store.carry, hidden_states)
        y, carry = RaceAttention.forward(self, race_rows.fold(hidden_states), carry, sequence)
        if store is not None:
            assert carry is not None
            store.advance(carry, length)
        return race_rows.unfold(y), None

    def _past(self, carry: RaceCarry | None, x: Tensor) -> RaceCarry:
        """The carry to go on from, on the device of ``x``; decoding starts from a float64 sketch, whose mass keeps
        growing past 2**24 tokens."""
        if carry is None:
            return self.zero_carry(x.shape[0], device=x.device, dtype=x.dtype, state_dtype=torch.float64)
        return carry.with_tensors(tuple(t.to(x.device) for t in carry.tensors()))

    def _turned(self, rows: Rows, embeddings: tuple[Tensor, Tensor] | None, x: Tensor) -> Sequence:
        """The sequence, with the model's cosines and sines where this layer inherits them."""
        if not self.inherit_rope or self.rope_base is None:
            return rows.sequence
        if embeddings is None:
            raise ValueError(f"layer {self.layer_idx} inherits the model's rotary positions but was given no "
                             "position_embeddings: convert it with inherit_rope=False")
        dtype = compute_dtype(x)
        half = self.head_dim // 2
        cos, sin = (rows.fold(t.expand(x.shape[0], -1, -1))[..., :half].to(dtype) for t in embeddings)
        return replace(rows.sequence, rotations={(self.head_dim, self.rope_base, dtype): (cos, sin)})
