"""The command ``race-dist``: one thin function a verb."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from race_dist import __version__
from race_dist.cli_errors import default_device, end_failed_rank, failures, user_errors
from race_dist.cli_launch import launch, preflight
from race_dist.cli_runs import runs

if TYPE_CHECKING:
    from race_dist.training.trainer import Trainer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode="markdown",
                  context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> None:
    if wanted:
        print(f"race-dist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Show the version and exit.")] = False,
) -> None:
    """RACE Attention: linear in the sequence length, exact over many ranks."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="What to train: a TOML file.", metavar="CONFIG")],
    override: Annotated[list[str] | None, typer.Option(
        "--override", "-o", metavar="KEY=VALUE", help="Change one key, for example optim.lr=3e-4. Repeatable.")] = None,
    nproc: Annotated[int | None, typer.Option(
        min=1, metavar="N", help="Start N ranks on this machine. Leave it out under torchrun.")] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="native, deepspeed or megatron: -o engine=NAME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run of the same name.")] = False,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Go on from the run's newest good checkpoint; begin where there is none.")] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Check everything, make two steps on made-up text, write nothing.")] = False,
) -> None:
    """Train a language model on text.

    The run goes to runs/NAME: its configuration, metrics.jsonl, checkpoints, the curves as a PNG, the weights as
    safetensors and a sample. One process is enough; several ranks share the sequences (parallel.sp) and the batch
    (parallel.dp), and get the same losses. Exit code 75: saved and left on request, --resume goes on.
    """
    from race_dist.integrations.engines import join, make_trainer
    from race_dist.launch.local import launch_ranks, under_launcher
    from race_dist.launch.stop import StopFlag
    from race_dist.parallel.mesh import shutdown
    from race_dist.parallel.watch import guard_stalls
    from race_dist.training import loop
    from race_dist.training.config import load_config
    from race_dist.training.rundir import RunDirectory, open_run
    from race_dist.training.telemetry import Telemetry
    from race_dist.training.trainer import open_corpus

    override = [*(override or ()), *([] if engine is None else [f"engine={engine}"])]
    with user_errors():
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
    if nproc is not None and nproc > 1:
        raise typer.Exit(launch_ranks(_again(config, override, overwrite, resume, dry_run), nproc))
    with user_errors(), failures():
        place = join(settings)
        trainer = make_trainer(settings, place)
        owned = nullcontext() if dry_run else open_run(directory, settings, place.world, resume=resume, overwrite=overwrite)
    if dry_run:
        _rehearse(trainer)
        return
    guard_stalls(1.5 * settings.parallel.timeout)  # after the collectives' own timeout
    telemetry = Telemetry(place.device, tokens=lambda: trainer.step * settings.data.batch_size * settings.data.context)
    with failures(), StopFlag() as stop, owned:
        outcome = loop.run(trainer, directory, resume=resume,
                           hooks=loop.Hooks(stop_requested=stop.requested, probes=(telemetry.probe,)))
        shutdown()
    if outcome.stopped:
        raise typer.Exit(loop.STOPPED)


def _rehearse(trainer: Trainer) -> None:
    from race_dist.parallel.mesh import shutdown
    from race_dist.training.rehearsal import rehearse

    with failures():
        for line in rehearse(trainer):
            if trainer.ranks.rank == 0:
                print(line, flush=True)
        shutdown()


def _again(config: Path, override: list[str] | None, overwrite: bool, resume: bool, dry_run: bool) -> list[str]:
    """The arguments of one rank of ``train``."""
    arguments = ["-m", "race_dist.cli", "train", str(config)]
    for change in override or ():
        arguments += ["--override", change]
    flags = {"--overwrite": overwrite, "--resume": resume, "--dry-run": dry_run}
    return [*arguments, *(flag for flag, given in flags.items() if given)]


app.add_typer(runs)

bench = typer.Typer(no_args_is_help=True, help="Time this machine.")
app.add_typer(bench, name="bench")


@bench.command("attention")
def bench_attention(
    lengths: Annotated[str, typer.Option(metavar="T,T,...", help="Sequence lengths.")] = "1024,4096,16384,32768",
    heads: Annotated[int, typer.Option(min=1, metavar="H")] = 2,
    head_dim: Annotated[int, typer.Option(min=1, metavar="D")] = 64,
    tables: Annotated[int, typer.Option(min=1, metavar="L", help="Hash tables.")] = 4,
    planes: Annotated[int, typer.Option(min=1, max=10, metavar="P", help="Hyperplanes a table.")] = 4,
    non_causal: Annotated[bool, typer.Option("--non-causal", help="Every token reads all others.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Left out: cuda where there is a GPU.")] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Times each is timed.")] = 5,
    memory: Annotated[int | None, typer.Option(
        min=1, metavar="T", help="Also measure the memory that T tokens add (CPU).")] = None,
    out: Annotated[Path | None, typer.Option(
        metavar="FILE.json", help="Write the figures there, and a picture beside it.")] = None,
) -> None:
    """Time one attention call, forward and with its gradients, beside softmax and others."""
    import torch

    from race_dist.benchmarks import attention
    from race_dist.outputs import check_output_file

    with user_errors():
        if out is not None:
            check_output_file(out, "--out")
            check_output_file(out.with_suffix(".png"), "the picture beside --out")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16; got {dtype!r}")
        sizes = _numbers("--lengths", lengths)
        place = torch.device(device or default_device())
        shape = attention.Shape(0, heads, head_dim, tables, planes, not non_causal, dtype)
    report = attention.run(shape, sizes, place, repeats=repeats,
                           memory_length=memory)
    if out is not None:
        with user_errors():
            print(f"written: {out} and {attention.store(report, out)}")


@bench.command("decode")
def bench_decode(
    heads: Annotated[int, typer.Option(min=1, metavar="H")] = 64,
    head_dim: Annotated[int, typer.Option(min=1, max=256, metavar="D")] = 128,
    tables: Annotated[int, typer.Option(min=1, metavar="L", help="Hash tables.")] = 4,
    planes: Annotated[int, typer.Option(min=1, max=10, metavar="P", help="Hyperplanes a table.")] = 4,
    contexts: Annotated[str, typer.Option(metavar="T,T,...", help="Tokens read before.")] = "1000,1000000,1000000000",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Left out: cuda where there is a GPU.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the figures there.")] = None,
) -> None:
    """Time one token through one attention layer, after contexts of any length."""
    import json

    import torch

    from race_dist.benchmarks.decode import time_decode
    from race_dist.machine import machine
    from race_dist.outputs import check_output_file

    with user_errors():
        if out is not None:
            check_output_file(out, "--out")
        sizes = tuple(_numbers("--contexts", contexts))
        place = torch.device(device or default_device())
    report = {"machine": machine(place), **time_decode(place, heads=heads, head_dim=head_dim, tables=tables, planes=planes,
                                                       contexts=sizes)}
    for context, row in report["microseconds"].items():
        print(f"after {context:,} tokens: {row['p50']:.1f} us a step (p10 {row['p10']:.1f}, p90 {row['p90']:.1f})")
    if out is not None:
        with user_errors():
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out}")


@bench.command("streaming")
def bench_streaming(
    config: Annotated[Path, typer.Argument(help="The model and its text: a training TOML.", metavar="CONFIG")],
    lengths: Annotated[str, typer.Option(metavar="T,T,...", help="Tokens of each sequence.")] = "262144,1048576",
    chunk: Annotated[int, typer.Option(min=1, metavar="C", help="Tokens whose activations exist at a time.")] = 8192,
    override: Annotated[list[str] | None, typer.Option(
        "--override", "-o", metavar="KEY=VALUE", help="Change one key of the configuration. Repeatable.")] = None,
    keep: Annotated[Literal["device", "host", "subtract"], typer.Option(help="Where carries at chunk starts wait.")] = "device",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks first.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Left out: cuda where there is a GPU.")] = None,
    limit_seconds: Annotated[float | None, typer.Option(
        min=0, metavar="S", help="End a step after so long with what it has shown.")] = None,
    store: Annotated[str | None, typer.Option(
        metavar="FOLDER", help="Store a step under way there; the same command then goes on with it.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the kernels of a few chunks by time.")] = False,
    out: Annotated[Path | None, typer.Option(
        metavar="FILE.json", help="Write the figures there, and a picture of several lengths beside it.")] = None,
) -> None:
    """Time one exact optimizer step of a whole model over one long sequence."""
    from race_dist.benchmarks import streaming
    from race_dist.outputs import check_output_file
    from race_dist.training.config import load_config

    with user_errors():
        if out is not None:
            check_output_file(out, "--out")
            check_output_file(out.with_suffix(".png"), "the picture beside --out")
        options = streaming.Options(chunk, device or default_device(), keep, compiled, threads, limit_seconds, store,
                                    profile=profile)
        streaming.run(load_config(config, override or ()), _numbers("--lengths", lengths), options, out=out)
        if out is not None:
            print(f"written: {out}")


def _numbers(option: str, text: str) -> list[int]:
    """``"1024,4096"`` as numbers."""
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise ValueError(f"{option} takes numbers with commas between them; got {text!r}")
    return [int(part) for part in text.split(",")]


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="What would be trained: a TOML file.", metavar="CONFIG")],
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, gh200-96gb, gh200-144gb, b200 or cpu.")] = "gh200",
    gpus: Annotated[int, typer.Option(help="How many.", metavar="N")] = 1,
    per_node: Annotated[int, typer.Option(help="How many a node. 0: as is usual for the type.", metavar="N")] = 0,
    context: Annotated[str | None, typer.Option(help="Tokens a sequence: 75M, 1B.", metavar="T")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.", metavar="B")] = None,
    dp: Annotated[int | None, typer.Option(help="Fix the groups of ranks.", metavar="N")] = None,
    sp: Annotated[int | None, typer.Option(help="Fix the ranks that share a sequence.", metavar="N")] = None,
    chunk_size: Annotated[str | None, typer.Option(help="Fix the chunk a rank; 0: not streamed.", metavar="T")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Fix whether blocks are computed again.")] = None,
    sharding: Annotated[str | None, typer.Option(help="Fix it: none or fsdp.")] = None,
    keep: Annotated[str | None, typer.Option(help="Fix where chunk states wait: device or host.")] = None,
    precision: Annotated[str | None, typer.Option(help="bfloat16, float32 or float64.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds a step, for the largest context.", metavar="S")] = 600.0,
    rates: Annotated[Path | None, typer.Option(help="Measured rates.", metavar="FILE.json")] = None,
    override: Annotated[list[str] | None, typer.Option(
        "--override", "-o", metavar="KEY=VALUE", help="Change one key of CONFIG. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a step takes on a cluster, and how to lay it out, before any GPU is asked for.

    Memory by kind, bytes exchanged, time by part, the largest context, and why. What is not fixed is searched.
    """
    import json

    from race_dist import planning
    from race_dist.training.config import load_config

    with user_errors():
        settings = load_config(config, override or ())
        cluster = planning.Cluster(planning.find_gpu(gpu), gpus, per_node)
        tokens = settings.data.context if context is None else planning.parse_count(context)
        job = planning.Job.checked(settings.model, tokens, batch or settings.data.batch_size, precision or settings.precision,
                                   compiled=settings.compile)
        choices = planning.Choices.checked(dp or settings.parallel.dp, sp or settings.parallel.sp, chunk_size, checkpointing,
                                           sharding, keep)
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
    try:
        app(prog_name="race-dist")
    except SystemExit as end:
        end_failed_rank(end.code)
        raise


if __name__ == "__main__":
    main()
