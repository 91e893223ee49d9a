"""Measuring a trained model."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from race_dist.training.closing import write_positions
from race_dist.training.corpus import Split, load_corpus
from race_dist.training.data import evaluation_batches
from race_dist.training.metrics import bits
from race_dist.training.positions import loss_by_position
from race_dist.training.run_lock import RunInUse
from race_dist.training.rundir import RunDirectory
from race_dist.training.step import autocast


def evaluate(directory: RunDirectory, *, path: str | None, context: int | None, tokens: int, step: int | None,
             device: str) -> None:
    """Print the loss by position in windows of ``context`` tokens and store it in the run's folder.

    Args:
        directory: of the run.
        path: text to measure on; None: what the run held out.
        context: tokens a window; None: as in training.
        tokens: to measure on, about.
        step: of a checkpoint; None: the run as it is.
        device: to compute on.

    Raises:
        ValueError: the text is shorter than one window, or its tokens are not the model's.
    """
    config = directory.load_config()
    corpus = load_corpus(path or config.data.path, config.data.pattern if path is None else "*")
    if corpus.vocab_size > config.model.vocab_size:
        raise ValueError(f"the tokens of {corpus.name} go up to {corpus.vocab_size}, the model knows {config.model.vocab_size}")
    separate = config.data.documents == "separate" and corpus.documents is not None and len(corpus.documents) > 2
    split: Split = corpus.whole(separate=separate) if path is not None else corpus.split(config.data.held_out,
                                                                                        separate=separate)[1]
    context = context or config.data.context
    if len(split) < context + 1:
        raise ValueError(f"{corpus.name} has {len(split):,} tokens to measure on, too few for one window of {context:,}; "
                         "lower --context or give more text")
    model = directory.load_model(device, step=step)
    total = sum(b.targets for b in evaluation_batches(split, tokens=tokens, batch_size=1, context=context))
    console = Console()
    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    with progress as bar, autocast(config, model.embed.weight.device):
        task = bar.add_task("measuring", total=total)
        found = loss_by_position(model, split, context=context, tokens=tokens, progress=lambda n: bar.advance(task, n))
    table = Table(title=f"{directory.path} on {corpus.name}, windows of {context:,} tokens")
    for column in ("position", "targets", "bits per byte"):
        table.add_column(column, justify="right")
    for bucket in found["buckets"]:
        table.add_row(f"{bucket['start']:,} to {bucket['stop'] - 1:,}", f"{bucket['targets']:,}",
                      f"{bits(bucket['loss']) / corpus.bytes_per_token:.3f}")
    console.print(table)
    console.print(f"all: {bits(found['loss']) / corpus.bytes_per_token:.3f} bits per byte over {found['tokens']:,} tokens",
                  highlight=False)
    try:
        with directory.lock():
            written = f"written: {write_positions(directory, found, corpus)}"
    except RunInUse as error:
        written = f"not written, as {error}"
    console.print(written, highlight=False, markup=False, soft_wrap=True)
