"""RaceTransformerConfig: Megatron's TransformerConfig plus the fields of RaceConfig with the prefix ``race_``."""

from __future__ import annotations

import numbers
import re
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, cast, get_args, get_type_hints

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from race_dist.messages import short_repr
from race_dist.nn import RaceConfig
from race_dist.parallel import Layout
from race_dist.parallel.sharding import check_layout

PREFIX = "race_"
# Fields of RaceConfig for which Megatron has its own: widths, numbers of heads, the mask type, rotary_base.
OWNED_BY_MEGATRON = ("dim", "num_heads", "num_kv_heads", "head_dim", "causal", "rope_base")
RACE_FIELDS = tuple(name for name in RaceConfig.model_fields if name not in OWNED_BY_MEGATRON)
_DEFAULTS = RaceConfig()


MAX_SIZE = 2**20  # of layers, widths, heads and ranks: beyond it no model fits a machine
COUNT_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
DROPOUT_FIELDS = ("attention_dropout", "hidden_dropout")


@dataclass
class RaceTransformerConfig(TransformerConfig):  # type: ignore[misc]
    """A TransformerConfig whose self-attention layers are RACE: all of them, or those that ``linear_attention_freq`` selects.

    ``linear_attention_freq``: None makes every layer RACE, N makes every N-th layer softmax, a list has one entry per
    layer, 1 for RACE and 0 for softmax.

    Attributes:
        race_num_tables ... race_backend: as in :class:`race_dist.RaceConfig`, with the same defaults. A tuple
            ``race_beta_init`` has one number per query group (``num_query_groups``). ``race_seed`` also seeds the initial
            weights of the RACE layers, which are therefore the same for every tensor-parallel size.
        race_rope: whether RACE layers apply the model's rotary positions to queries and keys: "auto" (only without decay,
            as in :class:`race_dist.RaceConfig`), "always" or "never".
        race_layout: order of the shards under context parallelism: "zigzag" (the order of Megatron's data loaders) or
            "contiguous" (for callers that shard the batch themselves).

    Raises:
        ValueError: a field is out of its range, or requests what a RACE layer does not support; the message gives the reason.
    """

    attention_dropout: float = 0.0
    race_num_tables: int = _DEFAULTS.num_tables
    race_num_planes: int = _DEFAULTS.num_planes
    race_beta_init: Any = _DEFAULTS.beta_init
    race_train_beta: bool = _DEFAULTS.train_beta
    race_train_planes: bool = _DEFAULTS.train_planes
    race_share_planes: bool = _DEFAULTS.share_planes
    race_seed: int = _DEFAULTS.seed
    race_normalization: Literal["global", "bucket", "none"] = _DEFAULTS.normalization
    race_qk_norm: bool = _DEFAULTS.qk_norm
    race_short_conv: int = _DEFAULTS.short_conv
    race_conv_values: bool = _DEFAULTS.conv_values
    race_decay: Literal["none", "multiscale", "token"] = _DEFAULTS.decay
    race_output_gate: bool = _DEFAULTS.output_gate
    race_gate_activation: Literal["silu", "sigmoid"] = _DEFAULTS.gate_activation
    race_norm_eps: float = _DEFAULTS.norm_eps
    race_backend: Literal["auto", "reference", "chunked", "triton"] = _DEFAULTS.backend
    race_rope: Literal["auto", "always", "never"] = "auto"
    race_layout: Literal["zigzag", "contiguous"] = "zigzag"
    # A copy of num_query_groups: Megatron's Attention overwrites the original where there are fewer groups than ranks.
    race_query_groups: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        _check_numbers(self)
        super().__post_init__()
        self.race_query_groups = cast(int, self.num_query_groups)
        if isinstance(self.race_beta_init, list):
            self.race_beta_init = tuple(self.race_beta_init)
        if self.race_rope not in ("auto", "always", "never"):
            raise ValueError(f'race_rope must be "auto", "always" or "never"; got {self.race_rope!r}')
        if self.race_layout not in ("zigzag", "contiguous"):
            raise ValueError(f"race_layout must be one of 'zigzag', 'contiguous'; got {short_repr(self.race_layout)}")
        self.race()
        pattern = self.race_pattern()
        if any(pattern):
            _check_supported(self, hybrid=not all(pattern))

    def race(self, *, causal: bool = True) -> RaceConfig:
        """The race_* fields as a RaceConfig, with widths and heads. ValueError names a wrong field with its prefix."""
        chosen = {name: getattr(self, PREFIX + name) for name in RACE_FIELDS}
        try:
            return RaceConfig(
                dim=self.hidden_size,
                num_heads=self.num_attention_heads,
                num_kv_heads=self.race_query_groups,
                head_dim=self.kv_channels,
                causal=causal,
                rope_base=None,
                **chosen,
            )
        except ValueError as error:
            raise ValueError(_with_prefix(str(error))) from None

    @property
    def layout(self) -> Layout:
        """Order of the shards under context parallelism."""
        return check_layout(self.race_layout)

    def race_pattern(self) -> list[bool]:
        """Whether each of the ``num_layers`` layers is RACE."""
        freq, count = cast(Any, self.linear_attention_freq), cast(int, self.num_layers)
        if freq is None:
            return [True] * count
        if type(freq) is int and 1 <= freq <= MAX_SIZE:
            return [(i + 1) % freq != 0 for i in range(count)]
        if isinstance(freq, (list, tuple)) and len(freq) == count and all(type(f) is int and f in (0, 1) for f in freq):
            return [bool(entry) for entry in freq]
        raise ValueError(
            f"linear_attention_freq is None, N (every N-th layer is softmax) or a list of {count} zeros "
            f"(softmax) and ones (RACE), one per layer; got {short_repr(freq)}"
        )

    @property
    def race_uses_rope(self) -> bool:
        """Whether RACE layers apply rotary positions to queries and keys."""
        return self.race_rope == "always" or (self.race_rope == "auto" and self.race_decay == "none")


def _check_numbers(config: Any) -> None:
    """Raise ValueError for Megatron's own numbers that are out of range: Megatron computes with them before it checks them."""
    hints = get_type_hints(TransformerConfig)
    for name, hint in hints.items():
        kinds = set(get_args(hint) or (hint,))
        value: Any = getattr(config, name, None)
        if not kinds <= {int, float, NoneType} or (value is None and NoneType in kinds):
            continue
        is_integer = float not in kinds
        if isinstance(value, bool) or not issubclass(type(value), numbers.Integral if is_integer else numbers.Real):
            raise ValueError(f"{name} must be a {'whole ' if is_integer else ''}number; got {short_repr(value)}")
        if name in COUNT_FIELDS and not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{name} must be from 1 to {MAX_SIZE:,}; got {short_repr(value)}")
        if name in DROPOUT_FIELDS and not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {short_repr(value)}")
        if name == "layernorm_epsilon" and not 0 < value < 1:
            raise ValueError(f"{name} must be above 0 and below 1; got {short_repr(value)}")
    heads, groups = config.num_attention_heads, config.num_query_groups
    if config.kv_channels is None and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size = {config.hidden_size} is no multiple of num_attention_heads = {heads}: change one, or "
            "set kv_channels, the width of a head"
        )
    if groups is not None and heads % groups:
        raise ValueError(f"num_attention_heads = {heads} is no multiple of num_query_groups = {groups}: change one")


def require_race_config(config: object, where: str) -> RaceTransformerConfig:
    """Return ``config`` if it is a RaceTransformerConfig; raise TypeError with the fix if it is not.

    Megatron passes deep copies of the config to attention where there are fewer query groups than ranks, so the class is
    checked and not the object. Newer builders pass a model's config, whose ``transformer`` attribute is the one checked.
    """
    config = getattr(config, "transformer", config)
    if isinstance(config, RaceTransformerConfig):
        return config
    raise TypeError(
        f"{where} needs a RaceTransformerConfig, but the model was built from a {type(config).__name__}: in "
        "Megatron-LM build it with core_transformer_config_from_args(args, RaceTransformerConfig)"
    )


def _check_supported(config: Any, *, hybrid: bool) -> None:
    """Raise ValueError for options of Megatron that RACE layers do not support."""
    reasons = {
        "multi_latent_attention": "its keys and values are not per head",
        "qk_clip": "it clips logits, which RACE layers do not have",
        "flash_decode": "it decodes from cached keys",
        "fp8_dot_product_attention": "the sketch is summed in float32",
        "fp8_multi_head_attention": "the sketch is summed in float32",
        "apply_query_key_layer_scaling": "it scales logits, which RACE layers do not have: use race_qk_norm",
    }
    for name, reason in reasons.items():
        if getattr(config, name, False):
            raise ValueError(f"{name} is not supported with RACE layers: {reason}; turn it off")
    if config.attention_backend == AttnBackend.local:
        raise ValueError(
            "attention_backend is local, with which Megatron replaces the attention of every layer by its own "
            "softmax: leave --attention-backend out"
        )
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout is {config.attention_dropout}, but a RACE layer has no attention weights to "
            "drop: set it to 0 (--attention-dropout 0)"
        )
    if config.experimental_attention_variant is not None:
        raise ValueError(
            f"experimental_attention_variant is {config.experimental_attention_variant!r}, which names another "
            "attention: leave it out"
        )
    if config.window_size is not None and not hybrid:
        raise ValueError(
            f"window_size is {config.window_size}, but every layer is RACE, which attends to all earlier tokens: "
            "leave it out or make some layers softmax (linear_attention_freq)"
        )
    if hybrid and config.race_layout == "contiguous" and config.context_parallel_size > 1:
        raise ValueError(
            'race_layout is "contiguous", but Megatron\'s softmax layers take zigzag shards under context '
            'parallelism: use "zigzag" or make every layer RACE'
        )


def _with_prefix(sentence: str) -> str:
    """An error message of RaceConfig with the field names prefixed by ``race_``."""
    names = "|".join(sorted(RACE_FIELDS, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({names})(?=[ =])", rf"{PREFIX}\1", sentence)


assert {PREFIX + name for name in RACE_FIELDS} <= {f.name for f in fields(RaceTransformerConfig)}
