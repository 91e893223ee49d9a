"""The end of a run: weights, picture, sample, and the closing words."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from race_dist.models import DecoderLM
from race_dist.training.curves import draw_curves
from race_dist.training.metrics import Metrics, bits, read_metrics
from race_dist.training.rundir import RunDirectory
from race_dist.training.sampling import stream_text

if TYPE_CHECKING:
    from race_dist.training.trainer import Evaluation, Trainer


def finish(trainer: Trainer, directory: RunDirectory, metrics: Metrics | None, last: Evaluation) -> None:
    """Write what a finished run leaves. Every rank calls it (sharded parameters are gathered); rank 0 has the metrics."""
    weights = {}
    for name, tensor in trainer.method.replica.full_tensors():
        if metrics is not None:
            weights[name] = tensor.cpu()
    if metrics is None:
        return
    config = trainer.config
    directory.save_weights(weights)
    draw_curves(read_metrics(directory.metrics), directory.curves, title=f"{config.name} on {trainer.corpus.name}")
    if config.sample.tokens:
        _write_sample(trainer, directory, metrics)
    bpb = bits(last.loss) / trainer.corpus.bytes_per_token
    unit = "bytes" if trainer.corpus.tokenizer is None else "tokens"
    metrics.say([f"held out: {bpb:.3f} bits per byte over {last.tokens:,} {unit} (uniform: 8)",
                 f"curves:   {directory.curves}",
                 f"weights:  {directory.weights}",
                 f"go on:    {command()} generate {directory.path} --prompt \"{config.sample.prompt}\""])


def _write_sample(trainer: Trainer, directory: RunDirectory, metrics: Metrics) -> None:
    config = trainer.config
    model: DecoderLM = trainer.model
    if trainer.method.replica.is_sharded:  # a model of its own: the other ranks have left the sharded one
        torch.cuda.empty_cache()
        model = directory.load_model(trainer.ranks.device)
    text = config.sample.prompt + "".join(stream_text(
        model, config.sample.prompt, tokens=config.sample.tokens, temperature=config.sample.temperature, seed=config.seed))
    directory.sample.write_text(text, encoding="utf-8")
    metrics.say(["", "sample:", *(f"    {line}" for line in text.splitlines()), ""])


def command() -> str:
    """How the user calls ``race-dist``: by its name where that is found, else by its path."""
    beside = Path(sys.executable).with_name("race-dist")
    return "race-dist" if shutil.which("race-dist") or not beside.exists() else os.path.relpath(beside)
