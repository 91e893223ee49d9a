"""Convert attention modules of a transformers model to RACE layers, and load a converted model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from race_dist.integrations.transformers import conversion_check
from race_dist.integrations.transformers.decoder_hook import ATTENTION_NAMES, decoder_of, install_decoder_hook
from race_dist.integrations.transformers.layer import RaceSelfAttention
from race_dist.integrations.transformers.projections import INHERITED_MODULES, Projections
from race_dist.integrations.transformers.settings import (
    CONFIG_ENTRY,
    CONVERSION_DEFAULTS,
    IMPLEMENTATION,
    Settings,
    stored_options,
)
from race_dist.messages import short_repr
from race_dist.nn import RaceConfig, initialize

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def convert(
    model: PreTrainedModel,
    *,
    layers: Iterable[int] | None = None,
    race: RaceConfig | Mapping[str, Any] | None = None,
    inherit_rope: bool = False,
) -> PreTrainedModel:
    """Replace attention modules by RACE layers, in place.

    Projections and query and key norms keep their weights. The new parameters (query and key scales, beta, convolution, decay
    rates, norm, gate) are initialized from ``race.seed``.

    Every parameter of a replaced module is taken over. The model is also run on three tokens before and after, to find
    operations of the module other than its attention. If a RACE layer would omit a parameter or an operation, the conversion is
    refused and the model is unchanged. (A model on the meta device cannot be run: only names and shapes are checked.)

    Afterwards ``generate`` decodes with a state of constant size in these layers, ``save_pretrained`` saves the model, and
    :func:`from_pretrained` or transformers' own ``from_pretrained`` (with this package imported) loads it. Layers that are not
    listed stay softmax, which makes a hybrid.

    Args:
        model: a Llama, Qwen, Mistral, OLMo, StableLM, Cohere or GPT-NeoX class model.
        layers: indices of the layers to replace; None: all.
        race: options of the layers: a :class:`RaceConfig` or some of its fields. Other fields have RaceConfig's defaults,
            except ``normalization="global"`` and ``output_gate=False``, which start closer to softmax.
        inherit_rope: whether to apply the model's own rotary positions to queries and keys. By default RACE layers with decay
            have no positions, and others compute their own with the base ``rope_base``.

    Returns:
        The model. It gets its own copy of the configuration, so other models that share the original are not affected.

    Raises:
        ValueError, TypeError: an argument is wrong; a layer does not exist, is a RACE layer already or is of an unknown kind;
            or a layer has a parameter or an operation that a RACE layer does not have.
    """
    decoder = decoder_of(model)
    if not isinstance(inherit_rope, bool):
        raise TypeError(f"inherit_rope must be True or False; got {short_repr(inherit_rope)}")
    chosen = _layer_indices(layers, len(decoder.layers))  # type: ignore[arg-type]
    options, earlier = _options(race), Settings.of(model.config)
    if earlier.layers and (options, inherit_rope) != (stored_options(earlier.layer_config()), earlier.inherit_rope):
        raise ValueError(
            f"layers {list(earlier.layers)} are RACE layers with other options, {earlier.options}: convert all at "
            "once, or give the same options"
        )
    settings = Settings(layers=tuple(chosen), options=options, inherit_rope=inherit_rope)
    _replace_all(model, settings)
    _own_config(model)
    settings = settings.model_copy(update={"layers": tuple(sorted({*earlier.layers, *chosen}))})
    settings.store(model.config)
    if decoder.config is not model.config:
        settings.store(decoder.config)
    return model


def from_pretrained(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model with RACE Attention (converted, or with ``attn_implementation="race"``) that ``save_pretrained`` wrote.

    This calls transformers' ``from_pretrained`` of the class that the configuration names, and refuses a softmax model.

    Args:
        path: folder of the model, or its name on the hub.
        **options: arguments of transformers' ``from_pretrained``: dtype, device_map, revision, ...

    Raises:
        ValueError: there is no such model, it has no RACE Attention, or its weights were trained with other settings.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise TypeError(f"path must be a folder or a name on the hub; got {short_repr(path)}")
    config = options.pop("config", None)
    if config is None:
        try:
            config = AutoConfig.from_pretrained(path, **{name: options[name] for name in HUB_OPTIONS if name in options})
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"path {str(path)!r} is neither a folder of a saved model nor a name on the hub: {reason}"
            ) from None
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config must be a configuration of transformers; got {short_repr(config)}")
    if not Settings.of(config).layers and getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
        raise ValueError(
            f"path {str(path)!r} is no converted model: its config.json has no {CONFIG_ENTRY}.layers; load it with transformers"
        )
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{path} has the architecture {name!r}, which transformers {transformers.__version__} does not have")
    return kind.from_pretrained(path, config=config, **options)


def build(model: PreTrainedModel, settings: Settings) -> None:
    """Replace the layers that the configuration lists as converted, in a model that has just been created.

    Raises:
        ValueError: the model has no such layers.
    """
    try:
        blocks: Any = decoder_of(model).layers
    except TypeError as error:
        raise ValueError(f"config.{CONFIG_ENTRY} says that layers {list(settings.layers)} are RACE layers: {error}") from None
    missing = _layer_indices(settings.layers, len(blocks))
    missing = [i for i in missing if not isinstance(_attention_of(blocks[i], i)[1], RaceSelfAttention)]
    if missing:
        options = stored_options(settings.layer_config())
        _replace_all(model, settings.model_copy(update={"layers": tuple(missing), "options": options}))
    for module in model.modules():
        if isinstance(module, RaceSelfAttention):
            for name, part in module.named_modules():
                if name.split(".")[0] not in INHERITED_MODULES:
                    part._is_hf_initialized = True  # keeps transformers from initializing these weights again


def _options(race: RaceConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """All options in the form in which they are stored."""
    if race is not None and not isinstance(race, (RaceConfig, Mapping)):
        raise TypeError(f"race must be a RaceConfig or a dictionary of its fields; got {short_repr(race)}")
    given = race.model_dump(exclude_unset=True) if isinstance(race, RaceConfig) else dict(race or {})
    unnamed = [name for name in given if not isinstance(name, str)]
    if unnamed:
        raise TypeError(f"race must be a dictionary whose keys are fields of RaceConfig; got the key {unnamed[0]!r}")
    if given.get("causal") is False:
        raise ValueError("race has causal = False, but the layers of a decoder are causal: leave it out")
    return {
        **stored_options(RaceConfig.check(CONVERSION_DEFAULTS | given, source="race")),
        **{name: given[name] for name in ("dim", "num_heads", "num_kv_heads", "head_dim") if given.get(name) is not None},
    }


def _layer_indices(layers: Iterable[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, (str, bytes, Mapping)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be indices of layers, as in layers=[0, 2]; got {short_repr(layers)}")
    given = list(layers)
    wrong = [i for i in given if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise TypeError(f"layers must be indices of layers, whole numbers from 0 to {count - 1}; got {short_repr(wrong[0])}")
    chosen = sorted(set(given))
    outside = [i for i in chosen if not 0 <= i < count]
    if outside or not chosen:
        raise ValueError(f"layers must be among 0 to {count - 1}, at least one; got {short_repr(outside or chosen)}")
    return chosen


def _attention_of(block: nn.Module, index: int) -> tuple[str, nn.Module]:
    """The name and the module of a block's attention."""
    for name in ATTENTION_NAMES:
        if isinstance(found := getattr(block, name, None), nn.Module):
            return name, found
    raise ValueError(f"layer {index}: {type(block).__name__} has no attention under a known name (self_attn, attention)")


def _replace_all(model: PreTrainedModel, settings: Settings) -> None:
    """Replace the layers that the settings list. If one cannot be replaced, restore the model and raise ValueError."""
    decoder = decoder_of(model)
    blocks: Any = decoder.layers
    replaced = {index: _attention_of(blocks[index], index) for index in settings.layers}
    converted = [index for index, (_, module) in replaced.items() if isinstance(module, RaceSelfAttention)]
    if converted:
        raise ValueError(f"layer {converted[0]} is a RACE layer already: leave it out of layers")
    text_config = model.config.get_text_config()
    can_run = not any(t.is_meta for t in (*decoder.parameters(), *decoder.buffers()))
    new_layers = {index: _new_layer(module, index, settings, text_config) for index, (_, module) in replaced.items()}
    if can_run:
        calls = conversion_check.record_calls(decoder, {index: module for index, (_, module) in replaced.items()})
        for index, (_, module) in replaced.items():
            _check_conversion(
                calls.get(index), module, new_layers[index], index, getattr(text_config, "max_position_embeddings", None)
            )
    hooks = (decoder._forward_pre_hooks, decoder._forward_hooks)
    before = [set(kind) for kind in hooks]
    try:
        for index, (name, module) in replaced.items():
            setattr(blocks[index], name, new_layers[index].train(module.training))
        install_decoder_hook(model)
        if can_run:
            conversion_check.run(decoder)
    except Exception as error:
        for index, (name, module) in replaced.items():
            setattr(blocks[index], name, module)
        for kind, known in zip(hooks, before, strict=True):
            for key in set(kind) - known:
                del kind[key]
        raise ValueError(
            f"{type(model).__name__} does not run with RACE layers in the place of layers {list(replaced)}: {error}"
        ) from error


def _new_layer(attention: nn.Module, index: int, settings: Settings, text: Any) -> RaceSelfAttention:
    """The RACE layer that replaces an attention module."""
    where = f"layer {index}: {type(attention).__name__}"
    if getattr(attention, "is_causal", True) is False:
        raise ValueError(f"{where} is not causal, but converted layers are: leave it out of layers")
    rates = [getattr(attention, "attention_dropout", 0.0)]
    rates += [module.p for module in attention.modules() if isinstance(module, nn.Dropout)]
    dropout = [rate for rate in rates if isinstance(rate, float) and rate > 0]
    if dropout:
        raise ValueError(
            f"{where} drops attention weights (dropout = {dropout[0]}), but a RACE layer has none to drop: create "
            "the model with config.attention_dropout = 0"
        )
    found = Projections.of(attention, text, where)
    options = dict(settings.options)
    if settings.inherit_rope:
        options["rope_base"] = _rope_base(text, attention, found.head_dim, index)
    race = RaceConfig.check(options, source="race").with_model_dims(
        dim=text.hidden_size, num_heads=found.heads, num_kv_heads=found.kv_heads, head_dim=found.head_dim, rope_base=10000.0
    )
    output_projection = attention.get_submodule(found.names[-1])
    weights = (*output_projection.parameters(), *attention.parameters())
    like = next((p for p in weights if p.is_floating_point()), torch.empty(0))  # quantized weights: none is floating-point
    layer = RaceSelfAttention(
        attention, found, race, index, inherit_rope=settings.inherit_rope, device=like.device, dtype=like.dtype
    )
    initialize(layer, race.seed, f"race.{index}")
    return layer


def _check_conversion(
    call: conversion_check.AttentionCall | None, attention: nn.Module, layer: RaceSelfAttention, index: int, longest: int | None
) -> None:
    where = f"layer {index}: {type(attention).__name__}"
    if call is None:
        raise ValueError(f"{where} is not called when the model runs: leave it out of layers")
    conversion_check.check_equivalent(
        call, attention, layer.projections, where, longest=longest, rotated=layer.inherit_rope and layer.rope_base is not None
    )


def _own_config(model: PreTrainedModel) -> None:
    """Give the model its own copy of the configuration: a softmax model that shares the original is still saved as softmax."""
    copies: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) in copies:
            module.config = copies[id(config)]


def _rope_base(config: Any, attention: nn.Module, head_dim: int, index: int) -> float:
    """The base of the model's rotary positions. RACE layers use the model's angles; the base marks them as rotary."""
    rope = getattr(config, "rope_parameters", None) or {}
    rotated = getattr(attention, "rotary_ndims", None) or int(
        head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    )
    if rotated != head_dim:
        raise ValueError(
            f"layer {index} rotates {rotated} of {head_dim} dimensions of a head: RACE layers rotate all or none, so pass "
            "inherit_rope=False"
        )
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def trained_parts(model: nn.Module, *, projections: bool = True) -> list[nn.Parameter]:
    """The parameters of the RACE layers, which distillation trains first.

    Args:
        projections: whether to include the projections taken over from the replaced modules.
    """
    _check_module(model)
    return [
        p
        for m in model.modules()
        if isinstance(m, RaceSelfAttention)
        for name, p in m.named_parameters()
        if projections or name.split(".")[0] not in INHERITED_MODULES
    ]


def freeze_all_but(model: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Set ``requires_grad`` for ``parameters`` of the model, and clear it for all others."""
    _check_module(model)
    if isinstance(parameters, torch.Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be a list of a model's parameters, as trained_parts gives it; got {type(parameters).__name__}"
        )
    wanted = {id(p) for p in parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {short_repr(model)}")
