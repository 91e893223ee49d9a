"""The verbs ``race-dist bench ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from race_dist.cli import option_types
from race_dist.cli.errors import default_device

_ATTENTION_LENGTHS = option_types.Counts((1024, 4096, 16384, 32768))
_DECODE_CONTEXTS = option_types.Counts((1000, 1_000_000, 1_000_000_000))
_STREAMING_LENGTHS = option_types.Counts((262144, 1048576))
bench = typer.Typer(no_args_is_help=True, help="Time this machine.")


@bench.command("attention")
def bench_attention(
    lengths: Annotated[
        option_types.Counts, option_types.counts(metavar="T,T,...", help=f"Sequence lengths. {option_types.COUNT_WORDS}.")
    ] = _ATTENTION_LENGTHS,
    heads: Annotated[int, option_types.whole(metavar="H", help="Attention heads.", high=2**16)] = 2,
    head_dim: Annotated[int, option_types.whole(metavar="D", help="Width of a head.", high=2**12)] = 64,
    tables: Annotated[int, option_types.whole(metavar="L", help="Hash tables.", high=2**16)] = 4,
    planes: Annotated[int, option_types.whole(metavar="P", help="Hyperplanes a table.", high=10)] = 4,
    non_causal: Annotated[bool, typer.Option("--non-causal", help="Every token reads all others.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the inputs.")] = "float32",
    device: Annotated[str | None, option_types.device()] = None,
    repeats: Annotated[int, option_types.whole(metavar="N", help="Times each is timed.", high=10**6)] = 5,
    memory: Annotated[
        int | None, option_types.count(metavar="T", help="Also measure the memory that T tokens add (CPU).")
    ] = None,
    out: Annotated[
        Path | None,
        option_types.output_file(
            metavar="FILE.json", help="Write the figures there, and a picture beside it.", make_folder=True
        ),
    ] = None,
) -> None:
    """Time one attention call, forward and with its gradients, beside softmax and others."""
    import torch

    from race_dist.benchmarks import attention
    from race_dist.output_paths import check_output_file

    if out is not None:
        check_output_file(out.with_suffix(".png"), "the picture beside --out")
    torch_device = torch.device(device or default_device())
    shape = attention.Shape(0, heads, head_dim, tables, planes, not non_causal, dtype)
    report = attention.run(shape, list(lengths), torch_device, repeats=repeats, memory_length=memory)
    if out is not None:
        print(f"written: {out} and {attention.store(report, out)}")


@bench.command("decode")
def bench_decode(
    heads: Annotated[int, option_types.whole(metavar="H", help="Attention heads.", high=2**16)] = 64,
    head_dim: Annotated[int, option_types.whole(metavar="D", help="Width of a head.", high=256)] = 128,
    tables: Annotated[int, option_types.whole(metavar="L", help="Hash tables.", high=2**16)] = 4,
    planes: Annotated[int, option_types.whole(metavar="P", help="Hyperplanes a table.", high=10)] = 4,
    contexts: Annotated[
        option_types.Counts, option_types.counts(metavar="T,T,...", help=f"Tokens read before. {option_types.COUNT_WORDS}.")
    ] = _DECODE_CONTEXTS,
    device: Annotated[str | None, option_types.device()] = None,
    out: Annotated[
        Path | None, option_types.output_file(metavar="FILE.json", help="Write the figures there.", make_folder=True)
    ] = None,
) -> None:
    """Time one token through one attention layer, after contexts of any length."""
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
        print(f"after {context:,} tokens: {row['p50']:.1f} us a step (p10 {row['p10']:.1f}, p90 {row['p90']:.1f})")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)
        print(f"written: {out}")


@bench.command("streaming")
def bench_streaming(
    config: Annotated[Path, typer.Argument(help="The model and its text: a training TOML.", metavar="CONFIG")],
    lengths: Annotated[
        option_types.Counts,
        option_types.counts(metavar="T,T,...", help=f"Tokens of each sequence. {option_types.COUNT_WORDS}."),
    ] = _STREAMING_LENGTHS,
    chunk: Annotated[int, option_types.count(metavar="C", help="Tokens whose activations exist at a time.")] = 8192,
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key of the configuration. Repeatable."),
    ] = None,
    keep: Annotated[Literal["device", "host", "subtract"], typer.Option(help="Where carries at chunk starts wait.")] = "device",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks first.")] = False,
    threads: Annotated[int | None, option_types.whole(metavar="N", help="CPU threads.", high=4096)] = None,
    device: Annotated[str | None, option_types.device()] = None,
    limit_seconds: Annotated[
        float | None,
        option_types.number(
            metavar="S", help="End a step after so long with what it has shown.", low=0, high=option_types.LONGEST_TIME
        ),
    ] = None,
    store: Annotated[
        Path | None,
        option_types.output_folder(
            metavar="FOLDER", help="Store a step under way there; the same command then goes on with it.", follow=True
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the kernels of a few chunks by time.")] = False,
    out: Annotated[
        Path | None,
        option_types.output_file(
            metavar="FILE.json", help="Write the figures there, and a picture of several lengths beside it.", make_folder=True
        ),
    ] = None,
) -> None:
    """Time one exact optimizer step of a whole model over one long sequence."""
    from race_dist.benchmarks import streaming
    from race_dist.output_paths import check_output_file
    from race_dist.training.config import load_config

    if out is not None:
        check_output_file(out.with_suffix(".png"), "the picture beside --out")
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
            help="Results go there as they come; a run that is there is not made again. A page and a picture go beside it.",
            make_folder=True,
        ),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key, for example steps=600. Repeatable."),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one. Repeatable.")] = None,
    jobs: Annotated[int, option_types.whole(metavar="N", help="Runs side by side on the device.", high=1024)] = 1,
    threads: Annotated[int | None, option_types.whole(metavar="N", help="CPU threads of a run.", high=4096)] = None,
    device: Annotated[str | None, option_types.device()] = None,
    limit_seconds: Annotated[
        float | None,
        option_types.number(
            metavar="S",
            help="End after so long; runs under way are given up, the same command makes them again.",
            low=0,
            high=option_types.LONGEST_TIME,
        ),
    ] = None,
) -> None:
    """Train models with different mixing layers under one protocol and compare what they learn."""
    from race_dist.benchmarks.quality import protocol, run

    settings = protocol.load_protocol(config, override or ())
    if variant:
        settings = settings.chosen(variant)
    run.run_protocol(settings, out, run.Options(device or default_device(), jobs, threads, limit_seconds))
