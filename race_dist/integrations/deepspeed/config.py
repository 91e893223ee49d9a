"""Parse the sequence-parallel and RACE keys of a DeepSpeed configuration, and refuse incompatible settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict

from race_dist import checks
from race_dist.files import read_json_object
from race_dist.integrations.deepspeed.config_checks import check_values
from race_dist.nn import RaceConfig
from race_dist.strict_config import StrictConfig

SEQUENCE_PARALLEL_SIZE, RACE_SECTION = "sequence_parallel_size", "race_attention"
AUTO = "auto"  # a value that the caller fills in, as in transformers' DeepSpeed configurations
ONE_BIT = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb")


class RaceSection(StrictConfig):
    """The section ``"race_attention"`` of a DeepSpeed configuration. Every other key in it is a field of
    :class:`race_dist.RaceConfig`: ``"num_planes": 6``.

    Attributes:
        layout: order of the shards, "contiguous" or "zigzag".
        layers: which layers of a transformers model to convert; None: all.
        inherit_rope: whether converted layers keep the model's rotary positions.
    """

    model_config = ConfigDict(extra="allow")

    layout: Literal["contiguous", "zigzag"] = "contiguous"
    layers: tuple[int, ...] | None = None
    inherit_rope: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The fields of RaceConfig that the section sets."""
        return dict(self.model_extra or {})

    @classmethod
    def read(cls, section: Any) -> RaceSection:
        """Check a section. Raises ValueError in one sentence."""
        if not isinstance(section, Mapping):
            raise ValueError(
                f'"{RACE_SECTION}" must be an object with layout, layers, inherit_rope and fields of RaceConfig; '
                f"got {checks.typed_repr(section)}"
            )
        parsed = cls.check(dict(section), source=f'"{RACE_SECTION}"')
        RaceConfig.check(parsed.options, source=f'"{RACE_SECTION}"')
        return parsed


class ParsedConfig(NamedTuple):
    """``config``: the configuration for DeepSpeed, without the section of this package; ``sp``: number of ranks that share a
    sequence (None: all); ``race``: the section, or None if the attention is not replaced."""

    config: dict[str, Any]
    sp: int | None
    race: RaceSection | None


def read_config(config: Mapping[str, Any] | str | Path) -> ParsedConfig:
    """Split a DeepSpeed configuration, given as a dictionary or as the path of a JSON file.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file does not exist, or the configuration does not have this form.
    """
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"there is no DeepSpeed configuration {path}")
        config = read_json_object(path)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"a DeepSpeed configuration is a dictionary or the path of a JSON file; got {checks.typed_repr(config)}"
        )
    check_values(config)
    ds_config = copy.deepcopy(dict(config))
    section = ds_config.pop(RACE_SECTION, None)
    size = ds_config.get(SEQUENCE_PARALLEL_SIZE, 1)
    if isinstance(size, str) and size == AUTO:
        return ParsedConfig(ds_config, None, None if section is None else RaceSection.read(section))
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f'"{SEQUENCE_PARALLEL_SIZE}" must be an integer of at least 1, or "{AUTO}"; got {checks.short_repr(size)}'
        )
    return ParsedConfig(ds_config, size, None if section is None else RaceSection.read(section))


def resolve_auto(ds_config: Mapping[str, Any], *, bfloat16: bool) -> dict[str, Any]:
    """Replace the "auto" values: bf16 is enabled if the model's weights are bfloat16, the micro-batch is 1 if no batch size is
    set, and other keys are removed so that DeepSpeed's defaults apply."""

    def resolve(value: Any) -> Any:
        return {k: resolve(v) for k, v in value.items() if v != AUTO} if isinstance(value, Mapping) else value

    result: dict[str, Any] = resolve(ds_config)
    if (ds_config.get("bf16") or {}).get("enabled") == AUTO:
        result["bf16"] = result["bf16"] | {"enabled": bfloat16}
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & result.keys():
        result["train_micro_batch_size_per_gpu"] = 1
    return result


def check_compatible(config: Mapping[str, Any], sp: int, *, mpu: object = None, mesh_param: object = None) -> None:
    """Refuse settings that do not give the gradient of the whole batch if ``sp > 1`` ranks share a sequence.

    Raises:
        ValueError: the setting, the reason and what to do instead.
    """
    if sp == 1:
        return
    zero = config.get("zero_optimization", {})
    optimizer = (config.get("optimizer") or {}).get("type", "")
    refused: list[tuple[object, str]] = [
        (
            mpu is not None,
            "initialize makes the mpu when ranks share sequences, and an mpu with get_data_parallel_group lets the weights of "
            "these ranks diverge under ZeRO-3: leave mpu out",
        ),
        (
            "data_parallel_size" in config or mesh_param is not None,
            '"data_parallel_size" (or mesh_param) makes DeepSpeed build its own mesh, in which gradients are not summed '
            f'over the ranks that share a sequence: leave it out; it is the number of ranks / "{SEQUENCE_PARALLEL_SIZE}"',
        ),
        (
            optimizer in ONE_BIT,
            f"the optimizer {optimizer} exchanges compressed momenta instead of gradients, over groups without "
            'sequence parallelism: use "AdamW"',
        ),
        (
            config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1.0) != 1.0,
            '"prescale_gradients" and "gradient_predivide_factor" change the scale of a sum over data-parallel ranks only: '
            "leave them out",
        ),
        (
            str(config.get("gradient_allreduce_op", "mean")).lower() != "mean",
            '"gradient_allreduce_op" other than "mean" changes the scale of the gradients when ranks share sequences: leave '
            "it out",
        ),
        (
            (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1,
            '"tensor_parallel" together with sequence parallelism has not been tested: leave it out',
        ),
    ]
    for key, harmless in (
        ("mics_shard_size", -1),
        ("zero_hpz_partition_size", 1),
        ("zero_quantized_gradients", False),
        ("zero_quantized_weights", False),
    ):
        refused.append(
            (
                zero.get(key, harmless) != harmless,
                f'"zero_optimization.{key}" reduces over its own groups; together with sequence parallelism that has not been '
                "tested: leave it out",
            )
        )
    for applies, reason in refused:
        if applies:
            raise ValueError(f'DeepSpeed with "{SEQUENCE_PARALLEL_SIZE}": {sp}: {reason}')


def gradient_scale(config: Mapping[str, Any], sp: int, numel: int) -> int:
    """The factor that corrects DeepSpeed's reduction for a parameter of ``numel`` elements.

    DeepSpeed sums over the ranks of a sequence and averages over the data-parallel groups, except in ZeRO-3's reduce-scatter,
    which averages over all ranks: there gradients are ``sp`` times too small. That path is taken with ``"reduce_scatter"``
    (the default). Without it, it is taken by parameters larger than a bucket, or by all if gradients are not contiguous.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return 1
    bucket = zero.get("reduce_bucket_size", 5e8)
    scattered = zero.get("reduce_scatter", True) or not zero.get("contiguous_gradients", True)
    return sp if scattered or numel > bucket else 1
