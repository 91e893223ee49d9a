"""``race-dist train``: one rank, or the start of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from race_dist.cli import option_types
from race_dist.cli.errors import work
from race_dist.exit_codes import STOPPED

if TYPE_CHECKING:
    from race_dist.training.config import TrainConfig
    from race_dist.training.run_directory import RunDirectory


def train(
    config: Annotated[Path, typer.Argument(help="What to train: a TOML file, or a preset such as demo.", metavar="CONFIG")],
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key, for example optim.lr=3e-4. Repeatable."),
    ] = None,
    nproc: Annotated[
        int | None,
        option_types.integer(
            metavar="N", help="Start N ranks on this machine. Omit it under torchrun.", high=option_types.MAX_LOCAL_RANKS
        ),
    ] = None,
    engine: Annotated[
        Literal["native", "deepspeed", "megatron"] | None,
        typer.Option(metavar="NAME", help="native, deepspeed or megatron: -o engine=NAME."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run of the same name.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest valid checkpoint; start if there is none.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, run two steps on synthetic text, write nothing.")
    ] = False,
) -> None:
    """Train a language model on text.

    The run goes to runs/NAME: its configuration, metrics.jsonl, checkpoints, the loss curves as a PNG, the weights as
    safetensors and a sample. Several ranks split the sequences (parallel.sp) and the batch (parallel.dp) and get the
    same losses as one. Exit code 75: the run was asked to stop and saved; --resume continues it. race-dist config
    lists the keys of CONFIG.
    """
    from race_dist.launch.local import launch_ranks, under_launcher
    from race_dist.training.config import load_config
    from race_dist.training.run_directory import RunDirectory
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
        open_corpus(settings, dp, sp)  # a mistake in the text is reported once, not by every rank
        raise typer.Exit(launch_ranks(_rank_arguments(config, override, overwrite, resume, dry_run), nproc))
    if dry_run:
        _dry_run_rank(settings)
    else:
        _train_rank(settings, directory, resume=resume, overwrite=overwrite)


def _rank_arguments(config: Path, override: list[str], overwrite: bool, resume: bool, dry_run: bool) -> list[str]:
    """The arguments of ``python`` for one rank."""
    arguments = ["-m", "race_dist.cli", "train"]
    for change in override:
        arguments += ["--override", change]
    flags = {"--overwrite": overwrite, "--resume": resume, "--dry-run": dry_run}
    return [*arguments, *(flag for flag, given in flags.items() if given), "--", str(config)]


def _train_rank(settings: TrainConfig, directory: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    from race_dist.distributed.mesh import shutdown
    from race_dist.distributed.watchdog import abort_on_stall
    from race_dist.integrations.engines import join, make_trainer
    from race_dist.launch.stop import StopFlag
    from race_dist.training import loop
    from race_dist.training.logging.telemetry import Telemetry
    from race_dist.training.run_directory import open_run

    ranks = join(settings)
    trainer = make_trainer(settings, ranks)
    run = open_run(directory, settings, ranks.world, resume=resume, overwrite=overwrite)
    abort_on_stall(1.5 * settings.parallel.timeout)  # after the collectives' own timeout
    telemetry = Telemetry(ranks.device, tokens=lambda: trainer.step * settings.data.batch_size * settings.data.context)
    with work(), StopFlag() as stop, run:
        hooks = loop.Hooks(stop_requested=stop.requested, probes=(telemetry.probe,))
        outcome = loop.run(trainer, directory, resume=resume, hooks=hooks)
        shutdown()
    if outcome.stopped:
        raise typer.Exit(STOPPED)


def _dry_run_rank(settings: TrainConfig) -> None:
    from race_dist.distributed.mesh import shutdown
    from race_dist.integrations.engines import join, make_trainer
    from race_dist.terminal import print_line
    from race_dist.training.dry_run import run_two_steps

    trainer = make_trainer(settings, join(settings))
    for line in run_two_steps(trainer):
        if trainer.mesh.rank == 0:
            print_line(line)
    shutdown()
