"""The command ``race-dist``: one thin function a verb."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from race_dist import __version__
from race_dist.cli import option_types
from race_dist.cli.errors import Verbs, default_device, end_failed_rank, open_standard_streams, replace_unknown_characters, work
from race_dist.cli.launch import launch, preflight
from race_dist.cli.runs import runs

if TYPE_CHECKING:
    from race_dist.training.trainer import Trainer

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"race-dist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RACE Attention: linear in the sequence length, exact over many ranks."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="What to train: a TOML file, or a preset such as demo.", metavar="CONFIG")],
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key, for example optim.lr=3e-4. Repeatable."),
    ] = None,
    nproc: Annotated[
        int | None,
        option_types.whole(
            metavar="N", help="Start N ranks on this machine. Leave it out under torchrun.", high=option_types.MOST_RANKS
        ),
    ] = None,
    engine: Annotated[
        Literal["native", "deepspeed", "megatron"] | None,
        typer.Option(metavar="NAME", help="native, deepspeed or megatron: -o engine=NAME."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run of the same name.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest good checkpoint; begin where there is none.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, make two steps on made-up text, write nothing.")
    ] = False,
) -> None:
    """Train a language model on text.

    The run goes to runs/NAME: its configuration, metrics.jsonl, checkpoints, the curves as a PNG, the weights as
    safetensors and a sample. One process is enough; several ranks share the sequences (parallel.sp) and the batch
    (parallel.dp), and get the same losses. Exit code 75: saved and left on request, --resume goes on.
    race-dist config lists the keys of CONFIG.
    """
    from race_dist.distributed.mesh import shutdown
    from race_dist.distributed.watchdog import abort_on_stall
    from race_dist.integrations.engines import join, make_trainer
    from race_dist.launch.local import launch_ranks, under_launcher
    from race_dist.launch.stop import StopFlag
    from race_dist.training import loop
    from race_dist.training.config import load_config
    from race_dist.training.logging.telemetry import Telemetry
    from race_dist.training.run_directory import RunDirectory, open_run
    from race_dist.training.trainer import open_corpus

    override = [*(override or ()), *([] if engine is None else [f"engine={engine}"])]
    settings = load_config(config, override)
    if overwrite and resume:
        raise ValueError("--overwrite and --resume exclude each other")
    directory = RunDirectory(settings.directory)
    if not under_launcher():
        dp, sp = settings.parallel.mesh(nproc or 1)
        directory.check_resumable() if resume else directory.check_free(overwrite=overwrite)
    elif nproc is not None:
        raise ValueError("--nproc starts ranks itself; leave it out under torchrun")
    if nproc is not None and nproc > 1:
        open_corpus(settings, dp, sp)  # what is wrong with the text is said once, not by every rank
        raise typer.Exit(launch_ranks(_again(config, override, overwrite, resume, dry_run), nproc))
    place = join(settings)
    trainer = make_trainer(settings, place)
    owned = nullcontext() if dry_run else open_run(directory, settings, place.world, resume=resume, overwrite=overwrite)
    if dry_run:
        _dry_run(trainer)
        return
    abort_on_stall(1.5 * settings.parallel.timeout)  # after the collectives' own timeout
    telemetry = Telemetry(place.device, tokens=lambda: trainer.step * settings.data.batch_size * settings.data.context)
    with work(), StopFlag() as stop, owned:
        outcome = loop.run(
            trainer, directory, resume=resume, hooks=loop.Hooks(stop_requested=stop.requested, probes=(telemetry.probe,))
        )
        shutdown()
    if outcome.stopped:
        raise typer.Exit(loop.STOPPED)


def _dry_run(trainer: Trainer) -> None:
    from race_dist.distributed.mesh import shutdown
    from race_dist.terminal import print_line
    from race_dist.training.dry_run import run_two_steps

    for line in run_two_steps(trainer):
        if trainer.mesh.rank == 0:
            print_line(line)
    shutdown()


def _again(config: Path, override: list[str] | None, overwrite: bool, resume: bool, dry_run: bool) -> list[str]:
    """The arguments of one rank of ``train``."""
    arguments = ["-m", "race_dist.cli", "train"]
    for change in override or ():
        arguments += ["--override", change]
    flags = {"--overwrite": overwrite, "--resume": resume, "--dry-run": dry_run}
    return [*arguments, *(flag for flag, given in flags.items() if given), "--", str(config)]


app.add_typer(runs)

_ATTENTION_LENGTHS = option_types.Counts((1024, 4096, 16384, 32768))
_DECODE_CONTEXTS = option_types.Counts((1000, 1_000_000, 1_000_000_000))
_STREAMING_LENGTHS = option_types.Counts((262144, 1048576))
bench = typer.Typer(no_args_is_help=True, help="Time this machine.")
app.add_typer(bench, name="bench")


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
    place = torch.device(device or default_device())
    shape = attention.Shape(0, heads, head_dim, tables, planes, not non_causal, dtype)
    report = attention.run(shape, list(lengths), place, repeats=repeats, memory_length=memory)
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

    place = torch.device(device or default_device())
    report = {
        "machine": machine_info(place),
        **time_decode(place, heads=heads, head_dim=head_dim, tables=tables, planes=planes, contexts=contexts),
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


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="What would be trained: a TOML file.", metavar="CONFIG")],
    gpu: Annotated[str, typer.Option(metavar="TYPE", help="a100, h100, h200, gh200-96gb, gh200-144gb, b200 or cpu.")] = "gh200",
    gpus: Annotated[int, option_types.whole(help="How many.", metavar="N", high=10**6)] = 1,
    per_node: Annotated[
        int, option_types.whole(help="How many a node. 0: as is usual for the type.", metavar="N", low=0, high=10**6)
    ] = 0,
    context: Annotated[
        int | None, option_types.count(help=f"Tokens a sequence: 75M, 1B. {option_types.COUNT_WORDS}.", metavar="T")
    ] = None,
    batch: Annotated[int | None, option_types.whole(help="Sequences a step.", metavar="B")] = None,
    dp: Annotated[int | None, option_types.whole(help="Fix the groups of ranks.", metavar="N")] = None,
    sp: Annotated[int | None, option_types.whole(help="Fix the ranks that share a sequence.", metavar="N")] = None,
    chunk_size: Annotated[
        int | None, option_types.count(help="Fix the chunk a rank; 0: not streamed.", metavar="T", low=0)
    ] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Fix whether blocks are computed again.")] = None,
    sharding: Annotated[Literal["none", "fsdp"] | None, typer.Option(help="Fix it.")] = None,
    keep: Annotated[Literal["device", "host"] | None, typer.Option(help="Fix where chunk states wait.")] = None,
    precision: Annotated[
        Literal["bfloat16", "float32", "float64"] | None, typer.Option(help="Left out: that of CONFIG.")
    ] = None,
    budget: Annotated[
        float,
        option_types.number(
            help="Seconds a step, for the largest context.", metavar="S", low=1e-6, high=option_types.LONGEST_TIME
        ),
    ] = 600.0,
    rates: Annotated[Path | None, option_types.input_file(help="Measured rates.", metavar="FILE.json")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key of CONFIG. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a step takes on a cluster, and how to lay it out, before any GPU is asked for.

    Memory by kind, bytes exchanged, time by part, the largest context, and why. What is not fixed is searched.
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


app.add_typer(launch, name="launch")
app.command()(preflight)


def main() -> None:
    """The console script."""
    open_standard_streams()
    replace_unknown_characters()
    try:
        app(prog_name="race-dist")
    except SystemExit as end:
        end_failed_rank(end.code)
        raise
