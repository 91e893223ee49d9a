"""ModelConfig: every choice about a model's shape, checked when it is made."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from race_dist.nn import RaceConfig

LAYER_KINDS = {"R": "RACE", "W": "sliding-window softmax", "S": "full softmax"}


class ModelConfig(BaseModel):
    """A stack of blocks: a mixing layer and a SwiGLU, each after an RMS norm, between an embedding and a head.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(description="Number of tokens.")
    dim: int = Field(description="Width of the model.")
    num_layers: int = Field(description="Number of blocks.")
    num_heads: int = Field(description="Query heads of a mixing layer.")
    num_kv_heads: int | None = Field(default=None, description="Key/value heads, a divisor of num_heads; None: as many.")
    head_dim: int | None = Field(default=None, description="Width of one head; None: dim // num_heads.")
    layer_pattern: str = Field(default="R", description="Kinds of mixing layers, cycled over the blocks: R = RACE, "
                                                "W = sliding-window softmax, S = full softmax.")
    race: RaceConfig = Field(default_factory=RaceConfig,
                             description="The RACE layers; this config fills in their dim, heads and rope_base.")
    window: int = Field(default=128, description="Tokens that a W layer sees, itself included.")
    ffn_dim: int | None = Field(default=None, description="Inner width of the SwiGLU; None: 8/3 of dim, rounded up to 64.")
    tie_embeddings: bool = Field(default=False, description="Whether the head's weight is the embedding's.")
    rope_base: float | None = Field(default=10000.0, description="Base of the rotary positions of softmax layers, and of "
                                                                  "RACE layers that have any; None: no positions.")
    norm_eps: float = Field(default=1e-6, description="Added to the mean square in RMS norms.")
    seed: int = Field(default=0, description="Of the initial weights.")
    loss_chunk: int | None = Field(default=None, description="Rows of logits that exist at a time in the loss; None: by size.")
    activation_checkpointing: bool = Field(default=False, description="Recompute each block in the backward pass instead of "
                                                              "keeping its activations.")

    @field_validator("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "loss_chunk")
    @classmethod
    def _positive(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{info.field_name} must be at least 1; got {value}")
        return value

    @field_validator("window")
    @classmethod
    def _window(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"window must be at least 2 (a token and the one before it); got {value}")
        return value

    @field_validator("layer_pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        if not value or set(value) - set(LAYER_KINDS):
            kinds = ", ".join(f"{letter} = {kind}" for letter, kind in LAYER_KINDS.items())
            raise ValueError(f"layer_pattern is a string of {kinds}; got {value!r}")
        return value

    @field_validator("rope_base", "norm_eps")
    @classmethod
    def _real(cls, value: float | None, info: Any) -> float | None:
        low = 1.0 if info.field_name == "rope_base" else 0.0
        if value is not None and not (value > low and math.isfinite(value)):
            raise ValueError(f"{info.field_name} must be finite and above {low:g}; got {value}")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, value: int) -> int:
        if not 0 <= value < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1; got {value}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim = {self.dim} is no multiple of num_heads = {self.num_heads}: change one or set head_dim")
        if self.rope_base is not None and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head_dim; got {self.head_width}: "
                             "change it or set rope_base=None")
        race = self.race.filled(dim=self.dim, num_heads=self.num_heads, num_kv_heads=self.kv_heads,
                                head_dim=self.head_dim, rope_base=self.rope_base)
        object.__setattr__(self, "race", race)
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Inner width of the SwiGLU."""
        return self.ffn_dim or -(-8 * self.dim // (3 * 64)) * 64

    @property
    def layer_kinds(self) -> str:
        """One letter a block."""
        return (self.layer_pattern * self.num_layers)[: self.num_layers]
