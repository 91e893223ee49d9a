"""The settings of RACE in a transformers configuration: the entry ``race_attention`` of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from race_dist.integrations.core_options import CORE_DEFAULTS, whole_layer_options
from race_dist.messages import short_repr
from race_dist.nn import RaceConfig
from race_dist.strict_config import StrictConfig

IMPLEMENTATION = "race"
CONFIG_ENTRY = "race_attention"

# Defaults of attn_implementation="race", which adds no parameters to a model.
IMPLEMENTATION_DEFAULTS: dict[str, Any] = CORE_DEFAULTS | {"train_beta": False}
# Defaults of converted layers: their outputs are averages of values, as with softmax, which is closer to the replaced layer.
CONVERSION_DEFAULTS: dict[str, Any] = {"normalization": "global", "output_gate": False}
MODEL_FIELDS = ("dim", "num_heads", "num_kv_heads", "head_dim", "causal")


class Settings(StrictConfig):
    """``config.race_attention``.

    Attributes:
        layers: indices of the layers that :func:`convert` has replaced, in order; empty with ``attn_implementation="race"``.
        options: fields of :class:`race_dist.RaceConfig`.
        inherit_rope: whether converted layers apply the model's own rotary positions to queries and keys.
    """

    layers: tuple[int, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    inherit_rope: bool = False

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The settings of a transformers configuration; the defaults if it has none.

        Raises:
            ValueError: the entry does not have this form.
        """
        entry = getattr(config, CONFIG_ENTRY, None)
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"config.{CONFIG_ENTRY} must be a dictionary with the keys {', '.join(cls.model_fields)}; "
                f"got {short_repr(entry)}"
            )
        return cls.check(dict(entry), source=f"config.{CONFIG_ENTRY}")

    def store(self, config: Any) -> None:
        """Write the settings into a transformers configuration, which is saved with the model."""
        setattr(config, CONFIG_ENTRY, self.model_dump(mode="json"))

    def implementation_config(self) -> RaceConfig:
        """The RaceConfig of ``attn_implementation="race"``.

        Raises:
            ValueError: an option is out of its range, or needs parameters.
        """
        config = RaceConfig.check(IMPLEMENTATION_DEFAULTS | self.options, source=f"config.{CONFIG_ENTRY}.options")
        trained = [name for name in ("train_beta", "train_planes") if getattr(config, name)]
        if unsupported := trained + whole_layer_options(config):
            raise ValueError(
                f'race_attention options {", ".join(unsupported)} need parameters, which attn_implementation="race" '
                "does not add to a model: use race_dist.integrations.transformers.convert(model, ...)"
            )
        return config

    def layer_config(self) -> RaceConfig:
        """The RaceConfig of converted layers.

        Raises:
            ValueError: an option is out of its range.
        """
        return RaceConfig.check(CONVERSION_DEFAULTS | self.options, source=f"config.{CONFIG_ENTRY}.options")


def stored_options(config: RaceConfig) -> dict[str, Any]:
    """All fields except those that the model determines, in JSON form: what ``config.json`` stores. Defaults are stored too, so
    that a later change of a default does not change a saved model."""
    return config.model_dump(mode="json", exclude=set(MODEL_FIELDS))
