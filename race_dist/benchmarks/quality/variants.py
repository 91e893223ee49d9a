"""Build a variant's model: its layers, the width of its feed-forward, and the bytes of its state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from race_dist.benchmarks.quality.mixers import BASELINE_MIXERS, LinearBaseline, NoFeedForward
from race_dist.benchmarks.quality.protocol import Protocol, Run, Variant, merged
from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import Sequence, initialize, layer_kind

FFN_STEP = 16  # the feed-forward's width is a multiple of this, for tensor cores


def model_config(protocol: Protocol, variant: Variant, seed: int) -> ModelConfig:
    """The variant's ModelConfig. Raises ValueError, naming the variant, for unknown or invalid keys."""
    tree = merged(protocol.model, variant.model)
    tree = {"vocab_size": 256 if protocol.recall is None else 8192, **tree, "seed": seed}
    tree["race"] = {**tree.get("race", {}), "seed": seed}
    config = ModelConfig.check(tree, source=f"variant {variant.name!r}", prefix="model.")
    if variant.mixer != "model" and (not any(map(_is_race, config.layer_kinds)) or config.kv_heads != config.num_heads):
        raise ValueError(
            f"variant {variant.name!r}: mixer = {variant.mixer!r} replaces RACE layers: layer_pattern needs an R, and as "
            "many key/value heads as heads"
        )
    return config


def _is_race(letter: str) -> bool:
    return layer_kind(letter).options_name == "race"


def build_model(protocol: Protocol, variant: Variant, seed: int, device: torch.device | str = "cpu") -> DecoderLM:
    """The variant's initialized model, with a feed-forward whose width gives the protocol's number of ``parameters``."""
    config = model_config(protocol, variant, seed)
    if protocol.parameters is not None:
        config = config.model_copy(update={"ffn_dim": fitting_ffn(protocol, variant, config)})
    model = _assembled(protocol, variant, config, device)
    initialize(model, seed)
    return model


def fitting_ffn(protocol: Protocol, variant: Variant, config: ModelConfig) -> int:
    """The width of the feed-forward with which the variant has about the protocol's number of parameters."""
    assert protocol.parameters is not None
    narrowest = config.model_copy(update={"ffn_dim": FFN_STEP})
    other_parameters = parameter_count(_assembled(protocol, variant, narrowest, "meta"))
    per_step = 3 * config.dim * FFN_STEP * config.num_layers
    steps = 1 + round((protocol.parameters - other_parameters) / per_step)
    if steps < 1:
        raise ValueError(
            f"variant {variant.name!r} has {other_parameters:,} parameters with the narrowest feed-forward, more than "
            f"parameters = {protocol.parameters:,}: raise it or make the model smaller"
        )
    return steps * FFN_STEP


def _assembled(protocol: Protocol, variant: Variant, config: ModelConfig, device: torch.device | str) -> DecoderLM:
    model = DecoderLM(config, device=device)
    for layer, kind in enumerate(config.layer_kinds):
        block: Any = model.blocks[layer]
        if variant.mixer != "model" and _is_race(kind):
            block.mixer = BASELINE_MIXERS[variant.mixer](
                config.race, layer, output_gain=(2 * config.num_layers) ** -0.5, init_weights=False, device=device
            )
        if not protocol.feed_forward:
            block.ffn = NoFeedForward()
    return model


def parameter_count(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(model: DecoderLM, context: int, *, number: int = 2) -> int:
    """Bytes of a sequence's state after ``context`` tokens: sketches or matrices, tails of windows and convolutions, keys and
    values, with ``number`` bytes per number."""
    total = 0
    for block in model.blocks:
        mixer = cast(Any, block).mixer
        if isinstance(mixer, LinearBaseline):
            tail = (mixer.config.short_conv - 1) * (2 + mixer.config.conv_values) if mixer.config.short_conv else 0
            total += mixer.state_numbers + tail * mixer.num_heads * mixer.head_dim
            continue
        total += sum(t.numel() for t in mixer.zero_carry(1).tensors() if t.is_floating_point())
        if mixer.zero_carry(1).tensors()[0].shape[1] == 0:  # full softmax: a carry that grows
            total += 2 * context * mixer.num_kv_heads * mixer.head_dim
    return number * total


def hidden(model: DecoderLM, ids: Tensor, sequence: Sequence) -> Tensor:
    """``[B, T, dim]`` after the last norm, as :meth:`DecoderLM.hidden` at the positions of ``sequence``, without copies from
    the host, so that a CUDA graph can capture it."""
    x = model.embed(ids)
    for block in model.blocks:
        x, _ = block(x, None, sequence)
    h: Tensor = model.norm(x)
    return h


def describe(run: Run) -> str:
    """A run as one line."""
    return f"{run.variant.name}, lr {run.rate:g}, seed {run.seed}"
