"""RaceSelfAttention: Megatron's self-attention with what RACE computes from the layer's input: decay and output gate."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from race_dist.integrations.megatron.config import require_race_config
from race_dist.integrations.megatron.core_attention import RaceCoreAttention
from race_dist.integrations.megatron.heads import HeadModule
from race_dist.nn.decay import LONG_TIME_CONSTANT, decay_time_constants
from race_dist.nn.initialization import seeded_normal
from race_dist.nn.norm import compute_dtype
from race_dist.nn.output_gate import apply_output_gate
from race_dist.parallel import group_rank, group_size


class TokenDecay(HeadModule):
    """How much each head forgets at each token, computed from the layer's input in float32.

    Weight and bias are whole on every tensor-parallel rank: that costs less than gathering the input, and under sequence
    parallelism each rank computes its own rows for all heads.
    """

    def __init__(self, config: Any, layer_number: int, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        race, heads = config.race(), config.race_query_groups
        rates = (1 / torch.tensor(decay_time_constants(heads, LONG_TIME_CONSTANT), dtype=torch.float64)).expm1().log()
        weight = seeded_normal(
            (heads, config.hidden_size), config.hidden_size**-0.5, race.seed, f"race.{layer_number - 1}.decay_proj.weight"
        )
        self.add_parameter("weight", weight, divided=False)
        self.add_parameter("bias", rates, divided=False)
        for parameter in self.parameters():  # its gradient is this rank's rows': finalize_model_grads adds them up
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """``[s (or s/tp), b, h]`` to this rank's log decays ``[s, b, groups]``, at most 0."""
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            decay = -F.softplus(F.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype)))
        if self.config.sequence_parallel:
            decay = gather_from_sequence_parallel_region(decay, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            decay = self.summed_over_ranks(decay)
        return decay.narrow(2, self.share.first_kv_head, self.share.kv_heads)


class RaceSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention around :class:`RaceCoreAttention`.

    The decay of each token goes to core_attention as its attention_bias; the gate is Megatron's output gate (a part of
    linear_qkv) with race_gate_activation. The layer's input must be normalised before it: no layer norm fused into linear_qkv.

    Raises:
        TypeError: the config has no race_* fields.
        ValueError: in the forward pass, what RACE layers cannot do: inference contexts, cross attention, rotary
            positions of zigzag shards on contiguous ones.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config = require_race_config(config, "RaceSelfAttention")
        if config.race_output_gate and not config.attention_output_gate:
            config = copy.copy(config)  # softmax layers of the same model have none
            config.attention_output_gate = True
        super().__init__(config, submodules, layer_number, attn_mask_type, *args, **kwargs)
        if not isinstance(self.core_attention, RaceCoreAttention):
            raise ValueError(
                f"core_attention of a RACE layer is {type(self.core_attention).__name__}: something has replaced "
                "it in the spec (--attention-backend local does)"
            )
        self.decay = TokenDecay(config, layer_number, self.pg_collection.tp) if config.race_decay == "token" else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        attention_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's: ``[s, b, h]`` to output and bias."""
        if inference_context is not None or kwargs.get("inference_params") is not None:
            raise ValueError(
                "RACE layers do not decode inside Megatron's inference contexts: these cache keys and values, "
                "and dynamic batching does not call core_attention at all; decode with race_dist.models"
            )
        if key_value_states is not None:
            raise ValueError("RACE layers attend to their own sequence only: key_value_states must be None")
        if attention_bias is not None:
            raise ValueError("attention_bias came to a RACE layer, which has no logits to add it to: leave it out")
        if not self.config.race_uses_rope:
            rotary_pos_emb = None
        elif rotary_pos_emb is not None and self.config.race_layout == "contiguous" and group_size(self.pg_collection.cp) > 1:
            raise ValueError(
                'race_layout is "contiguous", but Megatron turns queries and keys by the positions of zigzag '
                'shards: set race_rope to "never" or race_layout to "zigzag"'
            )
        bias = None if self.decay is None else self.decay(hidden_states)
        return super().forward(hidden_states, attention_mask, None, None, rotary_pos_emb, *args, attention_bias=bias, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's; the gate is cut to this rank's heads where a key/value head serves several ranks."""
        result = super().get_query_key_value_tensors(*args, **kwargs)
        if len(result) == 4 and result[3].shape[2] != result[0].shape[2]:
            query, key, value, gate = result
            ranks = gate.shape[2] // query.shape[2]
            own = gate.unflatten(2, (ranks, -1)).select(2, group_rank(self.pg_collection.tp) % ranks)
            return query, key, value, own
        return result

    def _checkpointed_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Any = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Selective recompute: the decay is an input too, so that its gradient finds its way back."""

        def again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = self.core_attention(
                q,
                k,
                v,
                attention_mask,
                attn_mask_type=attn_mask_type or self.attn_mask_type,
                attention_bias=bias,
                packed_seq_params=packed_seq_params,
            )
            return out

        result: Tensor = tensor_parallel.checkpoint(again, False, query, key, value, attention_bias)
        return result

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        if not self.config.race_output_gate:
            return super()._apply_output_gate(x, gate)
        return apply_output_gate(x, gate.reshape(x.shape), self.config.race_gate_activation)
