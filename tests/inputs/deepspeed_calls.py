"""DeepSpeed's initialize and the keys of its configuration. No input gets as far as an engine."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.inputs import values as v
from tests.inputs.table import Subject, Value

OK = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}


def initialize(**arguments: Any) -> object:
    """Treat keys of the configuration as arguments."""
    from race_dist.integrations.deepspeed import initialize as call

    options = {
        key: arguments.pop(key)
        for key in (
            "config",
            "model",
            "timeout",
            "mpu",
            "mesh_param",
            "sequence_mesh",
            "optimizer",
            "lr_scheduler",
            "model_parameters",
        )
        if key in arguments
    }
    model = options.pop("model", None) if "model" in options else nn.Linear(1, 1)
    return call(model=model, config=options.pop("config", OK | arguments), **options)


def read(**keys: Any) -> object:
    """Check only the keys: DeepSpeed's own errors are covered by :func:`initialize`."""
    from race_dist.integrations.deepspeed.config import read_config

    return read_config(OK | keys)


COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "sequence_parallel_size")
SECTIONS = ("optimizer", "zero_optimization", "bf16", "fp16", "scheduler", "tensor_parallel", "activation_checkpointing")


def objects() -> list[Value]:
    return [*v.common(but=("{}",)), v.value("inf", v.INF), v.value("10**30", 10**30)]


SUBJECTS = [
    Subject(
        "deepspeed.initialize",
        initialize,
        lambda: {"model": None},
        {"model": [*v.common(), *v.wrong(("without parameters", nn.Identity), ("class", lambda: nn.Linear))]},
        complete=False,
    ),
    Subject(
        "deepspeed.initialize()",
        initialize,
        lambda: {"timeout": 0},
        {"timeout": [*v.numbers(above=0), v.value("1e300", 1e300)]},
        complete=False,
    ),
    Subject(
        "deepspeed.initialize(...)",
        initialize,
        lambda: {"config": 3},
        {
            "sequence_mesh": v.common(optional=True),
            "mpu": v.common(optional=True),
            "optimizer": v.common(optional=True, but=("int",)),
            "lr_scheduler": v.common(optional=True, but=("int",)),
            "mesh_param": v.common(optional=True, but=("array",)),
            "model_parameters": v.common(optional=True, but=("[]", "()", "array")),
            "config": [*v.common("None", "1.5", "True", "[]", "[1]", "()", "object", "Unprintable", "3", "nan")],
        },
        names={"config": ("configuration",)},
        complete=False,
    ),
    Subject(
        "deepspeed.initialize(config=...)",
        read,
        dict,
        {
            **{
                key: v.integers(
                    least=1, most=None if key == "sequence_parallel_size" else 2**31 - 1, huge=key != "sequence_parallel_size"
                )
                for key in COUNTS
            },
            **{key: objects() for key in SECTIONS},
            "race_attention": [*v.common(but=("{}", "None"))],
            "gradient_clipping": v.numbers(least=0, right=1.0),
            "prescale_gradients": v.flags(),
            "zero_allow_untested_optimizer": v.flags(),
            "wall_clock_breakdown": v.flags(),
            "gradient_predivide_factor": v.numbers(above=0),
            "steps_per_print": [*(one for one in v.numbers(above=0, optional=True) if one.label not in {"inf", "10**400"})],
        },
    ),
]
