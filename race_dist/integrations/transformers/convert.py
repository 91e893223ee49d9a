"""Turning attention modules of a transformers model into RACE layers, and reading such a model back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from race_dist.integrations.transformers.attach import attach, decoder_of
from race_dist.integrations.transformers.layer import FUSED, SEPARATE, RaceSelfAttention
from race_dist.integrations.transformers.settings import ENTRY, Settings
from race_dist.nn import RaceConfig, initialize

# What a layer that is to imitate softmax attention starts from: outputs are averages of values, as softmax's are.
STARTING_POINT: dict[str, Any] = {"normalization": "global", "output_gate": False}


def convert(model: PreTrainedModel, *, layers: Iterable[int] | None = None,
            race: RaceConfig | Mapping[str, Any] | None = None, inherit_rope: bool = False) -> PreTrainedModel:
    """Replace attention modules by RACE layers, in place. Projections keep their weights; what is new (lengths of queries
    and keys, sharpness, convolution, rates of decay, norm, gate) starts from ``race.seed``.

    ``generate`` then decodes with a state of constant size in these layers, ``save_pretrained`` saves the model, and
    :func:`from_pretrained` reads it back. Layers left out stay softmax: a hybrid.

    Args:
        model: a Llama, Qwen, Mistral or GPT-NeoX class model.
        layers: indices to replace; None: all.
        race: options of the layers, a :class:`RaceConfig` or some of its fields. What is left out is a RaceConfig's default,
            but for ``normalization="global"`` and ``output_gate=False``, from which imitating softmax starts nearer.
        inherit_rope: turn queries and keys by the model's own rotary positions. By default RACE layers with decay have none,
            and others make their own of the base ``rope_base``.

    Returns:
        The model.

    Raises:
        ValueError: no such layer, one that is a RACE layer already, or one of an unknown kind.
    """
    decoder = decoder_of(model)
    blocks = list(decoder.layers)  # type: ignore[arg-type]
    chosen = _chosen(layers, len(blocks))
    earlier = Settings.of(model.config)
    given = race.model_dump(exclude_unset=True) if isinstance(race, RaceConfig) else dict(race or {})
    options = STARTING_POINT | given
    if earlier.layers and (options, inherit_rope) != (earlier.options, earlier.inherit_rope):
        raise ValueError(f"layers {list(earlier.layers)} are RACE layers with other options, {earlier.options}: convert all at "
                         "once, or give the same options")
    for index in chosen:
        _replace(blocks[index], index, options, inherit_rope, model.config)
    settings = Settings(layers=tuple(sorted({*earlier.layers, *chosen})), options=options, inherit_rope=inherit_rope)
    settings.store(model.config)
    if decoder.config is not model.config:
        settings.store(decoder.config)
    attach(model)
    return model


def from_pretrained(path: str | Path, **options: Any) -> PreTrainedModel:
    """Read a converted model that ``save_pretrained`` wrote.

    Args:
        path: its folder, or its name on the hub.
        **options: of transformers' ``from_pretrained``: dtype, device_map, revision, ...

    Raises:
        ValueError: this is no converted model.
    """
    config = options.pop("config", None) or AutoConfig.from_pretrained(path)
    settings = Settings.of(config)
    if not settings.layers:
        raise ValueError(f"{path} is no converted model: its config.json has no {ENTRY}.layers; read it with transformers")
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{path} is of the architecture {name!r}, which transformers {transformers.__version__} has not")

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        # the stored layers are put in again: the entry is taken off and written anew
        setattr(config, ENTRY, None)
        convert(self, layers=settings.layers, race=settings.options, inherit_rope=settings.inherit_rope)

    reader: Any = type(name, (kind,), {"__init__": build, "__module__": kind.__module__})
    model = reader.from_pretrained(path, config=config, **options)
    model.__class__ = kind
    for module in model.modules():
        if isinstance(module, RaceSelfAttention):
            module.settle(next(module.parameters()))
    return model


def _chosen(layers: Iterable[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if layers is None else sorted(set(layers))
    outside = [i for i in chosen if not 0 <= i < count]
    if outside or not chosen:
        raise ValueError(f"layers must be among 0 to {count - 1}, at least one; got {outside or chosen}")
    return chosen


def _replace(block: nn.Module, index: int, options: dict[str, Any], inherit_rope: bool, config: Any) -> None:
    """Put a RACE layer where the attention of one block is."""
    name = next((n for n in ("self_attn", "attention") if hasattr(block, n)), None)
    attention = None if name is None else getattr(block, name)
    if isinstance(attention, RaceSelfAttention):
        raise ValueError(f"layer {index} is a RACE layer already: leave it out of layers")
    kinds = [kind for kind in (SEPARATE, FUSED) if all(hasattr(attention, part) for part in kind)]
    if name is None or attention is None or not kinds:
        raise ValueError(f"layer {index}: {type(attention or block).__name__} is of no known kind: it needs the projections "
                         f"{', '.join(SEPARATE)} or {', '.join(FUSED)}")
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(attention, "head_dim", None) or text.hidden_size // heads
    if inherit_rope:
        options = options | {"rope_base": _rope_base(text, attention, head_dim, index)}
    race = RaceConfig.model_validate(options).filled(dim=text.hidden_size, num_heads=heads, num_kv_heads=kv_heads,
                                                     head_dim=head_dim, rope_base=10000.0)
    weight = getattr(attention, kinds[0][-1]).weight
    layer = RaceSelfAttention(attention, race, index, inherit_rope=inherit_rope, device=weight.device, dtype=weight.dtype)
    initialize(layer, race.seed, f"race.{index}")
    setattr(block, name, layer.train(attention.training))


def _rope_base(config: Any, attention: nn.Module, head_dim: int, index: int) -> float:
    """A base to go by; the angles themselves are the model's."""
    rope = getattr(config, "rope_parameters", None) or {}
    turned = getattr(attention, "rotary_ndims", None) or int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if turned != head_dim:
        raise ValueError(f"layer {index} turns {turned} of {head_dim} numbers of a head: RACE layers turn all or none, so give "
                         "inherit_rope=False")
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def trained_parts(model: nn.Module, *, projections: bool = True) -> list[nn.Parameter]:
    """Parameters of the RACE layers: what distillation trains first.

    Args:
        projections: whether the projections taken over belong to them too.
    """
    kept = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", *FUSED}
    return [p for m in model.modules() if isinstance(m, RaceSelfAttention) for name, p in m.named_parameters()
            if projections or name.split(".")[0] not in kept]


def freeze_all_but(model: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Let only ``parameters`` of the model be trained."""
    wanted = {id(p) for p in parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
