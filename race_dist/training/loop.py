"""The training loop. Losses and gradients do not depend on how the ranks are arranged.

Each step draws one global batch. A rank takes the rows of its data-parallel group, and of these rows the shard of its place in
the context-parallel group. Its loss is the sum over its own tokens divided by the global number of targets, so losses and
gradients are sums over the whole mesh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from race_dist.machine import machine_info
from race_dist.streaming import StepInterrupted
from race_dist.training.checkpoint import CheckpointError, CheckpointManager
from race_dist.training.finalize import finalize
from race_dist.training.guard import Verdict
from race_dist.training.logging.metrics import Metrics, nats_to_bits
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Evaluation, Trainer
from race_dist.training.utilization import peak_bytes, peak_flops, step_flops

Probe = Callable[[], Mapping[str, float]]


def never() -> bool:
    """The default of ``stop_requested``: no stop is requested."""
    return False


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a run.

    Attributes:
        stop_requested: called on every rank after every step; if it is True on any rank, all ranks save and stop together.
        probes: called on rank 0 for each line of metrics; their values are added to it.
    """

    stop_requested: Callable[[], bool] = never
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        evaluation: the last evaluation on held-out text (NaN if there was none).
        stopped: whether the run stopped on request before its last step.
    """

    evaluation: Evaluation
    stopped: bool = False


def run(trainer: Trainer, directory: RunDirectory, *, resume: bool = False, hooks: Hooks | None = None) -> Outcome:
    """Train to the last step, or until a stop is requested, and write the run's files to its folder.

    Every rank calls it, after :meth:`RunDirectory.create` or :meth:`RunDirectory.reopen` on rank 0; rank 0 writes and prints.
    A metric, plot, sample or checkpoint that cannot be written is reported and does not end the run.

    Args:
        trainer: at step 0.
        directory: of the run.
        resume: continue from the newest intact checkpoint; from the beginning if there is no checkpoint.
        hooks: a stop flag and further metrics.

    Raises:
        CheckpointError: all checkpoints are damaged; a stop was requested and the checkpoint could not be written; or the
            final weights could not be written.
        FloatingPointError: too many bad steps in a row, and there is no checkpoint to roll back to or the run was rolled back
            too often; or the last step has left NaN or Inf weights.
    """
    config = trainer.config
    store = trainer.open_checkpoints(directory.checkpoints)
    saved = store.latest() if resume else None
    if saved is not None:
        trainer.restore(store, saved)
    if trainer.mesh.rank != 0:
        return _Run(trainer, directory, store, None, hooks or Hooks()).train()
    board = directory.tensorboard if config.tensorboard else None
    with Metrics(directory.metrics, config.steps, after=trainer.step, board=board) as metrics:
        with metrics.write_errors.suppress(str(directory.machine)):
            _write_description(trainer, directory)
        if resume:
            metrics.say(
                [
                    f"resuming {directory.path} after step {trainer.step:,}"
                    if saved is not None
                    else f"{directory.path} has no checkpoint yet: starting from the beginning"
                ]
            )
        return _Run(trainer, directory, store, metrics, hooks or Hooks()).train()


def _write_description(trainer: Trainer, directory: RunDirectory) -> None:
    """Write what the folder needs so that the run can be used and judged without its text and its machine."""
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
    """The state of one call of :func:`run` on one rank."""

    trainer: Trainer
    directory: RunDirectory
    store: CheckpointManager
    metrics: Metrics | None
    hooks: Hooks
    start_time: float = field(default_factory=time.perf_counter)
    checkpoint_deferred: bool = False  # a checkpoint was due after a bad step and waits for the next good one
    rolled_back_to: int | None = None  # serial of the checkpoint of the last rollback; None once a later step was good

    def train(self) -> Outcome:
        trainer, config = self.trainer, self.trainer.config
        if self.metrics is not None:
            self.metrics.say(trainer.describe())
            self.start_time -= self.metrics.seconds_before
        self._report_problems()
        self.step_flops, self.peak_flops = step_flops(trainer.config), peak_flops(trainer.config, trainer.mesh)
        self.last_log_time = self.last_save_time = time.perf_counter()
        self.steps_since_log = 0
        evaluation = Evaluation(math.nan, 0)
        saved_step = trainer.step
        trainer.engine.forward_backward.begin(
            self.directory.path / "step-in-progress" if config.checkpoint.on else None, self.hooks.stop_requested
        )
        while trainer.step < config.steps:
            stop_requested = self.hooks.stop_requested()
            try:
                result = trainer.train_step(flags=(stop_requested, self._is_due()))
            except StepInterrupted as interrupted:
                return self._stop_inside_step(interrupted, evaluation)
            stop, due = result.flags
            self._report_problems()
            if not self._handle_verdict(result.verdict):
                continue
            last = trainer.step == config.steps
            self._log(result.loss, result.grad_norm, last)
            if last or trainer.step % config.eval.every == 0:
                evaluation = self._evaluate()
            if (
                config.checkpoint.on
                and (due or stop or last or self.checkpoint_deferred)
                and self._save(wait=not (stop or last))
            ):
                saved_step = trainer.step
            if stop and not last:
                return self._stop(saved_step, evaluation)
        if math.isnan(evaluation.loss):  # resumed after the last step
            evaluation = self._evaluate()
        self.store.wait()
        self._report_problems()
        if not trainer.has_finite_weights():
            raise FloatingPointError(
                f"the weights are not finite after step {trainer.step}; go on from a checkpoint before "
                "it, or begin anew, with a lower optim.lr"
            )
        trainer.engine.forward_backward.end()
        finalize(trainer, self.directory, self.metrics, evaluation)
        return Outcome(evaluation)

    def _handle_verdict(self, verdict: Verdict) -> bool:
        """Report the guard's verdict. False if the run was rolled back to a checkpoint."""
        trainer, guard = self.trainer, self.trainer.guard
        if verdict.alarm is not None:
            self._log_event("alarm", verdict.alarm)
        if verdict.bad is None:
            self.rolled_back_to = None
            return True
        self._log_event("skipped", verdict.bad)
        if not guard.exhausted:
            return True
        why = (
            f"step {trainer.step}: {verdict.bad}, and {guard.config.skips} steps before it were skipped; try a lower "
            "optim.lr or a longer optim.warmup_steps"
        )
        if guard.rollbacks >= guard.config.rollbacks or not self.trainer.config.checkpoint.on:
            raise FloatingPointError(why)
        self.store.wait()
        saved = self.store.latest(before=self.rolled_back_to)  # not again one that no good step followed
        if saved is None:
            raise FloatingPointError(why)
        trainer.roll_back(self.store, saved)
        self.rolled_back_to, self.checkpoint_deferred = saved.serial, False
        self._log_event("rolled back", f"to the checkpoint of step {saved.step}; going on with other data")
        return False

    def _log_event(self, what: str, text: str) -> None:
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, what, text)

    def _is_due(self) -> bool:
        """Whether a checkpoint is due after the next step, by steps or by rank 0's clock."""
        config = self.trainer.config.checkpoint
        by_steps = config.every > 0 and (self.trainer.step + 1) % config.every == 0
        by_time = (
            self.trainer.mesh.rank == 0
            and config.minutes > 0
            and time.perf_counter() - self.last_save_time > 60 * config.minutes
        )
        return by_steps or by_time

    def _save(self, *, wait: bool = False) -> bool:
        """Begin to write a checkpoint. False if none is begun: the weights are not finite, or (with ``wait``) the last step was
        bad and the checkpoint is deferred to the next good one."""
        self.checkpoint_deferred = wait and self.trainer.guard.bad_in_a_row > 0
        if self.checkpoint_deferred:
            return False
        if not self.trainer.has_finite_weights():
            self._log_event("no checkpoint", "the weights are not finite")
            return False
        self.trainer.save(self.store)
        self.last_save_time = time.perf_counter()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "checkpoint", quiet=True)
        return True

    def _log(self, loss: float, norm: float, last: bool) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.steps_since_log += 1
        step = trainer.step
        if not (last or step == 1 or step % config.log_every == 0):
            return
        now = time.perf_counter()
        if self.metrics is not None:
            tokens = self.steps_since_log * config.data.batch_size * config.data.context
            record = {
                "loss": loss,
                "bpb": nats_to_bits(loss) / trainer.corpus.bytes_per_token,
                "grad_norm": norm,
                "lr": trainer.engine.optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens / (now - self.last_log_time),
                "seconds": now - self.start_time,
                "peak_bytes": float(peak_bytes(trainer.mesh.device)),
            }
            if self.peak_flops is not None:
                record["mfu"] = self.steps_since_log * self.step_flops / (now - self.last_log_time) / self.peak_flops
            for probe in self.hooks.probes:
                with self.metrics.write_errors.suppress("a probe's metrics"):
                    record |= probe()
            self.metrics.train(step, record)
        self.last_log_time, self.steps_since_log = now, 0

    def _evaluate(self) -> Evaluation:
        started = time.perf_counter()
        evaluation = self.trainer.evaluate()
        self.last_log_time += time.perf_counter() - started
        if self.metrics is not None:
            self.metrics.evaluation(
                self.trainer.step,
                {
                    "loss": evaluation.loss,
                    "bpb": nats_to_bits(evaluation.loss) / self.trainer.corpus.bytes_per_token,
                    "tokens": evaluation.tokens,
                    "seconds": time.perf_counter() - self.start_time,
                },
            )
        return evaluation

    def _stop(self, saved_step: int, evaluation: Evaluation) -> Outcome:
        self._wait_for_checkpoint()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "stopped", quiet=True)
            saved = self.trainer.config.checkpoint.on and saved_step
            where = f"saved after step {saved_step:,}" if saved else "nothing was saved"
            self.metrics.say([f"stopped on request, {where}; go on with --resume"])
        return Outcome(evaluation, stopped=True)

    def _stop_inside_step(self, interrupted: StepInterrupted, evaluation: Evaluation) -> Outcome:
        """All ranks have interrupted a step at the same chunk. A checkpoint keeps the weights from before the step."""
        if self.trainer.config.checkpoint.on:
            self._save()
        self._wait_for_checkpoint()
        if self.metrics is not None:
            self.metrics.event(self.trainer.step, "stopped", quiet=True)
            self.metrics.say([f"step {self.trainer.step + 1:,} {interrupted}", "go on with --resume"])
        return Outcome(evaluation, stopped=True)

    def _wait_for_checkpoint(self) -> None:
        """Wait for the last checkpoint: a run that stops on request must have it on disk."""
        if not self.store.wait():
            raise CheckpointError(self.store.problems[-1])

    def _report_problems(self) -> None:
        problems, self.store.problems = self.store.problems, []
        for problem in problems:
            self._log_event("checkpoint trouble", problem)
