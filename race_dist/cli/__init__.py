"""The command ``race-dist``: its verbs, and ``main``, which runs one. Each group of verbs is a module of this package."""

from __future__ import annotations

from typing import Annotated

import typer

from race_dist import __version__
from race_dist.cli.bench import bench
from race_dist.cli.errors import CommandGroup, end_failed_rank, open_standard_streams, replace_unknown_characters
from race_dist.cli.launch import launch, preflight
from race_dist.cli.plan import plan
from race_dist.cli.runs import runs
from race_dist.cli.train import train

app = typer.Typer(
    cls=CommandGroup,
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


app.command()(train)
app.add_typer(runs)
app.add_typer(bench, name="bench")
app.command()(plan)
app.add_typer(launch, name="launch")
app.command()(preflight)


def main() -> None:
    """Run the command: the entry point of the console script."""
    open_standard_streams()
    replace_unknown_characters()
    try:
        app(prog_name="race-dist")
    except SystemExit as end:
        end_failed_rank(end.code)
        raise
