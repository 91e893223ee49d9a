"""The training loop: the same losses and gradients for every arrangement of the ranks.

A step draws one global batch; a rank takes the rows of its ``dp`` place and of these the shard of its ``sp`` place. Its
loss is the sum over its own tokens divided by the global count, so that losses and gradients simply add up over the
whole mesh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from race_dist.machine import machine_info
from race_dist.streaming import StepInterrupted
from race_dist.training.checkpoint import CheckpointError, CheckpointManager
from race_dist.training.finalize import finish
from race_dist.training.guard import Verdict
from race_dist.training.logging.metrics import Metrics, nats_to_bits
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Evaluation, Trainer
from race_dist.training.utilization import peak_bytes, peak_flops, step_flops

STOPPED = 75  # exit code of a run that saved and left because it was asked to (EX_TEMPFAIL: try again later)

Probe = Callable[[], Mapping[str, float]]


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class Hooks:
    """What others may plug into a run.

    Attributes:
        stop_requested: asked on every rank after every step; where it is True on any rank, all save and leave together.
        probes: asked on rank 0 for each line of metrics; what they answer is added to it.
    """

    stop_requested: Callable[[], bool] = never
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        evaluation: the last measurement on held-out text (not a number where none was made).
        stopped: whether it saved and left before the end.
    """

    evaluation: Evaluation
    stopped: bool = False


def run(trainer: Trainer, directory: RunDirectory, *, resume: bool = False, hooks: Hooks | None = None) -> Outcome:
    """Train to the end, or until asked to stop, and leave the run's files in its folder.

    Every rank calls it, after :meth:`RunDirectory.create` or :meth:`RunDirectory.reopen` on rank 0; rank 0 writes and prints.

    Args:
        trainer: at step 0.
        directory: of the run.
        resume: go on from the newest checkpoint that is whole; from the beginning where there is none.
        hooks: a stop flag and further metrics.

    A metric, picture, sample or checkpoint that cannot be written is said and ends nothing.

    Raises:
        CheckpointError: no checkpoint is whole; the run was asked to stop and could not be saved; or the weights that it
            ended with could not be written.
        FloatingPointError: steps in a row were bad and there is no checkpoint to go back to, or it was gone back to too
            often; or the last step has left weights that are not finite.
    """
    config = trainer.config
    store = trainer.open_checkpoints(directory.checkpoints)
    saved = store.latest() if resume else None
    if saved is not None:
        trainer.restore(store, saved)
    if trainer.mesh.rank != 0:
        return _Run(trainer, directory, store, None, hooks or Hooks()).go()
    board = directory.tensorboard if config.tensorboard else None
    with Metrics(directory.metrics, config.steps, after=trainer.step, board=board) as metrics:
        with metrics.write_errors.suppress(str(directory.machine)):
            _describe_run(trainer, directory)
        if resume:
            metrics.say(
                [
                    f"resuming {directory.path} after step {trainer.step:,}"
                    if saved is not None
                    else f"{directory.path} has no checkpoint yet: starting from the beginning"
                ]
            )
        return _Run(trainer, directory, store, metrics, hooks or Hooks()).go()


def _describe_run(trainer: Trainer, directory: RunDirectory) -> None:
    """What the folder needs so that the run can be used and judged without its text and its machine."""
    mesh = trainer.mesh
    found = {
        **machine_info(mesh.device),
        "ranks": mesh.dp * mesh.sp,
        "dp": mesh.dp,
        "sp": mesh.sp,
        "parameters": trainer.engine.num_parameters,
        "text": trainer.corpus.name,
        "training_tokens": len(trainer.train),
        "held_out_tokens": len(trainer.held_out),
        "text_digest": trainer.corpus.digest(),
    }
    directory.write_config(trainer.config)
    directory.describe(found, trainer.corpus.tokenizer)


@dataclass
class _Run:
    """One call of :func:`run` on one rank."""

    trainer: Trainer
    directory: RunDirectory
    store: CheckpointManager
    metrics: Metrics | None
    hooks: Hooks
    began: float = field(default_factory=time.perf_counter)
    owed: bool = False  # a checkpoint was due when the last steps were bad
    went_back_to: int | None = None  # serial of the checkpoint gone back to; None once a step after it was good

    def go(self) -> Outcome:
        trainer, config = self.trainer, self.trainer.config
        if self.metrics is not None:
            self.metrics.say(trainer.describe())
            self.began -= self.metrics.seconds_before
        self._tell_problems()
        self.step_flops, self.peak_flops = step_flops(trainer.config), peak_flops(trainer.config, trainer.mesh)
        self.logged = self.saved = time.perf_counter()
        self.since = 0
        evaluation = Evaluation(math.nan, 0)
        saved_step = trainer.step
        trainer.engine.forward_backward.begin(
            self.directory.path / "step-in-progress" if config.checkpoint.on else None, self.hooks.stop_requested
        )
        while trainer.step < config.steps:
            asked = self.hooks.stop_requested()
            try:
                result = trainer.train_step(flags=(asked, self._is_due()))
            except StepInterrupted as interrupted:
                return self._leave_inside_step(interrupted, evaluation)
            stop, due = result.flags
            self._tell_problems()
            if not self._judged(result.verdict):
                continue
            last = trainer.step == config.steps
            self._log(result.loss, result.grad_norm, last)
            if last or trainer.step % config.eval.every == 0:
                evaluation = self._evaluate()
            if config.checkpoint.on and (due or stop or last or self.owed) and self._save(wait=not (stop or last)):
                saved_step = trainer.step
            if stop and not last:
                return self._leave(saved_step, evaluation)
        if math.isnan(evaluation.loss):  # resumed after the last step
            evaluation = self._evaluate()
        self.store.wait()
        self._tell_problems()
        if not trainer.has_finite_weights():
            raise FloatingPointError(
                f"the weights are not finite after step {trainer.step}; go on from a checkpoint before "
                "it, or begin anew, with a lower optim.lr"
            )
        trainer.engine.forward_backward.end()
        finish(trainer, self.directory, self.metrics, evaluation)
        return Outcome(evaluation)

    def _judged(self, verdict: Verdict) -> bool:
        """Say what the guard said. False where the run went back to a checkpoint."""
        trainer, guard = self.trainer, self.trainer.guard
        if verdict.alarm is not None:
            self._tell("alarm", verdict.alarm)
        if verdict.bad is None:
            self.went_back_to = None
            return True
        self._tell("skipped", verdict.bad)
        if not guard.exhausted:
            return True
        why = (
            f"step {trainer.step}: {verdict.bad}, and {guard.config.skips} steps before it were skipped; try a lower "
            "optim.lr or a longer optim.warmup_steps"
        )
        if guard.rollbacks >= guard.config.rollbacks or not self.trainer.config.checkpoint.on:
            raise FloatingPointError(why)
        self.store.wait()
        saved = self.store.latest(before=self.went_back_to)  # one that no good step followed is no place to go back to
        if saved is None:
            raise FloatingPointError(why)
        trainer.roll_back(self.store, saved)
        self.went_back_to, self.owed = saved.serial, False
        self._tell("rolled back", f"to the checkpoint of step {saved.step}; going on with other data")
        return False

    def _tell(self, what: str, text: str) -> None:
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, what, text)

    def _is_due(self) -> bool:
        """Whether this rank wants a checkpoint after the step that comes: rank 0's clock counts."""
        config = self.trainer.config.checkpoint
        by_steps = config.every > 0 and (self.trainer.step + 1) % config.every == 0
        by_time = self.trainer.mesh.rank == 0 and config.minutes > 0 and time.perf_counter() - self.saved > 60 * config.minutes
        return by_steps or by_time

    def _save(self, *, wait: bool = False) -> bool:
        """Begin a checkpoint. False where none is begun: the weights are not finite, or the last step was bad and with
        ``wait`` the next good one is waited for."""
        self.owed = wait and self.trainer.guard.bad_in_a_row > 0
        if self.owed:
            return False
        if not self.trainer.has_finite_weights():
            self._tell("no checkpoint", "the weights are not finite")
            return False
        self.trainer.save(self.store)
        self.saved = time.perf_counter()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "checkpoint", quiet=True)
        return True

    def _log(self, loss: float, norm: float, last: bool) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.since += 1
        step = trainer.step
        if not (last or step == 1 or step % config.log_every == 0):
            return
        now = time.perf_counter()
        if self.metrics is not None:
            tokens = self.since * config.data.batch_size * config.data.context
            record = {
                "loss": loss,
                "bpb": nats_to_bits(loss) / trainer.corpus.bytes_per_token,
                "grad_norm": norm,
                "lr": trainer.engine.optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens / (now - self.logged),
                "seconds": now - self.began,
                "peak_bytes": float(peak_bytes(trainer.mesh.device)),
            }
            if self.peak_flops is not None:
                record["mfu"] = self.since * self.step_flops / (now - self.logged) / self.peak_flops
            for probe in self.hooks.probes:
                with self.metrics.write_errors.suppress("a probe's metrics"):
                    record |= probe()
            self.metrics.train(step, record)
        self.logged, self.since = now, 0

    def _evaluate(self) -> Evaluation:
        started = time.perf_counter()
        evaluation = self.trainer.evaluate()
        self.logged += time.perf_counter() - started
        if self.metrics is not None:
            self.metrics.evaluation(
                self.trainer.step,
                {
                    "loss": evaluation.loss,
                    "bpb": nats_to_bits(evaluation.loss) / self.trainer.corpus.bytes_per_token,
                    "tokens": evaluation.tokens,
                    "seconds": time.perf_counter() - self.began,
                },
            )
        return evaluation

    def _leave(self, saved_step: int, evaluation: Evaluation) -> Outcome:
        self._settle()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "stopped", quiet=True)
            saved = self.trainer.config.checkpoint.on and saved_step
            where = f"saved after step {saved_step:,}" if saved else "nothing was saved"
            self.metrics.say([f"stopped on request, {where}; go on with --resume"])
        return Outcome(evaluation, stopped=True)

    def _leave_inside_step(self, interrupted: StepInterrupted, evaluation: Evaluation) -> Outcome:
        """All ranks have ended a step at the same chunk; a checkpoint keeps the weights that it began with."""
        if self.trainer.config.checkpoint.on:
            self._save()
        self._settle()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "stopped", quiet=True)
            self.metrics.say([f"step {self.trainer.step + 1:,} {interrupted}", "go on with --resume"])
        return Outcome(evaluation, stopped=True)

    def _settle(self) -> None:
        """The last checkpoint must be on disk before anybody leaves on request."""
        if not self.store.wait():
            raise CheckpointError(self.store.problems[-1])

    def _tell_problems(self) -> None:
        problems, self.store.problems = self.store.problems, []
        for problem in problems:
            self._tell("checkpoint trouble", problem)
