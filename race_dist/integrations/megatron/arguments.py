"""Arguments for Megatron-LM's parser: every race_* field of RaceTransformerConfig as ``--race-...``."""

from __future__ import annotations

from argparse import Action, ArgumentParser, BooleanOptionalAction
from typing import Any, Literal, get_args, get_origin, get_type_hints

from race_dist.integrations.megatron.config import PREFIX, RACE_FIELDS, RaceTransformerConfig
from race_dist.nn import RaceConfig


def add_race_args(parser: ArgumentParser) -> ArgumentParser:
    """Add one argument per race_* field and return the parser, as Megatron-LM's ``extra_args_provider`` must.

    ``core_transformer_config_from_args(args, RaceTransformerConfig)`` then builds the config.
    """
    group = parser.add_argument_group(title="RACE Attention")
    hints = get_type_hints(RaceTransformerConfig)
    described = {PREFIX + name: RaceConfig.model_fields[name].description or "" for name in RACE_FIELDS}
    described["race_rope"] = "Rotary positions in RACE layers: auto (only without decay), always or never."
    described["race_layout"] = "Order of the shards under context parallelism: zigzag (Megatron's loaders) or contiguous."
    for name, text in described.items():
        flag, default = "--" + name.replace("_", "-"), getattr(RaceTransformerConfig, name)
        options: dict[str, Any] = {"default": default, "help": text.replace("%", "%%")}
        if hints[name] is bool:
            options["action"] = BooleanOptionalAction
        elif get_origin(hints[name]) is Literal:
            options |= {"type": str, "choices": get_args(hints[name])}
        elif name == "race_beta_init":
            options |= {"type": float, "nargs": "+", "action": _OneOrMany}
        else:
            options["type"] = hints[name]
        group.add_argument(flag, **options)
    return parser


class _OneOrMany(Action):
    """Store one value as a number and several values as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
