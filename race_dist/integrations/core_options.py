"""Options of a RaceCore inside another framework's attention layer, which computes queries, keys and values itself."""

from __future__ import annotations

from typing import Any

from race_dist.nn import RaceConfig

# The framework's layer applies rotary positions itself; decay, convolution and gate are off.
CORE_DEFAULTS: dict[str, Any] = {
    "normalization": "global",
    "decay": "none",
    "short_conv": 0,
    "output_gate": False,
    "rope_base": None,
}


def whole_layer_options(config: RaceConfig) -> list[str]:
    """Names of the options in use that only a whole RACE layer has, because it has the layer's input and more parameters."""
    names = [name for name in ("short_conv", "output_gate") if getattr(config, name)]
    return names + (["decay"] if config.decay == "token" else [])
