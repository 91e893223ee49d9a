"""Evaluating a trained model: the loss by position on held-out text or on another text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import Progress
from rich.table import Table

from race_dist.files import file_digest
from race_dist.terminal import plain_console
from race_dist.training.config import TrainConfig
from race_dist.training.data.batches import evaluation_batches
from race_dist.training.data.corpus import LARGEST_IN_MEMORY, load_corpus
from race_dist.training.data.splits import Corpus, Split
from race_dist.training.data.tokenizer import TextTokenizer
from race_dist.training.finalize import write_positions
from race_dist.training.logging.metrics import nats_to_bits
from race_dist.training.loss_by_position import loss_by_position
from race_dist.training.run_directory import RunDirectory
from race_dist.training.run_lock import RunInUse
from race_dist.training.step import autocast


def evaluate(
    directory: RunDirectory, *, path: str | None, context: int | None, tokens: int, step: int | None, device: str
) -> None:
    """Print the loss by position in windows of ``context`` tokens, and write it to the run's folder.

    Args:
        directory: of the run.
        path: a text, which is tokenized with the run's tokenizer; None: the held-out split of the run.
        context: tokens per window; None: as in training.
        tokens: approximate number of tokens to evaluate.
        step: of a checkpoint; None: the final weights, or else the newest checkpoint.
        device: to evaluate on.

    Raises:
        ValueError: the text is shorter than one window, it has tokens that the model does not know, or (without ``path``) it is
            not the text that the run was trained on.
    """
    config = directory.load_config()
    if context is not None and context < 1:
        raise ValueError(f"--context must be at least 1; got {context}")
    corpus = _held_out_corpus(directory, config) if path is None else _other_corpus(directory, path)
    if corpus.vocab_size > config.model.vocab_size:
        raise ValueError(f"the tokens of {corpus.name} go up to {corpus.vocab_size}, the model knows {config.model.vocab_size}")
    separate = config.data.documents == "separate" and corpus.documents is not None and len(corpus.documents) > 2
    split: Split = (
        corpus.whole(separate=separate) if path is not None else corpus.split(config.data.held_out, separate=separate)[1]
    )
    context = context or config.data.context
    if len(split) < context + 1:
        raise ValueError(
            f"{corpus.name} has {len(split):,} tokens to measure on, too few for one window of {context:,}; "
            "lower --context or give more text"
        )
    model = directory.load_model(device, step=step)
    total = sum(b.targets for b in evaluation_batches(split, tokens=tokens, batch_size=1, context=context))
    console = plain_console()
    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    with progress as bar, autocast(config, model.embed.weight.device):
        task = bar.add_task("evaluating", total=total)
        found = loss_by_position(model, split, context=context, tokens=tokens, progress=lambda n: bar.advance(task, n))
    which = f"the held-out part of {corpus.name}" if path is None else corpus.name
    table = Table(title=f"{directory.path} on {which}, windows of {context:,} tokens")
    for column in ("position", "targets", "bits per byte"):
        table.add_column(column, justify="right")
    for bucket in found["buckets"]:
        table.add_row(
            f"{bucket['start']:,} to {bucket['stop'] - 1:,}",
            f"{bucket['targets']:,}",
            f"{nats_to_bits(bucket['loss']) / corpus.bytes_per_token:.3f}",
        )
    console.print(table)
    console.print(
        f"all: {nats_to_bits(found['loss']) / corpus.bytes_per_token:.3f} bits per byte over {found['tokens']:,} tokens",
        highlight=False,
    )
    if corpus.skipped:
        console.print(corpus.skipped.describe(f"left out of {corpus.name}"), soft_wrap=True)
    try:
        with directory.lock():
            written = f"written: {write_positions(directory, found, corpus, held_out=path is None, step=step)}"
    except RunInUse as error:
        written = f"not written, as {error}"
    console.print(written, highlight=False, markup=False, soft_wrap=True)


def _held_out_corpus(directory: RunDirectory, config: TrainConfig) -> Corpus:
    """The text of the run. Raises ValueError if it has changed, because then another part would be held out."""
    corpus = load_corpus(config.data.path, config.data.pattern)
    digest = corpus.digest()
    if directory.read_machine().get("text_digest", digest) != digest:
        raise ValueError(
            f"the text {corpus.name} is not the one that {directory.path} was trained on, so that what it held "
            "out is not known; put that text back, or measure on this one with --data"
        )
    return corpus


def _other_corpus(directory: RunDirectory, path: str) -> Corpus:
    """Another text, tokenized with the run's tokenizer."""
    if not path.strip():
        raise ValueError("--data is empty; give the path of a text, or leave it out to measure on what the run held out")
    corpus, tokenizer = load_corpus(path, option="--data"), directory.checked_tokenizer()
    if corpus.tokenizer is not None:
        if tokenizer is None:
            raise ValueError(
                f"{corpus.name} was packed with a tokenizer, but the tokens of {directory.path} are bytes; give the text itself"
            )
        if file_digest(corpus.tokenizer) != file_digest(tokenizer):
            raise ValueError(
                f"{corpus.name} was packed with another tokenizer than that of {directory.path}; give the text "
                f"itself, or pack it with --tokenizer {tokenizer}"
            )
        return corpus
    if tokenizer is None:
        return corpus
    if len(corpus.tokens) > LARGEST_IN_MEMORY:
        raise ValueError(
            f"{corpus.name} has more than {LARGEST_IN_MEMORY // 2**30} GiB of text; pack it first: race-dist data "
            f"pack {path} --out NAME --tokenizer {tokenizer}, then --data NAME"
        )
    return _tokenize(corpus, tokenizer)


def _tokenize(corpus: Corpus, tokenizer: Path) -> Corpus:
    """Tokenize a corpus of bytes, each document separately."""
    encoder, bounds = TextTokenizer(tokenizer), [0, len(corpus.tokens)] if corpus.documents is None else corpus.documents
    documents = [
        np.concatenate(list(encoder.encode([corpus.tokens[start:stop].tobytes()]))) for start, stop in zip(bounds, bounds[1:])
    ]
    ends = np.cumsum([0, *(len(ids) for ids in documents if len(ids))])
    return replace(
        corpus,
        tokens=np.concatenate(documents).astype(np.uint32),
        vocab_size=encoder.vocab_size,
        tokenizer=tokenizer,
        documents=ends.astype(np.int64),
        text_bytes=len(corpus.tokens),
    )
