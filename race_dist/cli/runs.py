"""The verbs that use finished runs and texts: generate, eval, export, report, config, data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from race_dist.cli import option_types
from race_dist.cli.errors import cleaned_up, default_device
from race_dist.strict_config import SEED_LIMIT

if TYPE_CHECKING:
    from race_dist.training.data.corpus import Corpus

_ECHOED = 2**16  # bytes; the text of a longer prompt file is not printed before the generated text

runs = typer.Typer()


@runs.command()
def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a trained run, for example runs/demo.", metavar="RUN")],
    prompt: Annotated[str | None, option_types.text(metavar="TEXT", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, option_types.input_file(metavar="FILE", help="A file with the text to continue.")
    ] = None,
    tokens: Annotated[int, option_types.token_count(metavar="N", help="Tokens to generate.", low=0)] = 400,
    temperature: Annotated[
        float, option_types.number(metavar="T", help="0 always takes the most likely token.", low=1e-4, high=1e4, zero=True)
    ] = 0.8,
    top_k: Annotated[int | None, option_types.integer(metavar="K", help="Sample from the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        option_types.number(
            metavar="P", help="Sample from the most likely tokens whose probabilities reach P.", low=1e-6, high=1
        ),
    ] = None,
    seed: Annotated[int, option_types.integer(metavar="N", help="Seed of the sampling.", low=0, high=SEED_LIMIT)] = 0,
    save_context: Annotated[
        Path | None, option_types.output_file(metavar="FILE", help="Save the prompt state, for --context.")
    ] = None,
    context: Annotated[
        Path | None,
        option_types.input_file(metavar="FILE", help="Continue from a saved prompt state; a prompt is appended."),
    ] = None,
    step: Annotated[int | None, option_types.step()] = None,
) -> None:
    """Generate text with a trained model: prints the prompt and then each token as it is sampled.

    A prompt file of any length is read once. --save-context saves the model's state after the prompt (kilobytes to
    megabytes, whatever the length); --context continues from it without reading the prompt again.
    """
    from race_dist.training import sampling
    from race_dist.training.data.text_files import utf8_pieces
    from race_dist.training.run_directory import RunDirectory

    if prompt is not None and prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and context is None:
        raise ValueError("give --prompt, --prompt-file or --context")
    directory = RunDirectory(run)
    model, codec = directory.load_model(default_device(), step=step), directory.codec()
    state, before = sampling.load_context(context, model) if context is not None else (None, 0)
    pieces = utf8_pieces(prompt_file) if prompt_file is not None else [(prompt or "").encode()]
    head = sampling.Head(pieces, _ECHOED)
    prompt_state, count = sampling.read_text(model, head, codec, state)
    with cleaned_up():
        if save_context is not None:
            sampling.save_context(save_context, prompt_state, model, before + count)
            print(f"{save_context}: {save_context.stat().st_size:,} bytes for {before + count:,} tokens", file=sys.stderr)
        if prompt is not None or (prompt_file is not None and head.whole):
            print(head.text if prompt is None else prompt, end="", flush=True)
        for piece in sampling.write_text(
            model, prompt_state, codec, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        ):
            print(piece, end="", flush=True)
    print()


@runs.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    path: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Text to evaluate on, all of it. Default: the held-out text."),
    ] = None,
    context: Annotated[
        int | None,
        option_types.token_count(
            metavar="T", help=f"Tokens per window: 64K, 1M. Default: as in training. {option_types.COUNT_SUFFIXES}."
        ),
    ] = None,
    tokens: Annotated[int, option_types.token_count(metavar="N", help="Approximate number of tokens to evaluate.")] = 1_000_000,
    step: Annotated[int | None, option_types.step()] = None,
) -> None:
    """Evaluate the loss of a model by position in the context: what a longer context is worth.

    Windows of any length are computed in chunks. Text given by --data is encoded with the run's tokenizer. Results are
    also written to RUN, one file per text, window length and checkpoint, for race-dist report.
    """
    from race_dist.training import evaluate
    from race_dist.training.run_directory import RunDirectory

    with cleaned_up():
        evaluate.evaluate(RunDirectory(run), path=path, context=context, tokens=tokens, step=step, device=default_device())


@runs.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    out: Annotated[Path, option_types.output_file(help="The safetensors file to write.", metavar="FILE")],
    step: Annotated[int | None, option_types.step()] = None,
) -> None:
    """Write the weights of a run, or of one of its checkpoints, as one safetensors file.

    Another run starts from them with init = "FILE".
    """
    from race_dist.training.run_directory import RunDirectory
    from race_dist.training.run_lock import check_not_in_use
    from race_dist.training.weights_file import save_weights

    check_not_in_use(out.parent)  # it may be the folder of an active run
    model = RunDirectory(run).load_model(step=step)
    with cleaned_up():
        save_weights(out, {name: p.detach() for name, p in model.named_parameters()}, RunDirectory(run).load_config().model)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


@runs.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs to compare.", metavar="RUN...")],
    out: Annotated[
        Path | None, option_types.output_folder(metavar="FOLDER", help="Output folder. Default: report in the first RUN.")
    ] = None,
) -> None:
    """Write a report of one or more runs: curves, loss by position, differing settings, machines.

    report.html is self-contained; the plots are also written as PNG files.
    """
    from race_dist.output_paths import check_output_file, check_output_folder
    from race_dist.training.logging.report import write_report

    target = folders[0] / "report" if out is None else out
    check_output_folder(target, "--out")
    for name in ("report.html", "loss.png", "progress.png", "positions.png"):
        check_output_file(target / name, "the report's file")
    print(write_report(folders, target))


@runs.command()
def config(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys or tables: data optim.lr. Default: all.", metavar="[KEY...]")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys as a Markdown page.")] = False,
) -> None:
    """List the keys of a run's TOML: default, allowed values, meaning."""
    from race_dist.training.config_reference import to_markdown, to_text

    if markdown and keys:
        raise ValueError("--markdown writes all keys; leave the names out")
    print(to_markdown() if markdown else to_text(keys or []), end="" if markdown else "\n")


data = typer.Typer(no_args_is_help=True, help="Pack corpora and verify them.")
runs.add_typer(data, name="data")


@data.command("pack")
def data_pack(
    path: Annotated[str, typer.Argument(help="A text file, a folder, or python-stdlib.", metavar="PATH")],
    out: Annotated[Path, option_types.output_folder(help="The folder to create; data.path of a run.", metavar="FOLDER")],
    pattern: Annotated[str, option_types.text(metavar="GLOB", help='Names of the files to take from a folder: "*.md".')] = "*",
    tokenizer: Annotated[
        Path | None, option_types.input_file(metavar="FILE", help="A tokenizer.json. Default: tokens are bytes.")
    ] = None,
    one_document: Annotated[bool, typer.Option("--one-document", help="Treat all files as one document.")] = False,
    skip_undecodable: Annotated[
        bool, typer.Option("--skip-undecodable", help="Skip files that are not UTF-8 instead of refusing them.")
    ] = False,
) -> None:
    """Tokenize text of any size into one memory-mapped token file with an index of documents.

    Text is read in pieces. Of several files with the same content the first is kept. A run reads from the packed folder
    only what its batches need.
    """
    from rich.console import Console
    from rich.text import Text

    from race_dist.training.data.packed import pack

    console = Console(stderr=True)
    with cleaned_up(), console.status("packing") as status:
        corpus = pack(
            path,
            out,
            pattern=pattern,
            tokenizer=tokenizer,
            one_document=one_document,
            skip_undecodable=skip_undecodable,
            progress=lambda file: status.update(Text(f"packing {file}")),
        )
    _describe_corpus(corpus)


@data.command("check")
def data_check(folder: Annotated[Path, typer.Argument(help="A packed corpus.", metavar="FOLDER")]) -> None:
    """Verify the checksums of a packed corpus."""
    from race_dist.training.data.packed import verify_packed

    _describe_corpus(verify_packed(folder))


def _describe_corpus(corpus: Corpus) -> None:
    assert corpus.documents is not None
    print(
        f"{corpus.name}: {len(corpus.tokens):,} tokens ({corpus.tokens.dtype}, vocabulary {corpus.vocab_size:,}, "
        f"{corpus.bytes_per_token:.3g} bytes each) in {len(corpus.documents) - 1:,} documents"
    )
    if corpus.skipped:
        print(corpus.skipped.describe())
