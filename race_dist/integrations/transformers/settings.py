"""What a transformers configuration says about RACE Attention: the entry ``race_attention`` of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

IMPLEMENTATION = "race"
ENTRY = "race_attention"


class Settings(BaseModel):
    """``config.race_attention``.

    Attributes:
        layers: indices of the layers that :func:`convert` has replaced, in order; none with ``attn_implementation``.
        options: fields of :class:`race_dist.RaceConfig`.
        inherit_rope: whether converted layers turn queries and keys by the model's own rotary positions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
            raise ValueError(f"config.{ENTRY} must be a dictionary with the keys {', '.join(cls.model_fields)}; got {entry!r}")
        try:
            return cls.model_validate(dict(entry))
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"config.{ENTRY}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; it has the keys "
                             f"{', '.join(cls.model_fields)}") from None

    def store(self, config: Any) -> None:
        """Write them into a transformers configuration, which saves them with the model."""
        setattr(config, ENTRY, self.model_dump(mode="json"))
