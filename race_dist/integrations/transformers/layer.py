"""The RACE layer that replaces a transformers attention module and keeps its projections."""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from race_dist.integrations.transformers.batch_sequence import BatchSequence, CachedTokens, batch_sequence
from race_dist.integrations.transformers.cache import cache_layer
from race_dist.integrations.transformers.projections import Projections
from race_dist.nn import RaceAttention, RaceCarry, RaceConfig, Sequence
from race_dist.nn.norm import compute_dtype

LOADING = ContextVar("loading", default=False)  # whether from_pretrained is loading a model: it checks the settings afterwards
# attributes of an attention module that decoder blocks read, in transformers 4
READ_BY_BLOCKS = ("attention_type", "is_sliding")
SETTINGS_STEP = 512  # bytes: the size is rounded up, so that settings of different lengths have the same shape


class RaceSelfAttention(RaceAttention):
    """RACE Attention with the projections (and the query and key norms, if any) of a transformers attention module.

    The buffer ``race_settings`` (uint8) holds the settings as JSON. They are stored with the weights, and a checkpoint with
    other settings than the model's is refused.

    Args:
        attention: the module to replace.
        projections: the submodules to take over.
        config: config of the RACE layer; its widths must be the module's.
        layer_idx: index of the layer.
        inherit_rope: whether to apply the model's own rotary positions to queries and keys.
        device, dtype: of the new parameters.

    Raises:
        ValueError: the module is of an unknown kind.
    """

    race_settings: Tensor

    def __init__(
        self,
        attention: nn.Module,
        projections: Projections,
        config: RaceConfig,
        layer_idx: int,
        *,
        inherit_rope: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer_idx, init_weights=False, device=device, dtype=dtype)
        self.layer_idx, self.inherit_rope, self.is_causal = layer_idx, inherit_rope, True
        self.projections = projections
        for name in (*projections.names, *(projections.norms or ())):
            setattr(self, name, getattr(attention, name))
        for name in READ_BY_BLOCKS:
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        self.register_buffer("race_settings", _settings_to_tensor(self._settings()).to(device))

    def _build_projections(self, dim: int, output_gain: float, where: dict[str, Any]) -> None:
        """Build none: the projections are those of the replaced module."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.projections.project(self, x)

    def output(self, y: Tensor) -> Tensor:
        return self.projections.output(self, y)

    def _settings(self) -> dict[str, Any]:
        """All settings that affect what the layer computes with its weights."""
        return {
            "layer": self.layer_idx,
            "inherit_rope": self.inherit_rope,
            **self.config.model_dump(mode="json", exclude={"backend"}),
        }

    def settings_mismatch(self, stored: Tensor) -> str | None:
        """Why weights with these ``race_settings`` do not fit this layer, or None if they fit."""
        own, there = self._settings(), _settings_from_tensor(stored)
        if there is None:
            return (
                "the checkpoint has no settings of this RACE layer: its weights are missing, damaged, or of an earlier "
                "version; convert the softmax model again"
            )
        differ = [
            f"{name} {there.get(name)!r} there and {own.get(name)!r} here"
            for name in sorted({*own, *there})
            if there.get(name) != own.get(name)
        ]
        return f"the checkpoint's weights were trained with other settings of RACE: {', '.join(differ)}" if differ else None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = state_dict.get(f"{prefix}race_settings")
        is_loaded = isinstance(stored, Tensor) and not stored.is_meta and not LOADING.get()
        problem = self.settings_mismatch(stored) if isinstance(stored, Tensor) and is_loaded else None
        if problem is not None:
            error_msgs.append(f"{prefix.removesuffix('.')}: {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def reset_constants_on_weight_device(self) -> None:
        """Recompute the constants on the device of the weights, which a loader has placed there without ``.to``."""
        like: Tensor | None = next((p for p in self.parameters() if not p.is_meta), None)
        if like is None:  # offloaded weights: they are moved to this device when the layer runs
            device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
            like = torch.empty(0, device="cpu" if device is None else device, dtype=next(self.parameters()).dtype)
        self.reset_constants(like)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        race_sequence: BatchSequence | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The output ``[B, T, dim]`` of ``hidden_states [B, T, dim]``, and None in the place of attention weights.

        The carry is read from and written to a cache, which has one of three names in different versions of transformers.
        ``race_sequence`` is the description of the rows that the DecoderHook has computed for all layers. A layer that is
        called by itself computes it from the padding mask, positions and cu_seq_lens.
        """
        past = next((c for c in (cache, past_key_values, layer_past) if c is not None), None)
        batch, length, _ = hidden_states.shape
        cache_entry = None if past is None else cache_layer(past, self.layer_idx)
        if race_sequence is None:
            race_sequence = batch_sequence(
                batch,
                length,
                hidden_states.device,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seq_lens_q,
                cached=CachedTokens() if cache_entry is None else CachedTokens(cache_entry.seen, cache_entry.position),
                return_carry=cache_entry is not None,
            )
        if not race_sequence.sequence.return_carry:
            cache_entry = None  # in training a cache is created but never read
        sequence = self._with_inherited_rotation(race_sequence, position_embeddings, hidden_states)
        carry = None if cache_entry is None else self._carry_of(cache_entry.carry, hidden_states)
        y, carry = RaceAttention.forward(self, race_sequence.fold(hidden_states), carry, sequence)
        if cache_entry is not None:
            assert carry is not None
            cache_entry.advance(carry, length, _next_position(race_sequence.sequence, cache_entry.position))
        return race_sequence.unfold(y), None

    def _carry_of(self, carry: RaceCarry | None, x: Tensor) -> RaceCarry:
        """The carry to continue from, on the device of ``x``. Decoding starts with a float64 sketch: a float32 mass stops
        growing at 2**24 tokens."""
        if carry is None:
            return self.zero_carry(x.shape[0], device=x.device, dtype=x.dtype, state_dtype=torch.float64)
        return carry.with_tensors(tuple(t.to(x.device) for t in carry.tensors()))

    def _with_inherited_rotation(self, rows: BatchSequence, embeddings: tuple[Tensor, Tensor] | None, x: Tensor) -> Sequence:
        """The sequence, with the model's rotary cosines and sines if this layer inherits them."""
        if not self.inherit_rope or self.rope_base is None:
            return rows.sequence
        if embeddings is None:
            raise ValueError(
                f"layer {self.layer_idx} inherits the model's rotary positions but got no "
                "position_embeddings: convert it with inherit_rope=False"
            )
        dtype = compute_dtype(x)
        half = self.head_dim // 2
        cos, sin = (rows.fold(t.expand(x.shape[0], -1, -1))[..., :half].to(dtype) for t in embeddings)
        return replace(rows.sequence, rotations={(self.head_dim, self.rope_base, dtype): (cos, sin)})


def _next_position(sequence: Sequence, position: Tensor | int) -> Tensor | int:
    """The position of the token after the sequence, whose first token has ``position``."""
    if sequence.key_mask is None and sequence.cu_seqlens is None:
        return position + sequence.length
    return sequence.end_position()


def _settings_to_tensor(settings: dict[str, Any]) -> Tensor:
    data = json.dumps(settings, sort_keys=True).encode()
    size = -(-len(data) // SETTINGS_STEP) * SETTINGS_STEP
    return torch.frombuffer(bytearray(data.ljust(size)), dtype=torch.uint8)


def _settings_from_tensor(stored: Tensor) -> dict[str, Any] | None:
    """The inverse of :func:`_settings_to_tensor`; None for any other tensor."""
    try:
        found = json.loads(bytes(stored.detach().cpu().to(torch.uint8).tolist()))
    except (ValueError, RuntimeError, NotImplementedError):
        return None
    return found if isinstance(found, dict) else None
