"""RaceConfig and SoftmaxConfig: the options of one layer, validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from race_dist.hashing import MAX_PLANES
from race_dist.nn.output_gate import GateActivation
from race_dist.strict_config import SEED_LIMIT, StrictConfig

WIDTH_LIMIT = 2**20  # of widths and numbers of heads: no larger layer fits a machine
Decay = Literal["none", "multiscale", "token"]


def _conv_width(value: int) -> int:
    if value < 0 or value == 1:
        raise ValueError("must be 0 (no convolution) or a width of at least 2")
    return value


ConvWidth = Annotated[int, Field(le=2**16), AfterValidator(_conv_width)]


def _check_conv_values(width: int, conv_values: bool) -> None:
    if conv_values and not width:
        raise ValueError("conv_values = True needs a convolution, but short_conv is 0: set short_conv=4, or conv_values=False")


class SoftmaxConfig(StrictConfig):
    """Optional parts of window and full softmax layers: convolution and gate. The default is none.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    short_conv: ConvWidth = Field(
        default=0,
        description="Width of a causal depthwise convolution added to queries and keys before their positions; 0: none.",
    )
    conv_values: bool = Field(default=False, description="Whether values get such a convolution too.")
    output_gate: bool = Field(default=False, description="Multiply the output by a gate computed from the input.")
    gate_activation: GateActivation = Field(default="silu", description="Activation of the gate's logits: silu or sigmoid.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_conv_values(self.short_conv, self.conv_values)
        return self


class RaceConfig(StrictConfig):
    """Options of a RACE layer. The defaults are chosen for language modelling; the layer of the paper is simpler.

    Three options contribute most to the quality of a language model: unit-normalised queries and keys (others saturate the
    tanh of the hash), a short convolution before the hash (buckets do not see which tokens are adjacent), and data-dependent
    decay with an output norm per head and a gate in place of a denominator. The layer of the paper is
    ``RaceConfig(qk_norm=False, short_conv=0, decay="none", normalization="global", output_gate=False)``. The authors' released
    code also has ``normalization="bucket", share_planes=True, train_beta=False, beta_init=exp(-log_temp) / sqrt(head_dim)``.

    Raises:
        ValueError: a field is out of its range or contradicts another one.
    """

    dim: int | None = Field(
        default=None, ge=1, le=WIDTH_LIMIT, description="Width of the layer's input and output. A model fills it in."
    )
    num_heads: int | None = Field(default=None, ge=1, le=WIDTH_LIMIT, description="Query heads. A model fills it in.")
    num_kv_heads: int | None = Field(
        default=None,
        ge=1,
        le=WIDTH_LIMIT,
        description="Key/value heads, a divisor of num_heads; None: num_heads. A model fills it in.",
    )
    head_dim: int | None = Field(default=None, ge=1, le=WIDTH_LIMIT, description="Width of one head; None: dim // num_heads.")
    causal: bool = Field(default=True, description="Whether a token reads only itself and the tokens before it.")

    num_tables: int = Field(
        default=4, ge=1, le=2**16, description="Hash tables L: independent sets of buckets whose similarities add."
    )
    num_planes: int = Field(
        default=4,
        description="Hyperplanes P per table, 1 to 10: a table has 2**P buckets. More planes "
        "resolve more than more tables, at a cost of 2**P.",
    )
    beta_init: float | tuple[float, ...] = Field(
        default=2.0,
        description="Initial beta (sharpness) of the soft hash: one number, or one per key/value head. 2 suits 4 "
        "planes, 4 suits 8.",
    )
    train_beta: bool = Field(default=True, description="Whether beta is trained, one number per key/value head.")
    train_planes: bool = Field(
        default=False,
        description="Whether the hyperplanes are trained; they are then stored in checkpoints. "
        "Otherwise they follow from the seed and the layer's index.",
    )
    share_planes: bool = Field(default=False, description="Whether the heads of a layer share one set of hyperplanes.")
    seed: int = Field(
        default=0,
        ge=0,
        le=SEED_LIMIT,
        description="Seed of the hyperplanes, and of the initial weights of a layer outside a model.",
    )
    normalization: Literal["global", "bucket", "none"] = Field(
        default="none",
        description="global: divide by the summed similarity, as in the paper. bucket: divide in each "
        "bucket, as in its released code. none: no division, but an RMS norm of each head's "
        "output; best with decay per token. Default: none if causal, else global.",
    )
    qk_norm: bool = Field(default=True, description="Scale each query and key to a learned length per head before hashing.")
    short_conv: ConvWidth = Field(
        default=4, description="Width of a causal depthwise convolution added to queries and keys; 0: none."
    )
    conv_values: bool = Field(default=False, description="Whether values get such a convolution too.")
    decay: Decay = Field(
        default="token",
        description="Decay of the state. none: no decay. multiscale: a fixed rate per head, from fast to "
        "none. token: data-dependent decay, a rate per head and token that is computed from the input. Default: "
        "token if causal, else none.",
    )
    output_gate: bool = Field(default=True, description="Multiply the output by a gate computed from the input.")
    gate_activation: GateActivation = Field(default="silu", description="Activation of the gate's logits: silu or sigmoid.")
    rope_base: Annotated[float, Field(gt=1, le=1e30)] | Literal["auto"] | None = Field(
        default="auto",
        description="Base of the rotary positions; None: no positions. auto: the model's base (10000 in "
        "a layer outside a model) without decay, none with decay: decay and convolution already encode "
        "positions, and rotated queries and keys hash worse.",
    )
    norm_eps: float = Field(default=1e-6, ge=1e-30, le=1, description="Added to the mean square in the RMS norm of the output.")
    backend: Literal["auto", "reference", "chunked", "triton"] = Field(
        default="auto", description="Implementation of the attention. auto: the fastest one available."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_without_causal(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("causal", True) is False:
            return {"decay": "none", "normalization": "global"} | values
        return values

    @field_validator("num_planes")
    @classmethod
    def _planes(cls, value: int) -> int:
        if not 1 <= value <= MAX_PLANES:
            raise ValueError(f"must be from 1 to {MAX_PLANES} (a table has 2**num_planes buckets)")
        return value

    @field_validator("beta_init")
    @classmethod
    def _beta(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if value == ():
            raise ValueError("must be one number, or one per key/value head")
        for beta in value if isinstance(value, tuple) else (value,):
            if not 1e-30 <= beta <= 1e30:
                raise ValueError("must be positive and finite, from 1e-30 to 1e30")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.causal and self.decay != "none":
            raise ValueError(f"decay={self.decay!r} needs an order of the tokens, but causal=False: set decay='none'")
        if not self.causal and self.normalization == "none":
            raise ValueError("normalization='none' is for causal layers, but causal=False: set normalization='global'")
        _check_conv_values(self.short_conv, self.conv_values)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads is not None and kv_heads is not None and heads % kv_heads:
            raise ValueError(f"num_heads = {heads} must be a multiple of num_kv_heads = {kv_heads}")
        if self.dim is not None and heads is not None and self.head_dim is None and self.dim % heads:
            raise ValueError(f"dim = {self.dim} is no multiple of num_heads = {heads}: change one or set head_dim")
        if self.resolved_rope_base() is not None and self.dim is not None and heads is not None and self.resolved_head_dim % 2:
            raise ValueError(
                f"rotary positions need an even head_dim; got {self.resolved_head_dim}: change it or set rope_base=None"
            )
        if isinstance(self.beta_init, tuple) and heads is not None and len(self.beta_init) != (kv_heads or heads):
            raise ValueError(
                f"beta_init has {len(self.beta_init)} numbers for {kv_heads or heads} key/value heads: "
                "give one number, or one per head"
            )
        return self

    @property
    def resolved_head_dim(self) -> int:
        """Width ``D`` of one head."""
        if self.head_dim is not None:
            return self.head_dim
        if self.dim is None or self.num_heads is None:
            raise ValueError("RaceConfig.dim and num_heads are not set: give both (a ModelConfig fills them in)")
        return self.dim // self.num_heads

    def resolved_rope_base(self, model_base: float | None = 10000.0) -> float | None:
        """The base of the rotary positions, or None: ``rope_base`` with "auto" resolved."""
        if self.rope_base == "auto":
            return model_base if self.decay == "none" else None
        return self.rope_base

    @property
    def num_features(self) -> int:
        """``S = L * 2**P``: buckets of all tables."""
        return self.num_tables * 2**self.num_planes

    def with_model_dims(
        self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None, rope_base: float | None = None
    ) -> RaceConfig:
        """This config with the widths and ``rope_base`` of a model; fields that are set already must agree.

        Raises:
            ValueError: a field is set to another value.
        """
        model = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        if head_dim is not None:
            model["head_dim"] = head_dim
        for name, value in model.items():
            mine = getattr(self, name)
            if mine not in (None, value):
                raise ValueError(
                    f"race.{name} = {mine} but the model's {name} = {value}: leave race.{name} out or make them equal"
                )
        return RaceConfig.model_validate(self.model_dump() | model | {"rope_base": self.resolved_rope_base(rope_base)})
