"""ModelConfig: the shape of a model and the options of its layers, validated."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from race_dist.nn import RaceConfig, SoftmaxConfig, registered_kinds
from race_dist.nn.config import WIDTH_LIMIT
from race_dist.nn.registry import described_kinds
from race_dist.strict_config import COUNT_LIMIT, SEED_LIMIT, SIZE_LIMIT, StrictConfig


class ModelConfig(StrictConfig):
    """A stack of blocks: a mixing layer and a SwiGLU, each after an RMS norm, between an embedding and a head.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    vocab_size: int = Field(ge=1, le=SIZE_LIMIT, description="Number of tokens.")
    dim: int = Field(ge=1, le=WIDTH_LIMIT, description="Width of the model.")
    num_layers: int = Field(ge=1, le=2**16, description="Number of blocks.")
    num_heads: int = Field(ge=1, le=WIDTH_LIMIT, description="Query heads of a mixing layer.")
    num_kv_heads: int | None = Field(
        default=None, ge=1, le=WIDTH_LIMIT, description="Key/value heads, a divisor of num_heads; None: num_heads."
    )
    head_dim: int | None = Field(default=None, ge=1, le=WIDTH_LIMIT, description="Width of one head; None: dim // num_heads.")
    layer_pattern: str = Field(
        default="R",
        description="Kinds of mixing layers, cycled over the blocks: R = RACE, W = sliding-window softmax, S = full softmax.",
    )
    race: RaceConfig = Field(
        default_factory=RaceConfig,
        description="Options of the RACE layers; dim, heads and rope_base are filled in from the model.",
    )
    softmax: SoftmaxConfig = Field(
        default_factory=SoftmaxConfig, description="Options of the W and S layers: convolution and gate."
    )
    window: int = Field(default=128, le=COUNT_LIMIT, description="Tokens that a W layer sees, including the token itself.")
    ffn_dim: int | None = Field(
        default=None, ge=1, le=2**24, description="Inner width of the SwiGLU; None: 8/3 of dim, rounded up to 64."
    )
    tie_embeddings: bool = Field(default=False, description="Whether the output head shares the weight of the embedding.")
    rope_base: Annotated[float, Field(gt=1, le=1e30)] | None = Field(
        default=10000.0,
        description="Base of the rotary positions of softmax layers, and of RACE layers that have any; None: no positions.",
    )
    norm_eps: float = Field(default=1e-6, ge=1e-30, le=1, description="Added to the mean square in RMS norms.")
    seed: int = Field(default=0, ge=0, le=SEED_LIMIT, description="Seed of the initial weights.")
    loss_chunk: int | None = Field(
        default=None, ge=1, le=SIZE_LIMIT, description="Rows of logits that exist at a time in the loss; None: chosen by size."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Recompute each block in the backward pass instead of storing its activations."
    )

    @field_validator("window")
    @classmethod
    def _window(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2 (a token and the one before it)")
        return value

    @field_validator("layer_pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        if not value or set(value) - {kind.letter for kind in registered_kinds()}:
            raise ValueError(f"is a string of {described_kinds()}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim = {self.dim} is no multiple of num_heads = {self.num_heads}: change one or set head_dim")
        if self.rope_base is not None and self.resolved_head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head_dim; got {self.resolved_head_dim}: change it or set rope_base=None"
            )
        race = self.race.with_model_dims(
            dim=self.dim, num_heads=self.num_heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim, rope_base=self.rope_base
        )
        object.__setattr__(self, "race", race)
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def resolved_ffn_dim(self) -> int:
        """Inner width of the SwiGLU."""
        return self.ffn_dim or -(-8 * self.dim // (3 * 64)) * 64

    @property
    def layer_kinds(self) -> str:
        """One letter per block (:mod:`race_dist.nn.registry`)."""
        return (self.layer_pattern * self.num_layers)[: self.num_layers]
