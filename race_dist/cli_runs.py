"""The verbs of ``race-dist`` about runs and texts that are there: generate, eval, export, report, data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from race_dist.cli_errors import default_device, failures, user_errors

if TYPE_CHECKING:
    from race_dist.training.corpus import Corpus

_ECHOED = 2**16  # tokens of a prompt file that are printed before what is written

runs = typer.Typer()


@runs.command()
def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a trained run, for example runs/demo.", metavar="RUN")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the text goes on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a file.")] = None,
    tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="0 always takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Draw from the K likeliest bytes only.")] = None,
    top_p: Annotated[float | None, typer.Option(
        min=0, max=1, metavar="P", help="Draw from the likeliest bytes that together reach P.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the draws.")] = 0,
    save_context: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Keep what the model remembers of the prompt.")] = None,
    context: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Go on from what --save-context kept; a prompt comes after it.")] = None,
) -> None:
    """Write text with a trained model: the prompt, then what the model makes of it, as it comes.

    A prompt file of any length is read once. --save-context keeps what the model remembers of it (a few kilobytes to
    megabytes, whatever the length); --context goes on from there without reading it again.
    """
    from race_dist.outputs import check_output_file
    from race_dist.training import sampling
    from race_dist.training.corpus import utf8_pieces
    from race_dist.training.rundir import RunDirectory

    with user_errors(), failures():
        if prompt is not None and prompt_file is not None:
            raise ValueError("give --prompt or --prompt-file, not both")
        if prompt is None and prompt_file is None and context is None:
            raise ValueError("give --prompt, --prompt-file or --context")
        if save_context is not None:
            check_output_file(save_context, "--save-context")
        directory = RunDirectory(run)
        model, codec = directory.load_model(default_device()), directory.codec()
        known, before = sampling.load_context(context, model) if context is not None else (None, 0)
        pieces = utf8_pieces(prompt_file) if prompt_file is not None else [(prompt or "").encode()]
        remembered, count = sampling.read_text(model, pieces, codec, known)
        if save_context is not None:
            sampling.save_context(save_context, remembered, model, before + count)
            print(f"{save_context}: {save_context.stat().st_size:,} bytes for {before + count:,} tokens", file=sys.stderr)
        if prompt is not None or (prompt_file is not None and count <= _ECHOED):
            print(prompt if prompt_file is None else prompt_file.read_text(encoding="utf-8"), end="", flush=True)
        for piece in sampling.write_text(model, remembered, codec, tokens=tokens, temperature=temperature, top_k=top_k,
                                         top_p=top_p, seed=seed):
            print(piece, end="", flush=True)
        print()


@runs.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    path: Annotated[str | None, typer.Option(
        "--data", metavar="PATH", help="Text to measure on, all of it. Left out: what the run held out.")] = None,
    context: Annotated[str | None, typer.Option(
        metavar="T", help="Tokens a window: 64K, 1M. Left out: as in training.")] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to measure on, about.")] = "1M",
    step: Annotated[int | None, typer.Option(metavar="N", help="Of this checkpoint. Left out: the run as it is.")] = None,
) -> None:
    """Measure a model on text, by position in the context: what a longer context is worth.

    Windows of any length go through the model a chunk at a time. The figures go to RUN/positions-T.json too, where
    race-dist report finds them.
    """
    from race_dist.planning import parse_count
    from race_dist.training import using
    from race_dist.training.rundir import RunDirectory

    with user_errors(), failures():
        using.evaluate(RunDirectory(run), path=path, context=None if context is None else parse_count(context),
                       tokens=parse_count(tokens), step=step, device=default_device())


@runs.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.", metavar="FILE")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Of this checkpoint. Left out: the newest weights.")] = None,
) -> None:
    """Write the weights of a run, or of one of its checkpoints, as one safetensors file.

    Another run begins with them by init = "FILE".
    """
    from race_dist.outputs import check_output_file
    from race_dist.training.run_lock import check_not_in_use
    from race_dist.training.rundir import RunDirectory
    from race_dist.training.weights import save_weights

    with user_errors(), failures():
        check_output_file(out, "--out")
        check_not_in_use(out.parent)  # it may be the folder of a run that is going on
        model = RunDirectory(run).load_model(step=step)
        save_weights(out, {name: p.detach() for name, p in model.named_parameters()},
                     {"config": model.config.model_dump_json()})
        print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


@runs.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, to be drawn over each other.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to. Left out: report in the first RUN.")] = None,
) -> None:
    """Write a page about one run or several: curves, losses by position, what differed, machines.

    report.html needs no other file; the pictures lie beside it as PNGs too.
    """
    from race_dist.outputs import check_output_file, check_output_folder
    from race_dist.training.report import write_report

    with user_errors():
        target = out or folders[0] / "report"
        check_output_folder(target, "--out")
        for name in ("report.html", "loss.png", "progress.png", "positions.png"):
            check_output_file(target / name, "the report's file")
        print(write_report(folders, target))


data = typer.Typer(no_args_is_help=True, help="Make and check packed corpora.")
runs.add_typer(data, name="data")


@data.command("pack")
def data_pack(
    path: Annotated[str, typer.Argument(help="A text file, a folder, or python-stdlib.", metavar="PATH")],
    out: Annotated[Path, typer.Option(help="The folder to make; data.path of a run.", metavar="FOLDER")],
    pattern: Annotated[str, typer.Option(help='Which files of a folder, by name: "*.md".')] = "*",
    tokenizer: Annotated[Path | None, typer.Option(
        metavar="FILE", help="A tokenizer.json. Left out: tokens are bytes.")] = None,
    one_document: Annotated[bool, typer.Option("--one-document", help="All files are one long document.")] = False,
    skip_undecodable: Annotated[bool, typer.Option(
        "--skip-undecodable", help="Leave out files that are not UTF-8 instead of refusing them.")] = False,
) -> None:
    """Make one memory-mapped token file, with an index of documents, of any amount of text.

    Text is read a piece at a time. Of files with the same content the first is kept. A run that trains on the folder
    reads only what its batches need.
    """
    from rich.console import Console

    from race_dist.outputs import check_output_folder
    from race_dist.training.packed import pack

    console = Console(stderr=True)
    with user_errors():
        check_output_folder(out, "--out")
    with user_errors(), console.status("packing") as status:
        corpus = pack(path, out, pattern=pattern, tokenizer=tokenizer, one_document=one_document,
                      skip_undecodable=skip_undecodable, progress=lambda file: status.update(f"packing {file}"))
    _describe_corpus(corpus)


@data.command("check")
def data_check(folder: Annotated[Path, typer.Argument(help="A packed corpus.", metavar="FOLDER")]) -> None:
    """Read all of a packed corpus and compare it with its checksums."""
    from race_dist.training.packed import verify_packed

    with user_errors():
        _describe_corpus(verify_packed(folder))


def _describe_corpus(corpus: Corpus) -> None:
    assert corpus.documents is not None
    print(f"{corpus.name}: {len(corpus.tokens):,} tokens ({corpus.tokens.dtype}, vocabulary {corpus.vocab_size:,}, "
          f"{corpus.bytes_per_token:.3g} bytes each) in {len(corpus.documents) - 1:,} documents")
