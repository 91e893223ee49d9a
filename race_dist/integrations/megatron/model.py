"""Build this package's language model from megatron-core's modules: ModelConfig to RaceTransformerConfig and GPTModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from race_dist.integrations.megatron.config import PREFIX, RACE_FIELDS, RaceTransformerConfig
from race_dist.integrations.megatron.specs import get_race_block_spec
from race_dist.models import ModelConfig
from race_dist.nn import SoftmaxConfig


def transformer_config(
    model: ModelConfig, *, tp: int = 1, cp: int = 1, dtype: torch.dtype = torch.float32, **more: Any
) -> RaceTransformerConfig:
    """The RaceTransformerConfig of a GPTModel that computes the same function as ``DecoderLM(model)``.

    Args:
        model: the model to build; its layers are R (RACE) and S (softmax).
        tp, cp: numbers of tensor- and context-parallel ranks.
        dtype: dtype of the parameters.
        more: further fields of RaceTransformerConfig.

    Raises:
        ValueError: Megatron's modules cannot compute the same function.
    """
    kinds, race = model.layer_kinds, model.race
    if "W" in kinds:
        raise ValueError(
            f"model.layer_pattern is {model.layer_pattern!r}, but megatron-core has no sliding-window layers "
            "without Transformer Engine: use R and S"
        )
    if "S" in kinds and cp > 1:
        raise ValueError(
            f"model.layer_pattern is {model.layer_pattern!r} and {cp} ranks share a sequence, but megatron-core's "
            "softmax layers support that with Transformer Engine only: use R"
        )
    if "S" in kinds and model.softmax != SoftmaxConfig():
        raise ValueError(
            f"model.layer_pattern is {model.layer_pattern!r} and model.softmax asks for a convolution or a gate, "
            "which megatron-core's softmax layers do not have: leave model.softmax out"
        )
    if race.rope_base is not None and race.short_conv and "R" in kinds:
        raise ValueError(
            "model.race has rotary positions and a short convolution: Megatron rotates queries and keys before the "
            "convolution, DecoderLM after it; set race.short_conv=0 or race.rope_base to none"
        )
    if race.rope_base not in (None, model.rope_base) and "R" in kinds:
        raise ValueError(
            f"model.race.rope_base is {race.rope_base} and model.rope_base {model.rope_base}: Megatron has one "
            "base for all layers"
        )
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.dim,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.resolved_head_dim,
        "ffn_hidden_size": model.resolved_ffn_dim,
        "linear_attention_freq": None if set(kinds) == {"R"} else [int(kind == "R") for kind in kinds],
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "masked_softmax_fusion": False,
        "race_rope": "never" if race.rope_base is None else "always",
        **{PREFIX + name: getattr(race, name) for name in RACE_FIELDS},
    }
    return RaceTransformerConfig(**(fields | more))


def build_gpt(model: ModelConfig, config: RaceTransformerConfig, max_length: int) -> GPTModel:
    """An empty GPTModel over the ranks of parallel_state: :func:`.weights.load_full_weights` fills it."""
    rope = model.rope_base is not None and ("S" in model.layer_kinds or model.race.rope_base is not None)
    return GPTModel(
        config,
        get_race_block_spec(config),
        vocab_size=model.vocab_size,
        max_sequence_length=max_length,
        position_embedding_type="rope" if rope else "none",
        rotary_base=int(model.rope_base) if rope and model.rope_base else 10000,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )
