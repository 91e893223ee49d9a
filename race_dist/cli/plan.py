"""``race-dist plan``: the memory, communication and time of a step, computed before any GPU is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from race_dist.cli import option_types


def plan(
    *,
    config: Annotated[Path, typer.Argument(help="The training to plan: a TOML file.", metavar="CONFIG")],
    gpu: Annotated[str, typer.Option(metavar="TYPE", help="a100, h100, h200, gh200-96gb, gh200-144gb, b200 or cpu.")] = "gh200",
    gpus: Annotated[int, option_types.integer(help="Number of GPUs.", metavar="N", high=10**6)] = 1,
    per_node: Annotated[
        int, option_types.integer(help="GPUs per node. 0: as is usual for the type.", metavar="N", low=0, high=10**6)
    ] = 0,
    context: Annotated[
        int | None, option_types.token_count(help=f"Tokens per sequence: 75M, 1B. {option_types.COUNT_SUFFIXES}.", metavar="T")
    ] = None,
    batch: Annotated[int | None, option_types.integer(help="Sequences per step.", metavar="B")] = None,
    dp: Annotated[int | None, option_types.integer(help="Fix the data-parallel groups.", metavar="N")] = None,
    sp: Annotated[int | None, option_types.integer(help="Fix the ranks that share a sequence.", metavar="N")] = None,
    chunk_size: Annotated[
        int | None, option_types.token_count(help="Fix the chunk per rank; 0: not streamed.", metavar="T", low=0)
    ] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Fix activation checkpointing.")] = None,
    sharding: Annotated[Literal["none", "fsdp"] | None, typer.Option(help="Fix how weights are sharded.")] = None,
    keep: Annotated[Literal["device", "host"] | None, typer.Option(help="Fix where chunk-start states are stored.")] = None,
    precision: Annotated[
        Literal["bfloat16", "float32", "float64"] | None, typer.Option(help="Default: that of CONFIG.")
    ] = None,
    budget: Annotated[
        float,
        option_types.number(
            help="Seconds per step, for the largest context.", metavar="S", low=1e-6, high=option_types.MAX_SECONDS
        ),
    ] = 600.0,
    rates: Annotated[Path | None, option_types.input_file(help="Measured rates.", metavar="FILE.json")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key of CONFIG. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Plan a step on a cluster: memory, time and parallel layout, before any GPU is allocated.

    Prints memory and time by part, bytes exchanged and the largest context. What is not fixed is searched.
    """
    import json

    from race_dist import planning
    from race_dist.training.config import load_config

    settings = load_config(config, override or ())
    cluster = planning.Cluster(planning.find_gpu(gpu), gpus, per_node)
    job = planning.Job.checked(
        settings.model,
        settings.data.context if context is None else context,
        settings.data.batch_size if batch is None else batch,
        settings.precision if precision is None else precision,
        compiled=settings.compile,
    )
    choices = planning.Choices(
        settings.parallel.dp if dp is None else dp,
        settings.parallel.sp if sp is None else sp,
        chunk_size,
        checkpointing,
        sharding,
        keep,
    )
    best = planning.recommend(job, cluster, None if rates is None else planning.load_rates(rates), choices)
    largest = planning.limits(best, choices, budget)
    if as_json:
        print(json.dumps(planning.to_json(best, largest, budget), indent=2))
    else:
        planning.print_report(best, largest, budget)
