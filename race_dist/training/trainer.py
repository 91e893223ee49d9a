"""The trainer on one rank: train a step, evaluate, save and restore checkpoints."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import race_dist
from race_dist.parallel import all_reduce_sum
from race_dist.training.checkpoint import CheckpointManager, OtherRunError, SavedCheckpoint
from race_dist.training.config import TrainConfig, differing_keys
from race_dist.training.consistency import check_ranks_consistent
from race_dist.training.data.batches import Batch, Shard, check_fits, check_shards, evaluation_batches, training_batch
from race_dist.training.data.corpus import load_corpus
from race_dist.training.data.splits import Corpus
from race_dist.training.engine import CheckModel, Engine, NativeEngine
from race_dist.training.guard import Guard, Verdict
from race_dist.training.logging.writers import import_summary_writer
from race_dist.training.optim import learning_rate
from race_dist.training.rank_mesh import RankMesh

BuildEngine = Callable[[TrainConfig, Any, CheckModel], Engine]
# keys that may change when a run is resumed
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
    """An evaluation on held-out text: the mean ``loss``, in nats, over ``tokens`` tokens."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        loss: mean over the global batch, in nats, before the step.
        grad_norm: norm of the global gradient, before clipping.
        flags: for each flag that was passed in, whether it was set on any rank.
        verdict: of the guard; a bad step was skipped.
    """

    loss: float
    grad_norm: float
    flags: tuple[bool, ...] = ()
    verdict: Verdict = field(default_factory=Verdict)


class Trainer:
    """One rank's part of a run: the engine, the text, the guard, and the position in the run.

    Attributes:
        config: of the run.
        mesh: the process groups of the run and this rank's place in them.
        corpus: the text; ``train`` and ``held_out`` are its two splits.
        engine: holds the model and the optimizer.
        guard: judges each step.
        step: steps done.
        position: batches drawn.
    """

    def __init__(self, config: TrainConfig, mesh: RankMesh, build_engine: BuildEngine = NativeEngine) -> None:
        """Load the text and build the engine. Every rank calls it.

        Args:
            config: of the run.
            mesh: the process groups of the run and this rank's place in them.
            build_engine: makes the engine; see :func:`race_dist.integrations.engines.make_trainer`.

        Raises:
            ImportError: TensorBoard is asked for and not installed.
            ValueError: the batch does not divide over the mesh, there is no text or too little, the layout does not divide a
                sequence, or the ranks do not have the same configuration, code, text and weights.
        """
        self.config, self.mesh = config, mesh
        if config.tensorboard:
            import_summary_writer()  # report that it is missing before anything is trained
        self.corpus = open_corpus(config, mesh.dp, mesh.sp, check=mesh.rank == 0)
        self.train, self.held_out = _splits(config, self.corpus)
        self.guard = Guard(config.guard)
        self.step = self.position = 0
        self.engine: Engine = build_engine(
            config, mesh, lambda model: check_ranks_consistent(config, self.corpus, model, mesh.world)
        )

    @property
    def model(self) -> Any:
        """This rank's replica of the model, or its shards."""
        return self.engine.model

    def train_step(self, flags: Sequence[bool] = (), batch: Batch | None = None) -> StepResult:
        """One optimizer step. If the guard refuses it, the weights stay as they were. An engine that knows the gradient's norm
        only after the update (DeepSpeed) cannot skip a step; the verdict is then an alarm.

        Args:
            flags: of this rank; the result says which are set on any rank.
            batch: None: the batch at this position in the data.

        Raises:
            FloatingPointError: the engine cannot skip steps, and the loss is not finite (the weights are left as they were) or
                the gradient is not.
        """
        config, data = self.config, self.config.data
        if batch is None:
            batch = training_batch(
                self.train, seed=config.seed, position=self.position, batch_size=data.batch_size, context=data.context
            )
        self.engine.zero_grad()
        share = self.engine.forward_backward.gradients(batch).double()
        shared = torch.stack([share, *(share.new_tensor(float(f)) for f in flags)])
        loss, *raised = all_reduce_sum(shared, self.mesh.world).tolist()
        rate = learning_rate(self.step, config.steps, config.optim)
        norm = self.engine.gradient_norm()
        if norm is None:
            norm, verdict = self._update_at_once(loss, rate)
        else:
            verdict = self.guard.judge(loss, float(norm))
            if verdict.bad is None:
                self.engine.update(rate, norm)
        self.step += 1
        self.position += 1
        return StepResult(loss, float(norm), tuple(f > 0 for f in raised), verdict)

    def _update_at_once(self, loss: float, rate: float) -> tuple[Tensor, Verdict]:
        """Update with an engine that knows the gradient's norm only afterwards; returns the norm and the verdict."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {loss}; try a lower optim.lr or a longer optim.warmup_steps"
            )
        norm = self.engine.update(rate, None)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient's norm is {float(norm)}; go on from the last checkpoint with a lower "
                "optim.lr"
            )
        return norm, self.guard.judge_applied(loss, float(norm))

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The loss on held-out text, the same on every rank."""
        data, mesh, engine = self.config.data, self.mesh, self.engine
        engine.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        tokens = 0
        for batch in evaluation_batches(
            self.held_out, tokens=self.config.eval.tokens, batch_size=data.batch_size, context=data.context
        ):
            total += engine.forward_backward.loss(batch).double()
            tokens += batch.targets
        engine.model.train()
        return Evaluation(float(all_reduce_sum(total, mesh.world)) / max(1, tokens), tokens)

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Whether no weight is NaN or Inf on any rank. It waits for the device, so it is called before a checkpoint and not in
        every step."""
        count = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for p in self.engine.model.parameters():
            count += (p.to_local() if isinstance(p, DTensor) else p).isfinite().logical_not().sum()
        return not float(all_reduce_sum(count, self.mesh.world))

    def open_checkpoints(self, folder: Path) -> CheckpointManager:
        """The manager of this run's checkpoints in a folder. Every rank calls it."""
        config = self.config.checkpoint
        return CheckpointManager(folder, self.mesh.world, keep=config.keep, keep_every=config.keep_every)

    def save(self, store: CheckpointManager) -> None:
        """Begin to write a checkpoint of the current state."""
        store.save(
            self.step,
            self.engine.checkpoint_state(),
            {
                "position": self.position,
                "guard": self.guard.state(),
                "config": self.config.model_dump(mode="json"),
                "corpus": {
                    "tokens": len(self.corpus.tokens),
                    "digest": self.corpus.digest(),
                    "documents": self.corpus.documents_digest(),
                },
                "mesh": {"dp": self.mesh.dp, "sp": self.mesh.sp},
                "versions": {
                    "race-dist": race_dist.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
        )

    def roll_back(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Restore a checkpoint of this run, but continue with the data that comes next."""
        position, rollbacks = self.position, self.guard.rollbacks
        self.restore(store, saved)
        self.position, self.guard.rollbacks = position, rollbacks
        self.guard.rolled_back()

    def restore(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Continue from a checkpoint.

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
        store.load(saved, self.engine.checkpoint_state())
        self.step, self.position = saved.step, facts["position"]
        self.guard = Guard.of(self.config.guard, facts["guard"])

    def _same_documents(self, facts: Mapping[str, Any]) -> bool:
        """Whether the documents of the text begin at the same tokens, if the run depends on that."""
        data = self.config.data
        matters = data.documents == "separate" or data.held_out == "documents"
        return not matters or facts.get("documents") in (None, self.corpus.documents_digest())

    def describe(self) -> Iterator[str]:
        """Two lines about the model and the text, and a third one if files of the text's folder are skipped."""
        config, corpus = self.config, self.corpus
        unit = "bytes" if corpus.tokenizer is None else "tokens"
        yield f"{config.name}: {self.engine.describe()}"
        yield (
            f"text: {corpus.name}, {len(self.train) / 1e6:.1f} M {unit} to train on, {len(self.held_out) / 1e6:.1f} M "
            f"held out; {config.data.batch_size} x {config.data.context} {unit} per step"
        )
        if corpus.skipped:
            yield corpus.skipped.describe(f"left out of {corpus.name}")


def open_corpus(config: TrainConfig, dp: int, sp: int = 1, *, check: bool = True) -> Corpus:
    """Check that ``dp`` groups of ``sp`` ranks can train on the text of a run, and open it.

    Args:
        config: of the run.
        dp, sp: sizes of the mesh.
        check: whether to check that a text file is UTF-8; one rank is enough, because ranks compare samples of the text later.

    Raises:
        ValueError: the batch does not divide over the ranks, or the text is too short.
    """
    data, parts = config.data, config.optim.accumulate
    if data.batch_size % dp:
        raise ValueError(
            f"data.batch_size is {data.batch_size}, which does not divide over parallel.dp = {dp} "
            "groups of ranks; change one of them"
        )
    if data.batch_size // dp % parts:
        raise ValueError(
            f"data.batch_size = {data.batch_size} over parallel.dp = {dp} leaves {data.batch_size // dp} rows per "
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
    check_fits(*_splits(config, corpus), data.context, corpus.name)
    return corpus


def _splits(config: TrainConfig, corpus: Corpus) -> tuple[Any, Any]:
    return corpus.split(config.data.held_out, separate=config.data.documents == "separate")
