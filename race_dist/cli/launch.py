"""The verbs ``race-dist launch ...`` and ``race-dist preflight``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from race_dist.cli import option_types
from race_dist.exit_codes import FAILED
from race_dist.strict_config import TIMEOUT_LIMIT

launch = typer.Typer(no_args_is_help=True, help="Start a run on this machine or on a cluster.")

Config = Annotated[Path, typer.Argument(help="What to train: a TOML file.", metavar="CONFIG")]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change one key of CONFIG. Repeatable.")
]
JobFile = Annotated[
    str | None, typer.Option("--job", "-j", metavar="NAME|FILE", help="The job: a template's name or a TOML file.")
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key of the job, e.g. nodes=4. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, and do nothing.")]
Runs = Annotated[Path, typer.Option(metavar="FOLDER", help="The folder of all runs.")]
Write = Annotated[Path | None, option_types.output_file(metavar="FILE", help="Write the file instead of submitting it.")]


@launch.command("local")
def launch_local(
    config: Config, override: Override = None, job: JobFile = None, change: Change = None, dry_run: DryRun = False
) -> None:
    """Run on this machine. Failed ranks are restarted from the newest checkpoint."""
    from race_dist.launch import start

    job_config, run = start.load_job_and_run(config, override or (), job, change or (), on_this_machine=True)
    code = start.local(job_config, run, dry_run=dry_run)
    raise typer.Exit(code)


@launch.command("torchrun")
def launch_torchrun(
    config: Config,
    override: Override = None,
    job: JobFile = None,
    change: Change = None,
    endpoint: Annotated[
        str | None, option_types.endpoint(metavar="HOST:PORT", help="Rendezvous endpoint, on the first node.")
    ] = None,
    node_rank: Annotated[int | None, option_types.integer(metavar="N", help="Rank of this node, from 0.", low=0)] = None,
    local_address: Annotated[str | None, option_types.host(metavar="HOST", help="Address of this node for the others.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run torchrun on this node. Run the same command on every node of the job."""
    from race_dist.launch import start

    job_config, run = start.load_job_and_run(config, override or (), job, change or (), on_this_machine=True)
    code = start.torchrun(job_config, run, endpoint=endpoint, node_rank=node_rank, local_address=local_address, dry_run=dry_run)
    raise typer.Exit(code)


@launch.command("deepspeed")
def launch_deepspeed(
    config: Config,
    override: Override = None,
    job: JobFile = None,
    change: Change = None,
    hostfile: Annotated[Path | None, option_types.input_file(metavar="FILE", help="DeepSpeed hostfile.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run with the DeepSpeed launcher."""
    from race_dist.launch import start

    job_config, run = start.load_job_and_run(config, override or (), job, change or (), on_this_machine=True)
    code = start.deepspeed(job_config, run, hostfile=hostfile, dry_run=dry_run)
    raise typer.Exit(code)


@launch.command("slurm")
def launch_slurm(
    config: Config,
    override: Override = None,
    job: JobFile = "slurm",
    change: Change = None,
    array: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V,...", help="One run per value of a key of CONFIG. Repeatable.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Submit a plain sbatch file instead of using submitit.")] = False,
    write: Write = None,
    dry_run: DryRun = False,
) -> None:
    """Submit to Slurm. The job saves before its time limit, is requeued and resumes."""
    from race_dist.launch import start

    job_config, run = start.load_job_and_run(config, override or (), job, change or ())
    for line in start.submit_slurm(job_config, run, array=array or (), plain=plain, write=write, dry_run=dry_run):
        print(line)


@launch.command("kubernetes")
def launch_kubernetes(
    config: Config,
    override: Override = None,
    job: JobFile = "kubernetes",
    change: Change = None,
    write: Write = None,
    dry_run: DryRun = False,
) -> None:
    """Submit to Kubernetes as a JobSet: one pod per node, torchrun in each."""
    from race_dist.launch import start

    job_config, run = start.load_job_and_run(config, override or (), job, change or ())
    for line in start.submit_kubernetes(job_config, run, write=write, dry_run=dry_run):
        print(line)


@launch.command("templates")
def launch_templates() -> None:
    """List the job templates and how far each was tested."""
    from race_dist.launch.job import load_job, template_names

    for name in template_names():
        print(f"{name:12} {load_job(name).tested}")


@launch.command("status")
def launch_status(which: Annotated[str | None, typer.Argument(metavar="NAME|ID")] = None, runs: Runs = Path("runs")) -> None:
    """Print the state of submitted jobs."""
    from race_dist.launch import start

    for record, facts in start.status(runs, which):
        print(
            f"{record.id:10} {record.name:24} {facts['state']:12} "
            + ", ".join(
                filter(
                    None,
                    (
                        facts["progress"],
                        facts["nodes"],
                        facts["reason"],
                        f"{facts['restarts']} requeues" if facts["restarts"] not in ("", "0") else "",
                    ),
                )
            )
        )


@launch.command("logs")
def launch_logs(
    which: Annotated[str, typer.Argument(metavar="NAME|ID")],
    runs: Runs = Path("runs"),
    lines: Annotated[int, option_types.integer("--lines", "-n", metavar="N", help="Lines per file.")] = 40,
) -> None:
    """Print the last lines of the logs of a submitted job."""
    from race_dist.launch import start

    print("\n".join(start.logs(runs, which, lines)))


@launch.command("cancel")
def launch_cancel(which: Annotated[str, typer.Argument(metavar="NAME|ID")], runs: Runs = Path("runs")) -> None:
    """Cancel a submitted job: it saves and is not requeued."""
    from race_dist.launch import start

    print("\n".join(start.cancel(runs, which)))


def preflight(
    config: Annotated[Path | None, typer.Argument(help="The planned run: a TOML file.", metavar="CONFIG")] = None,
    override: Override = None,
    nproc: Annotated[
        int | None,
        option_types.integer(
            metavar="N", help="Start N ranks on this machine. Omit it under a launcher.", high=option_types.MAX_LOCAL_RANKS
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        option_types.output_folder(
            metavar="FOLDER", help="Folder of the checkpoints. Default: the run's folder, or runs.", follow=True
        ),
    ] = None,
    device: Annotated[str | None, option_types.device()] = None,
    timeout: Annotated[
        float, option_types.number(metavar="S", help="Seconds that ranks wait for each other.", low=1, high=TIMEOUT_LIMIT)
    ] = 120.0,
    out: Annotated[
        Path | None, option_types.output_file("--json", metavar="FILE", help="Write all results there.", make_folder=True)
    ] = None,
) -> None:
    """Check the machines before training: GPUs, versions, collectives, disk, clocks.

    Prints a table. Exits with 1 and the node's name if a node fails.
    """
    from race_dist.launch.local import launch_ranks, under_launcher
    from race_dist.training.config import load_config

    settings = None if config is None else load_config(config, override or ())
    if nproc is not None and under_launcher():
        raise ValueError("--nproc starts ranks itself; leave it out under a launcher")
    if nproc is not None and nproc > 1:
        given: list[tuple[str, object]] = [("--override", change) for change in override or ()]
        given += [("--folder", folder), ("--device", device), ("--timeout", timeout), ("--json", out)]
        words = [word for name, value in given if value is not None for word in (name, str(value))]
        words += [] if config is None else ["--", str(config)]
        raise typer.Exit(launch_ranks(["-m", "race_dist.launch.rank", "preflight", *words], nproc))
    from race_dist.launch import preflight as checks

    where = folder if folder is not None else Path("runs" if settings is None else settings.runs)
    report = checks.preflight(settings, where, device=device, timeout=timeout)
    if os.environ.get("RANK", "0") == "0":
        checks.show(report)
        if out is not None:
            checks.write(report, out)
    if report.refused:
        raise typer.Exit(FAILED)
