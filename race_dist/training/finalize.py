"""The end of a run: write the weights, the loss plot, the loss by position and a sample, and print a summary."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from race_dist.files import write_checksummed_json, write_text
from race_dist.models import DecoderLM
from race_dist.training.checkpoint import CheckpointError
from race_dist.training.data.splits import Corpus, Split
from race_dist.training.logging.metrics import Metrics, nats_to_bits, read_metrics
from race_dist.training.logging.plots import RunCurves, draw_loss, save_png
from race_dist.training.loss_by_position import loss_by_position
from race_dist.training.run_directory import RunDirectory
from race_dist.training.sampling import Codec, codec_for, stream_text
from race_dist.training.step import autocast
from race_dist.training.weights_file import save_weights

if TYPE_CHECKING:
    from race_dist.training.trainer import Evaluation, Trainer

_PROMPT_TOKENS, _PROMPT_CHARACTERS = 2048, 40  # how much text a prompt is chosen from, and how long it is


def finalize(trainer: Trainer, directory: RunDirectory, metrics: Metrics | None, last: Evaluation) -> None:
    """Write the final files of a run. Every rank calls it, because sharded parameters are gathered; rank 0 has the metrics.

    Raises:
        CheckpointError: the weights could not be written. All other files were written as far as possible.
    """
    weights = {}
    for name, tensor in trainer.engine.forward_backward.replica.full_tensors():
        if metrics is not None:
            weights[name] = tensor.cpu()
    if metrics is None:
        return
    config, write_errors, failed = trainer.config, metrics.write_errors, None
    try:
        save_weights(directory.weights, weights, config.model)
    except OSError as error:
        failed = error
    with write_errors.suppress(str(directory.curves)):
        picture = draw_loss(
            [RunCurves(config.name, read_metrics(directory.metrics))], f"{config.name} on {trainer.corpus.name}"
        )
        save_png(picture, directory.curves)
    model: DecoderLM = trainer.model
    if trainer.engine.forward_backward.replica.is_sharded:  # build a local model: the other ranks no longer take part
        torch.cuda.empty_cache()
        model = _local_model(trainer, weights)
    with write_errors.suppress("losses by position"):
        _write_positions(trainer, model, directory)
    if config.sample.tokens:
        with write_errors.suppress(str(directory.sample)):
            _write_sample(trainer, model, directory, metrics)
    bpb = nats_to_bits(last.loss) / trainer.corpus.bytes_per_token
    unit = "bytes" if trainer.corpus.tokenizer is None else "tokens"
    metrics.say([f"held out: {bpb:.3f} bits per byte over {last.tokens:,} {unit} (uniform: 8)"])
    if directory.curves.is_file():
        metrics.say([f"curves:   {directory.curves}"])
    if failed is None:
        metrics.say(
            [
                f"weights:  {directory.weights}",
                f"go on:    {command()} generate {shlex.quote(str(directory.path))} --prompt {shlex.quote(_prompt(trainer))}",
            ]
        )
    if failed is not None:
        raise CheckpointError(
            f"the trained weights were not kept: {failed}; "
            + (
                f"make room and go on with --resume from the checkpoints in {directory.checkpoints}"
                if any(directory.checkpoints.glob("*-step-*"))
                else "there is no checkpoint, so the run has to be made again"
            )
        )


def _local_model(trainer: Trainer, weights: Mapping[str, Tensor]) -> DecoderLM:
    """The trained model, from its full weights, on this rank alone and in evaluation mode."""
    config = trainer.config
    model = DecoderLM(config.model, dtype=torch.float64 if config.precision == "float64" else torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model.to(trainer.mesh.device).eval()


def _write_positions(trainer: Trainer, model: DecoderLM, directory: RunDirectory) -> None:
    config = trainer.config
    with autocast(config, trainer.mesh.device):
        found = loss_by_position(model, trainer.held_out, context=config.data.context, tokens=config.eval.tokens)
    write_positions(directory, found, trainer.corpus)


def write_positions(
    directory: RunDirectory, found: dict[str, Any], corpus: Corpus, *, held_out: bool = True, step: int | None = None
) -> Path:
    """Write losses by position to the run's folder, where the report reads them.

    Args:
        directory: of the run.
        found: the result of :func:`race_dist.training.loss_by_position.loss_by_position`.
        corpus: the text.
        held_out: whether it is the held-out split of the run; another text gets its own file.
        step: of the checkpoint that was evaluated; None: the final weights.
    """
    text = "" if held_out else f"{re.sub(r'[^A-Za-z0-9._]+', '-', Path(corpus.name).name)[:40]}-{corpus.digest()[:8]}"
    file = directory.positions_of(found["context"], text=text, step=step)
    facts = {"text": corpus.name, "held_out": held_out, "step": step, "bytes_per_token": corpus.bytes_per_token}
    write_checksummed_json(file, {**facts, **found})
    return file


def _write_sample(trainer: Trainer, model: DecoderLM, directory: RunDirectory, metrics: Metrics) -> None:
    config = trainer.config
    prompt = _prompt(trainer)
    text = prompt + "".join(
        stream_text(
            model,
            prompt,
            codec=codec_for(trainer.corpus.tokenizer),
            tokens=config.sample.tokens,
            temperature=config.sample.temperature,
            seed=config.seed,
        )
    )
    metrics.say(["", "sample:", *(f"    {line}" for line in text.splitlines()), ""])
    write_text(directory.sample, text)


def _prompt(trainer: Trainer) -> str:
    """``sample.prompt`` of the configuration, or else a few words of the held-out text."""
    given = trainer.config.sample.prompt
    return given if given is not None else choose_prompt(trainer.held_out, codec_for(trainer.corpus.tokenizer))


def choose_prompt(split: Split, codec: Codec) -> str:
    """The beginning, of about 40 characters, of the first line of several words; if there is no such line, the first characters
    of the text."""
    decode = codec.decoder()
    tokens = split.read(0, min(len(split), _PROMPT_TOKENS))
    text = "".join(decode(int(token)) for token in tokens)
    lines = [line.strip() for line in text.split("\n")[1:-1]]
    line = next((line for line in lines if " " in line and line.isprintable() and "\ufffd" not in line), "")
    words = line[: _PROMPT_CHARACTERS + 1].rpartition(" ")[0] if len(line) > _PROMPT_CHARACTERS else line
    return words or text.strip("\ufffd")[:_PROMPT_CHARACTERS] or " "


def command() -> str:
    """How the user calls ``race-dist``: by name if it is on the PATH, otherwise by its path."""
    beside = Path(sys.executable).with_name("race-dist")
    return "race-dist" if shutil.which("race-dist") or not beside.exists() else os.path.relpath(beside)
