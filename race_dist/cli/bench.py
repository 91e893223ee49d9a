"""The verbs ``race-dist bench ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from race_dist.cli import option_types
from race_dist.cli.errors import default_device

_ATTENTION_LENGTHS = option_types.TokenCounts((1024, 4096, 16384, 32768))
_DECODE_CONTEXTS = option_types.TokenCounts((1000, 1_000_000, 1_000_000_000))
_STREAMING_LENGTHS = option_types.TokenCounts((262144, 1048576))
bench = typer.Typer(no_args_is_help=True, help="Time this machine.")


@bench.command("attention")
def bench_attention(
    lengths: Annotated[
        option_types.TokenCounts,
        option_types.token_counts(metavar="T,T,...", help=f"Sequence lengths. {option_types.COUNT_SUFFIXES}."),
    ] = _ATTENTION_LENGTHS,
    heads: Annotated[int, option_types.integer(metavar="H", help="Attention heads.", high=2**16)] = 2,
    head_dim: Annotated[int, option_types.integer(metavar="D", help="Width of each head.", high=2**12)] = 64,
    tables: Annotated[int, option_types.integer(metavar="L", help="Hash tables.", high=2**16)] = 4,
    planes: Annotated[int, option_types.integer(metavar="P", help="Hyperplanes per table.", high=10)] = 4,
    non_causal: Annotated[bool, typer.Option("--non-causal", help="Every token attends to all others.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the inputs.")] = "float32",
    device: Annotated[str | None, option_types.device()] = None,
    repeats: Annotated[int, option_types.integer(metavar="N", help="Repetitions of each measurement.", high=10**6)] = 5,
    memory: Annotated[
        int | None, option_types.token_count(metavar="T", help="Also measure the memory that T tokens add (CPU).")
    ] = None,
    out: Annotated[
        Path | None,
        option_types.output_file(metavar="FILE.json", help="Write the figures there, and a plot beside it.", make_folder=True),
    ] = None,
) -> None:
    """Time one attention call, forward and with its gradients, and its baselines."""
    import torch

    from race_dist.benchmarks import attention
    from race_dist.output_paths import check_output_file

    if out is not None:
        check_output_file(out.with_suffix(".png"), "the plot beside --out")
    torch_device = torch.device(device or default_device())
    shape = attention.Shape(0, heads, head_dim, tables, planes, not non_causal, dtype)
    report = attention.run(shape, list(lengths), torch_device, repeats=repeats, memory_length=memory)
    if out is not None:
        print(f"written: {out} and {attention.store(report, out)}")


@bench.command("decode")
def bench_decode(
    heads: Annotated[int, option_types.integer(metavar="H", help="Attention heads.", high=2**16)] = 64,
    head_dim: Annotated[int, option_types.integer(metavar="D", help="Width of each head.", high=256)] = 128,
    tables: Annotated[int, option_types.integer(metavar="L", help="Hash tables.", high=2**16)] = 4,
    planes: Annotated[int, option_types.integer(metavar="P", help="Hyperplanes per table.", high=10)] = 4,
    contexts: Annotated[
        option_types.TokenCounts,
        option_types.token_counts(
            metavar="T,T,...", help=f"Tokens of context before the timed token. {option_types.COUNT_SUFFIXES}."
        ),
    ] = _DECODE_CONTEXTS,
    device: Annotated[str | None, option_types.device()] = None,
    out: Annotated[
        Path | None, option_types.output_file(metavar="FILE.json", help="Write the figures there.", make_folder=True)
    ] = None,
) -> None:
    """Time one decoding step of one attention layer after contexts of any length."""
    import torch

    from race_dist.benchmarks.decode import time_decode
    from race_dist.files import write_json
    from race_dist.machine import machine_info

    torch_device = torch.device(device or default_device())
    report = {
        "machine": machine_info(torch_device),
        **time_decode(torch_device, heads=heads, head_dim=head_dim, tables=tables, planes=planes, contexts=contexts),
    }
    for context, row in report["microseconds"].items():
        print(f"after {context:,} tokens: {row['p50']:.1f} us per step (p10 {row['p10']:.1f}, p90 {row['p90']:.1f})")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)
        print(f"written: {out}")


@bench.command("streaming")
def bench_streaming(
    config: Annotated[Path, typer.Argument(help="The model and its text: a training TOML.", metavar="CONFIG")],
    lengths: Annotated[
        option_types.TokenCounts,
        option_types.token_counts(metavar="T,T,...", help=f"Tokens per sequence. {option_types.COUNT_SUFFIXES}."),
    ] = _STREAMING_LENGTHS,
    chunk: Annotated[
        int, option_types.token_count(metavar="C", help="Tokens per chunk, whose activations are in memory at a time.")
    ] = 8192,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key of the configuration. Repeatable."),
    ] = None,
    keep: Annotated[
        Literal["device", "host", "subtract"], typer.Option(help="Where carries at chunk starts are stored.")
    ] = "device",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks with torch.compile.")] = False,
    threads: Annotated[int | None, option_types.integer(metavar="N", help="CPU threads.", high=4096)] = None,
    device: Annotated[str | None, option_types.device()] = None,
    limit_seconds: Annotated[
        float | None,
        option_types.number(
            metavar="S", help="End a step after S seconds and report what was measured.", low=0, high=option_types.MAX_SECONDS
        ),
    ] = None,
    store: Annotated[
        Path | None,
        option_types.output_folder(
            metavar="FOLDER", help="Store an unfinished step there; the same command continues it.", follow=True
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the kernels of a few chunks by time.")] = False,
    out: Annotated[
        Path | None,
        option_types.output_file(
            metavar="FILE.json", help="Write the figures there, and a plot of several lengths beside it.", make_folder=True
        ),
    ] = None,
) -> None:
    """Time one exact optimizer step of a whole model over one long sequence."""
    from race_dist.benchmarks import streaming
    from race_dist.output_paths import check_output_file
    from race_dist.training.config import load_config

    if out is not None:
        check_output_file(out.with_suffix(".png"), "the plot beside --out")
    options = streaming.Options(
        chunk,
        device or default_device(),
        keep,
        compiled,
        threads,
        limit_seconds,
        None if store is None else str(store),
        profile=profile,
    )
    streaming.run(load_config(config, override or ()), list(lengths), options, out=out)
    if out is not None:
        print(f"written: {out}")


@bench.command("quality")
def bench_quality(
    config: Annotated[
        Path, typer.Argument(help="The protocol: a TOML file, for example configs/quality/lm-short.toml.", metavar="CONFIG")
    ],
    out: Annotated[
        Path,
        option_types.output_file(
            metavar="FILE.json",
            help="Results are written there as they come; finished runs are not repeated. A page and a plot go beside it.",
            make_folder=True,
        ),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key, for example steps=600. Repeatable."),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this variant. Repeatable.")] = None,
    jobs: Annotated[int, option_types.integer(metavar="N", help="Runs at the same time on the device.", high=1024)] = 1,
    threads: Annotated[int | None, option_types.integer(metavar="N", help="CPU threads per run.", high=4096)] = None,
    device: Annotated[str | None, option_types.device()] = None,
    limit_seconds: Annotated[
        float | None,
        option_types.number(
            metavar="S",
            help="End after S seconds; unfinished runs are dropped, the same command repeats them.",
            low=0,
            high=option_types.MAX_SECONDS,
        ),
    ] = None,
) -> None:
    """Train models with different mixing layers under one protocol and compare what they learn."""
    from race_dist.benchmarks.quality import protocol, run

    settings = protocol.load_protocol(config, override or ())
    if variant:
        settings = settings.chosen(variant)
    run.run_protocol(settings, out, run.Options(device or default_device(), jobs, threads, limit_seconds))
