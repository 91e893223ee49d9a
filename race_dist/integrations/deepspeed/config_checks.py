"""Checks of the values in a DeepSpeed configuration: DeepSpeed accepts many wrong values and fails later, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from race_dist import checks

AUTO = "auto"
COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
FLAGS = (
    "prescale_gradients",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_allgather",
    "disable_python_gc",
    "sparse_gradients",
    "dataloader_drop_last",
    "managed_gradient_accumulation",
    "use_data_before_expert_parallelism",
)
SECTIONS = (
    "optimizer",
    "scheduler",
    "zero_optimization",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "torch_autocast",
    "tensor_parallel",
    "expert_parallel",
    "activation_checkpointing",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "aio",
    "elasticity",
    "autotuning",
    "compression_training",
    "data_efficiency",
    "curriculum_learning",
    "checkpoint",
    "data_types",
    "pipeline",
    "hybrid_engine",
    "nebula",
    "progressive_layer_drop",
    "eigenvalue",
    "weight_quantization",
    "compile",
    "timers",
    "datastates_ckpt",
    "zenflow",
)
MODELS = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedBF16Config": "bf16", "DeepSpeedFP16Config": "fp16"}


def check_values(config: Mapping[str, Any]) -> None:
    """Check the types and ranges of the values that DeepSpeed does not check itself.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range.
    """
    for key, value in config.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a DeepSpeed configuration are strings; got {checks.typed_repr(key)}")
        name = _name(key)
        if key in SECTIONS and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be an object{_example(key)}; got {checks.typed_repr(value)}")
        if key in RULES and not (isinstance(value, str) and value == AUTO):
            RULES[key](name, value)
    for section in ("optimizer", "scheduler"):
        _check_named(section, config.get(section, {}))
    for section in ("bf16", "fp16"):
        enabled = config.get(section, {}).get("enabled", False)
        if not isinstance(enabled, str) or enabled != AUTO:
            checks.flag(_name(f"{section}.enabled"), enabled)


def _name(key: str) -> str:
    return f'"{key}" of the DeepSpeed configuration'


def _check_named(section: str, entry: Mapping[str, Any]) -> None:
    """Check the section of an optimizer or a scheduler: a name and its parameters."""
    for key, kind, words in (("type", str, "a name"), ("params", Mapping, "an object")):
        if key in entry and not isinstance(entry[key], kind):
            raise TypeError(f"{_name(f'{section}.{key}')} must be {words}; got {checks.typed_repr(entry[key])}")


def _check_print(name: str, value: Any) -> None:
    if value is not None and not (checks.is_number(value) and value >= 1):
        raise ValueError(f"{name} must be a number of at least 1, or null; got {checks.typed_repr(value)}")


RULES: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(COUNTS, partial(checks.integer, minimum=1, maximum=2**31 - 1)),
    **dict.fromkeys(FLAGS, checks.flag),
    "gradient_clipping": partial(checks.number, minimum=0),
    "gradient_predivide_factor": partial(checks.number, above=0),
    "steps_per_print": _check_print,
}


def validate_with_deepspeed(config: Mapping[str, Any], mpu: Any = None) -> None:
    """Let DeepSpeed parse the configuration, and turn its error into one sentence.

    Raises:
        ValueError: DeepSpeed does not accept the configuration.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(dict(config)), mpu)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([MODELS.get(error.title, error.title), *map(str, problem["loc"])])
        raise ValueError(
            f'"{where}" of the DeepSpeed configuration: {problem["msg"]}; got {checks.short_repr(problem["input"])}'
        ) from None
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"DeepSpeed does not accept the configuration: {words[:400]}") from error


def _example(section: str) -> str:
    examples = {
        "zero_optimization": '{"stage": 1}',
        "optimizer": '{"type": "AdamW", "params": {...}}',
        "bf16": '{"enabled": true}',
        "fp16": '{"enabled": true}',
    }
    return f", such as {examples[section]}" if section in examples else ""
