"""Layer specs for megatron-core: its own specs, with RACE layers where the config selects them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from race_dist.integrations.megatron.config import RaceTransformerConfig, require_race_config
from race_dist.integrations.megatron.core_attention import RaceCoreAttention
from race_dist.integrations.megatron.self_attention import RaceSelfAttention
from race_dist.parallel import group_rank

try:
    import transformer_engine  # noqa: F401
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


def _provider(use_transformer_engine: bool) -> Any:
    if use_transformer_engine and not HAVE_TE:
        raise ImportError(
            "a Transformer Engine spec was requested but transformer_engine is not installed: install it, or "
            'set transformer_impl to "local"'
        )
    return TESpecProvider() if use_transformer_engine else LocalSpecProvider()


def with_race(layer: ModuleSpec, provider: Any, *, rms_norm: bool) -> ModuleSpec:
    """One of Megatron's layer specs with RACE as its self-attention; everything else is unchanged.

    A layer norm that is fused into linear_qkv becomes a separate norm before it, with the same name in a checkpoint: the
    decay is computed from the output of the norm too.
    """
    parts = layer.submodules
    attention = parts.self_attention
    inside = replace(attention.submodules, linear_qkv=provider.column_parallel_linear(), core_attention=RaceCoreAttention)
    norm = parts.input_layernorm
    if norm is IdentityOp:
        norm = provider.layer_norm(rms_norm=rms_norm)
    names = {**parts.sharded_state_dict_keys_map, "input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    race = ModuleSpec(module=RaceSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=inside)
    return replace(
        layer, submodules=replace(parts, input_layernorm=norm, self_attention=race, sharded_state_dict_keys_map=names)
    )


def get_race_layer_spec(config: RaceTransformerConfig, use_transformer_engine: bool | None = None) -> ModuleSpec:
    """The spec of one RACE layer, for a GPTModel in which every layer is RACE.

    Args:
        config: the model's config.
        use_transformer_engine: whether everything but the attention is Transformer Engine's; None: as
            ``config.transformer_impl`` says.

    Raises:
        TypeError: the config has no race_* fields.
        ImportError: Transformer Engine is requested and not installed.
    """
    config = require_race_config(config, "get_race_layer_spec")
    use_te = _uses_te(config, use_transformer_engine)
    options = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "qk_l2_norm": config.qk_l2_norm,
    }
    provider = _provider(use_te)
    layer = (
        get_gpt_layer_with_transformer_engine_spec(**options)
        if use_te
        else get_gpt_layer_local_spec(**options, normalization=config.normalization)
    )
    return with_race(layer, provider, rms_norm=config.normalization == "RMSNorm")


def get_race_block_spec(
    config: RaceTransformerConfig,
    vp_stage: int | None = None,
    *,
    use_transformer_engine: bool | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The specs of this pipeline stage's layers: RACE or softmax by ``linear_attention_freq``, dense or experts by
    ``moe_layer_freq``.

    Pass this function to builders that call a spec with the config (and the virtual pipeline stage).

    Args:
        config: the model's config.
        vp_stage: virtual pipeline stage.
        use_transformer_engine: None: as ``config.transformer_impl`` says.
        pp_rank: pipeline stage; None: the stage of this process.

    Raises:
        TypeError, ImportError: as :func:`get_race_layer_spec`.
    """
    config = require_race_config(config, "get_race_block_spec")
    use_te = _uses_te(config, use_transformer_engine)
    provider = _provider(use_te)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    pattern, numbers = config.race_pattern(), _layers_of_stage(config, len(block.layer_specs), vp_stage, pp_rank)
    layers = [
        with_race(layer, provider, rms_norm=config.normalization == "RMSNorm") if pattern[number] else layer
        for number, layer in zip(numbers, block.layer_specs, strict=True)
    ]
    return replace(block, layer_specs=layers)


def _uses_te(config: RaceTransformerConfig, asked: bool | None) -> bool:
    return bool(config.transformer_impl == "transformer_engine" if asked is None else asked)


def _layers_of_stage(config: Any, count: int, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """Global indices, from 0, of the layers that the pipeline stage holds."""
    if config.pipeline_model_parallel_layout is not None:
        return list(
            config.pipeline_model_parallel_layout.get_layer_id_list(
                layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
            )
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(offset, offset + count))


class RaceTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that reads from the config whether it is RACE or softmax.

    It is for builders that use one spec object for all layers (``--spec race_dist.integrations.megatron
    race_layer_local_spec``). Its submodules are a pair: those of a RACE layer and those of a softmax layer.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int = 1, *args: Any, vp_stage: int | None = None, **kwargs: Any
    ) -> None:
        config = require_race_config(config, "RaceTransformerLayer")
        race, softmax = submodules
        stage = getattr(kwargs.get("pg_collection"), "pp", None)
        pp_rank = None if stage is None else group_rank(stage)
        offset = get_transformer_layer_offset(config, vp_stage, pp_rank) if kwargs.get("add_layer_offset", True) else 0
        chosen = race if config.race_pattern()[layer_number - 1 + offset] else softmax
        super().__init__(config, chosen, layer_number, *args, vp_stage=vp_stage, **kwargs)


def _switching_layer_spec(layer: ModuleSpec, provider: Any) -> ModuleSpec:
    race = with_race(layer, provider, rms_norm=True)
    return ModuleSpec(module=RaceTransformerLayer, submodules=(race.submodules, layer.submodules))


# Specs with RMSNorm and a dense MLP, from megatron-core's or Transformer Engine's modules, for builders that import a name.
race_layer_local_spec = _switching_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), LocalSpecProvider())
race_layer_te_spec = _switching_layer_spec(get_gpt_layer_with_transformer_engine_spec(), TESpecProvider()) if HAVE_TE else None


def get_race_hybrid_stack_spec() -> ModuleSpec:
    """The stack spec of HybridModel (megatron-core after 0.16) with RACE layers where ``hybrid_layer_pattern`` has ``G``.

    The model's config must be a RaceTransformerConfig.

    Raises:
        ImportError: this megatron-core has no HybridModel, or Transformer Engine is not installed, which its stack needs.
    """
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    except ImportError as error:
        raise ImportError(
            "this megatron-core has no HybridModel, or Transformer Engine is not installed: use "
            f"get_race_block_spec with linear_attention_freq for hybrids ({error})"
        ) from None
    provider = _provider(True)
    race = with_race(hybrid_stack_spec.submodules.attention_layer, provider, rms_norm=True)
    return replace(hybrid_stack_spec, submodules=replace(hybrid_stack_spec.submodules, gdn_layer=race))
