"""The training loop: the same losses and gradients for every arrangement of the ranks.

A step draws one global batch; a rank takes the rows of its ``dp`` place and of these the shard of its ``sp`` place. Its
loss is the sum over its own tokens divided by the global count, so that losses and gradients simply add up over the
whole mesh.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from race_dist.models import DecoderLM
from race_dist.parallel import all_reduce_sum, shard_sequence
from race_dist.training.agreement import check_same_run
from race_dist.training.config import TrainConfig
from race_dist.training.data import Bytes, Corpus, check_fits, evaluation_batches, load_corpus, training_batch
from race_dist.training.metrics import Metrics, bits
from race_dist.training.optim import build_optimizer, learning_rate
from race_dist.training.ranks import Ranks
from race_dist.training.rundir import RunDirectory
from race_dist.training.sampling import stream_text


@dataclass(frozen=True)
class Evaluation:
    """A measurement on held-out text: mean ``loss`` in nats over ``tokens`` tokens."""

    loss: float
    tokens: int


class Trainer:
    """A model, its optimizer and its text on this rank's place in the mesh.

    Attributes:
        config: of the run.
        ranks: the mesh and this rank's place in it.
        corpus: the text.
        model: this rank's replica.
        optimizer: over its parameters.
        step: steps done.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """Everything a run needs, on every rank.

        Raises:
            ValueError: the batch does not divide over the mesh, the text is too short or none, a sequence does not
                divide by the layout, or the ranks do not hold the same configuration, code, text and weights.
        """
        self.config, self.ranks = config, ranks
        self.corpus = open_corpus(config, ranks.dp)
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.model = DecoderLM(config.model, dtype=dtype).to(ranks.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step = 0
        check_same_run(config, self.corpus, self.model, ranks.world)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the global batch's mean loss in nats and the norm of its whole gradient.

        Raises:
            FloatingPointError: one of them is not finite; the weights are then left as they were.
        """
        config, data = self.config, self.config.data
        batch = training_batch(self.corpus.train, seed=config.seed, step=self.step, batch_size=data.batch_size,
                               context=data.context)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch, len(batch))
        loss.backward()
        total = self._sum_over_ranks(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not (math.isfinite(total) and bool(norm.isfinite())):
            raise FloatingPointError(f"step {self.step + 1}: the loss is {total} and the gradient's norm {float(norm)}; "
                                     "try a lower optim.lr or a longer optim.warmup_steps")
        if config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.optim.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config.steps, config.optim)
        self.optimizer.step()
        self.step += 1
        return total, float(norm)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The loss on held-out text, the same on every rank."""
        data = self.config.data
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        tokens = 0
        for batch, count in evaluation_batches(self.corpus.held_out, tokens=self.config.eval.tokens,
                                               batch_size=data.batch_size, context=data.context):
            total += self._loss(batch, count).double() * (count * data.context)
            tokens += count * data.context
        self.model.train()
        return Evaluation(float(all_reduce_sum(total, self.ranks.world)) / tokens, tokens)

    def _loss(self, batch: Bytes, count: int) -> Tensor:
        """This rank's share of the mean loss over the first ``count`` rows of a global batch ``[B, context + 1]``."""
        ranks, length = self.ranks, batch.shape[1] - 1
        rows = torch.from_numpy(batch).to(torch.int64)
        inputs, labels = rows[:, :-1], rows[:, 1:].clone()
        labels[count:] = -100
        mine = slice(ranks.dp_rank * len(batch) // ranks.dp, (ranks.dp_rank + 1) * len(batch) // ranks.dp)
        inputs, labels = (shard_sequence(x[mine], ranks.sp_group, dim=1, layout=ranks.layout)
                          .contiguous().to(ranks.device) for x in (inputs, labels))
        autocast = (torch.autocast(ranks.device.type, torch.bfloat16) if self.config.precision == "bfloat16"
                    else nullcontext())
        with autocast:
            loss: Tensor = self.model(inputs, labels, group=ranks.sp_group, layout=ranks.layout,
                                      num_targets=count * length)
        return loss

    def _sum_over_ranks(self, loss: Tensor) -> float:
        """Add up the gradients and the loss over the whole mesh, in one collective."""
        if self.ranks.world is None:
            return float(loss.detach())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        dtype = torch.promote_types(loss.dtype, torch.float32)
        flat = torch.cat([loss.detach().reshape(1).to(dtype), *(g.reshape(-1).to(dtype) for g in grads)])
        flat = all_reduce_sum(flat, self.ranks.world)
        for p, part in zip(trained, flat[1:].split([p.numel() for p in trained])):
            p.grad = part.view_as(p).to(p.dtype)
        return float(flat[0])


def open_corpus(config: TrainConfig, dp: int) -> Corpus:
    """The text of a run, once it is clear that ``dp`` groups of ranks can train on it; ValueError where they cannot."""
    if config.data.batch_size % dp:
        raise ValueError(f"data.batch_size is {config.data.batch_size}, which does not divide over parallel.dp = {dp} "
                         "groups of ranks; change one of them")
    corpus = load_corpus(config.data.path, config.data.pattern)
    check_fits(corpus, config.data.context)
    return corpus


def run(trainer: Trainer, directory: RunDirectory) -> Evaluation:
    """Train to the end and leave the run's files in its folder, which :meth:`RunDirectory.create` has made.

    Every rank calls it; rank 0 writes and prints.

    Returns:
        The last measurement on held-out text.
    """
    if trainer.ranks.rank != 0:
        return _fit(trainer, None)
    with Metrics(directory.metrics, trainer.config.steps) as metrics:
        last = _fit(trainer, metrics)
        _finish(trainer, directory, metrics, last)
    return last


def _fit(trainer: Trainer, metrics: Metrics | None) -> Evaluation:
    """All steps, with the lines and the measurements between them; returns the last measurement."""
    config = trainer.config
    if metrics is not None:
        metrics.say(_opening(trainer))
    began = logged = time.perf_counter()
    steps = 0
    evaluation = Evaluation(math.nan, 0)
    while trainer.step < config.steps:
        loss, norm = trainer.train_step()
        steps += 1
        step, last = trainer.step, trainer.step == config.steps
        if step == 1 or last or step % config.log_every == 0:
            now = time.perf_counter()
            if metrics is not None:
                metrics.train(step, {
                    "loss": loss, "bpb": bits(loss), "grad_norm": norm,
                    "lr": trainer.optimizer.param_groups[0]["lr"],
                    "tokens_per_second": steps * config.data.batch_size * config.data.context / (now - logged),
                    "seconds": now - began})
            logged, steps = now, 0
        if last or step % config.eval.every == 0:
            started = time.perf_counter()
            evaluation = trainer.evaluate()
            logged += time.perf_counter() - started
            if metrics is not None:
                metrics.evaluation(step, {"loss": evaluation.loss, "bpb": bits(evaluation.loss),
                                          "tokens": evaluation.tokens, "seconds": time.perf_counter() - began})
    return evaluation


def _opening(trainer: Trainer) -> Iterator[str]:
    """What is about to happen, in two lines."""
    config, ranks, corpus = trainer.config, trainer.ranks, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    yield (f"{config.name}: {parameters:,} parameters, {ranks.dp * ranks.sp} "
           f"rank{'s' if ranks.dp * ranks.sp > 1 else ''} (dp {ranks.dp} x sp {ranks.sp}) on {ranks.device.type}")
    yield (f"text: {corpus.name}, {len(corpus.train) / 1e6:.1f} MB to train on, {len(corpus.held_out) / 1e6:.1f} MB "
           f"held out; {config.data.batch_size} x {config.data.context} bytes a step")


def _finish(trainer: Trainer, directory: RunDirectory, metrics: Metrics, last: Evaluation) -> None:
    """Weights, picture, sample, and the closing words."""
    from race_dist.training.curves import draw_curves
    from race_dist.training.metrics import read_metrics

    config = trainer.config
    directory.save_weights(trainer.model)
    draw_curves(read_metrics(directory.metrics), directory.curves, title=f"{config.name} on {trainer.corpus.name}")
    if config.sample.tokens:
        text = config.sample.prompt + "".join(stream_text(
            trainer.model, config.sample.prompt, tokens=config.sample.tokens, temperature=config.sample.temperature,
            seed=config.seed))
        directory.sample.write_text(text, encoding="utf-8")
        metrics.say(["", "sample:", *(f"    {line}" for line in text.splitlines()), ""])
    metrics.say([f"held out: {bits(last.loss):.3f} bits per byte over {last.tokens:,} bytes (uniform: 8)",
                 f"curves:   {directory.curves}",
                 f"weights:  {directory.weights}",
                 f"go on:    {_command()} generate {directory.path} --prompt \"{config.sample.prompt}\""])


def _command() -> str:
    """How the user calls ``race-dist``: by its name where that is found, else by its path."""
    beside = Path(sys.executable).with_name("race-dist")
    return "race-dist" if shutil.which("race-dist") or not beside.exists() else os.path.relpath(beside)
