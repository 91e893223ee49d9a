"""A model, its optimizer and its text on one rank's place in the mesh: a step, a measurement, saving and restoring."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import race_dist
from race_dist.models import DecoderLM
from race_dist.parallel import all_reduce_sum, full_tensor
from race_dist.training.checkpoint import CheckpointManager, OtherRunError, SavedCheckpoint
from race_dist.training.config import TrainConfig, differing_keys
from race_dist.training.consistency import check_ranks_consistent
from race_dist.training.data.batches import Batch, Shard, check_fits, check_shards, evaluation_batches, training_batch
from race_dist.training.data.corpus import Corpus, load_corpus
from race_dist.training.guards import Guard, Verdict
from race_dist.training.optim import build_optimizer, learning_rate, optimizer_tensors, set_learning_rate
from race_dist.training.ranks import RankMesh
from race_dist.training.records import import_summary_writer
from race_dist.training.step import StepMethod, build_step

# what a run may be resumed with although it was begun with another value
FREE_ON_RESUME = (
    "name",
    "runs",
    "device",
    "compile",
    "log_every",
    "tensorboard",
    "steps",
    "parallel",
    "stream",
    "eval",
    "sample",
    "checkpoint",
    "guard",
    "data.path",
    "data.pattern",
    "engine",
    "deepspeed",
    "model.activation_checkpointing",
    "model.loss_chunk",
    "optim.accumulate",
)


@dataclass(frozen=True)
class Evaluation:
    """A measurement on held-out text: mean ``loss`` in nats over ``tokens`` tokens."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean over the global batch, in nats, before the step.
        grad_norm: norm of its whole gradient, before clipping.
        flags: for each flag that was passed in, whether it was set on any rank.
        verdict: what the guard thinks of it; a bad step was not taken.
    """

    loss: float
    grad_norm: float
    flags: tuple[bool, ...] = ()
    verdict: Verdict = field(default_factory=Verdict)


class Trainer:
    """A model, its optimizer and its text on this rank's place in the mesh.

    Attributes:
        config: of the run.
        ranks: the mesh and this rank's place in it.
        corpus: the text; ``train`` and ``held_out`` are its two sides.
        model: this rank's replica, or its shards of it.
        optimizer: over its parameters.
        method: how a batch becomes gradients.
        guard: judges each step.
        step: steps done.
        position: batches drawn.
    """

    def __init__(self, config: TrainConfig, ranks: RankMesh) -> None:
        """Everything a run needs, on every rank.

        Raises:
            ImportError: TensorBoard is asked for and not installed.
            ValueError: the batch does not divide over the mesh, the text is too short or none, a sequence does not
                divide by the layout, or the ranks do not hold the same configuration, code, text and weights.
        """
        self.config, self.ranks = config, ranks
        if config.tensorboard:
            import_summary_writer()  # its absence is said before anything is trained
        self.corpus = open_corpus(config, ranks.dp, ranks.sp, check=ranks.rank == 0)
        self.train, self.held_out = _sides(config, self.corpus)
        self.guard = Guard(config.guard)
        self.step = self.position = 0
        self._build()

    def _build(self) -> None:
        """Model, optimizer and the way of a step; another engine has its own."""
        config = self.config
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.model: Any = DecoderLM(config.model, dtype=dtype, device="meta")
        self.method: StepMethod = build_step(config, self.model, self.ranks)
        self.optimizer: Any = build_optimizer(self.model, config.optim)
        check_ranks_consistent(config, self.corpus, self.model, self.ranks.world)

    def open_checkpoints(self, folder: Path) -> CheckpointManager:
        """Where this run's checkpoints go, and come from. Every rank calls it."""
        config = self.config.checkpoint
        return CheckpointManager(folder, self.ranks.world, keep=config.keep, keep_every=config.keep_every)

    def train_step(self, flags: Sequence[bool] = (), batch: Batch | None = None) -> StepResult:
        """One optimizer step; where the guard finds it bad, the weights stay as they were.

        Args:
            flags: this rank's; the result says which were set on any rank.
            batch: None: the one at this position in the data.
        """
        config, data = self.config, self.config.data
        if batch is None:
            batch = training_batch(
                self.train, seed=config.seed, position=self.position, batch_size=data.batch_size, context=data.context
            )
        self.optimizer.zero_grad(set_to_none=True)
        share = self.method.gradients(batch)
        shared = torch.stack([share.double(), *(share.new_tensor(float(f), dtype=torch.float64) for f in flags)])
        loss, *raised = all_reduce_sum(shared, self.ranks.world).tolist()
        norm = self.gradient_norm()
        verdict = self.guard.judge(loss, float(norm))
        if verdict.bad is None:
            set_learning_rate(self.optimizer, learning_rate(self.step, config.steps, config.optim))
            self.update(norm)
        self.step += 1
        self.position += 1
        return StepResult(loss, float(norm), tuple(f > 0 for f in raised), verdict)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, once it is there."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return full_tensor(torch.nn.utils.get_total_norm(grads))

    def update(self, norm: Tensor) -> None:
        """Clip the gradient, whose norm this is, and change the weights by it."""
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The loss on held-out text, the same on every rank."""
        data, ranks = self.config.data, self.ranks
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        tokens = 0
        for batch in evaluation_batches(
            self.held_out, tokens=self.config.eval.tokens, batch_size=data.batch_size, context=data.context
        ):
            total += self.method.loss(batch).double()
            tokens += batch.targets
        self.model.train()
        return Evaluation(float(all_reduce_sum(total, ranks.world)) / max(1, tokens), tokens)

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Whether all weights are, on every rank. It waits for the device: asked before a checkpoint, not in every step."""
        odd = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for p in self.model.parameters():
            odd += (p.to_local() if isinstance(p, DTensor) else p).isfinite().logical_not().sum()
        return not float(all_reduce_sum(odd, self.ranks.world))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters and the optimizer's states by name."""
        named = {name: p.detach() for name, p in self.model.named_parameters()}
        return {f"model.{name}": p for name, p in named.items()} | optimizer_tensors(self.model, self.optimizer)

    def save(self, store: CheckpointManager) -> None:
        """Begin a checkpoint of this moment."""
        store.save(
            self.step,
            self.tensors(),
            {
                "position": self.position,
                "guard": self.guard.state(),
                "config": self.config.model_dump(mode="json"),
                "corpus": {
                    "tokens": len(self.corpus.tokens),
                    "digest": self.corpus.digest(),
                    "documents": self.corpus.documents_digest(),
                },
                "mesh": {"dp": self.ranks.dp, "sp": self.ranks.sp},
                "versions": {
                    "race-dist": race_dist.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
        )

    def roll_back(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Go back to a checkpoint of this run, but on with the data that comes now."""
        position, rollbacks = self.position, self.guard.rollbacks
        self.restore(store, saved)
        self.position, self.guard.rollbacks = position, rollbacks
        self.guard.rolled_back()

    def restore(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            OtherRunError: it is of a run with another model, text or optimizer; the message names what differs.
        """
        facts = saved.facts
        differing = [
            key
            for key in differing_keys(facts["config"], self.config.model_dump(mode="json"))
            if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
        ]
        if differing:
            raise OtherRunError(
                f"{saved.path} was written with another {', '.join(differing)}; put back what it was, or "
                "begin a new run under another name"
            )
        if facts["corpus"]["digest"] != self.corpus.digest() or not self._same_documents(facts["corpus"]):
            raise OtherRunError(
                f"the text {self.corpus.name} is not the one that {saved.path} was trained on; put it "
                "back, or begin a new run under another name"
            )
        self._load(store, saved)
        self.step, self.position = saved.step, facts["position"]
        self.guard = Guard.of(self.config.guard, facts["guard"])

    def _same_documents(self, facts: Mapping[str, Any]) -> bool:
        """Whether the text's documents begin where they did; they need not where nothing depends on it."""
        data = self.config.data
        matters = data.documents == "separate" or data.held_out == "documents"
        return not matters or facts.get("documents") in (None, self.corpus.documents_digest())

    def _load(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        store.load(saved, self.tensors())

    def describe(self) -> Iterator[str]:
        """What is about to happen, in two lines, and a third where files of the text's folder are left out."""
        config, ranks, corpus = self.config, self.ranks, self.corpus
        parameters = sum(p.numel() for p in self.model.parameters())
        unit = "bytes" if corpus.tokenizer is None else "tokens"
        yield (
            f"{config.name}: {parameters:,} parameters, {ranks.dp * ranks.sp} "
            f"rank{'s' if ranks.dp * ranks.sp > 1 else ''} (dp {ranks.dp} x sp {ranks.sp}"
            f"{', parameters sharded' if self.method.replica.is_sharded else ''}) on {ranks.device.type}"
        )
        yield (
            f"text: {corpus.name}, {len(self.train) / 1e6:.1f} M {unit} to train on, {len(self.held_out) / 1e6:.1f} M "
            f"held out; {config.data.batch_size} x {config.data.context} {unit} a step"
        )
        if corpus.skipped:
            yield corpus.skipped.describe(f"left out of {corpus.name}")


def open_corpus(config: TrainConfig, dp: int, sp: int = 1, *, check: bool = True) -> Corpus:
    """The text of a run, once it is clear that ``dp`` groups of ``sp`` ranks can train on it; ValueError where they
    cannot. One rank's ``check`` that a text file is UTF-8 is enough: ranks compare samples of the text later."""
    data, parts = config.data, config.optim.accumulate
    if data.batch_size % dp:
        raise ValueError(
            f"data.batch_size is {data.batch_size}, which does not divide over parallel.dp = {dp} "
            "groups of ranks; change one of them"
        )
    if data.batch_size // dp % parts:
        raise ValueError(
            f"data.batch_size = {data.batch_size} over parallel.dp = {dp} leaves {data.batch_size // dp} rows a "
            f"rank, which do not divide into optim.accumulate = {parts} parts; change one of them"
        )
    check_shards(
        data.context,
        data.batch_size // dp // parts,
        Shard(0, sp, config.parallel.layout),
        separate=data.documents == "separate",
    )
    corpus = load_corpus(data.path, data.pattern, check=check)
    if corpus.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokens of {corpus.name} need "
            f"{corpus.vocab_size}: make it {corpus.vocab_size} or more"
        )
    check_fits(*_sides(config, corpus), data.context, corpus.name)
    return corpus


def _sides(config: TrainConfig, corpus: Corpus) -> tuple[Any, Any]:
    return corpus.split(config.data.held_out, separate=config.data.documents == "separate")
