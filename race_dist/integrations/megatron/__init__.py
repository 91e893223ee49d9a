"""RACE Attention in megatron-core: config, core_attention module, layer specs, arguments, and a training engine."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # every module of megatron-core warns that Apex and Transformer Engine are missing
    try:
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401
    except ImportError as error:
        raise ImportError('race_dist.integrations.megatron needs megatron-core: pip install "race-dist[megatron]"') from error

from race_dist.integrations.megatron.arguments import add_race_args
from race_dist.integrations.megatron.config import RaceTransformerConfig
from race_dist.integrations.megatron.core_attention import RaceCoreAttention
from race_dist.integrations.megatron.self_attention import RaceSelfAttention
from race_dist.integrations.megatron.specs import (
    RaceTransformerLayer,
    get_race_block_spec,
    get_race_hybrid_stack_spec,
    get_race_layer_spec,
    race_layer_local_spec,
    race_layer_te_spec,
)

__all__ = [
    "RaceCoreAttention",
    "RaceSelfAttention",
    "RaceTransformerConfig",
    "RaceTransformerLayer",
    "add_race_args",
    "get_race_block_spec",
    "get_race_hybrid_stack_spec",
    "get_race_layer_spec",
    "race_layer_local_spec",
    "race_layer_te_spec",
]
