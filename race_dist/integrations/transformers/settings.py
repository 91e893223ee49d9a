"""What a transformers configuration says about RACE Attention: the entry ``race_attention`` of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from race_dist.strict_config import StrictConfig, shown

IMPLEMENTATION = "race"
ENTRY = "race_attention"


class Settings(StrictConfig):
    """``config.race_attention``.

    Attributes:
        layers: indices of the layers that :func:`convert` has replaced, in order; none with ``attn_implementation``.
        options: fields of :class:`race_dist.RaceConfig`.
        inherit_rope: whether converted layers turn queries and keys by the model's own rotary positions.
    """

    layers: tuple[int, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    inherit_rope: bool = False

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The settings of a transformers configuration; the defaults where it has none.

        Raises:
            ValueError: the entry is not of this form.
        """
        entry = getattr(config, ENTRY, None)
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise ValueError(f"config.{ENTRY} must be a dictionary with the keys {', '.join(cls.model_fields)}; "
                             f"got {shown(entry)}")
        return cls.check(dict(entry), source=f"config.{ENTRY}")

    def store(self, config: Any) -> None:
        """Write them into a transformers configuration, which saves them with the model."""
        setattr(config, ENTRY, self.model_dump(mode="json"))
