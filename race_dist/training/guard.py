"""The guard against bad steps: steps with a NaN or Inf loss or gradient, and loss or gradient spikes, are skipped.

A spike is a value far above the median of the last steps. The guard uses only numbers that are the same on every rank, so all
ranks decide alike; its state is in the checkpoints, so a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from race_dist.training.config import GuardConfig

MIN_HISTORY = 10  # steps before the median is used


@dataclass(frozen=True)
class Verdict:
    """The guard's decision about a step.

    Attributes:
        bad: why the step must be skipped, as a sentence; None: apply it.
        alarm: a warning about a step that is applied, as a sentence.
    """

    bad: str | None = None
    alarm: str | None = None


@dataclass
class Guard:
    """The last losses and gradient norms, and how many bad steps came in a row."""

    config: GuardConfig
    losses: deque[float] = field(default_factory=deque)
    norms: deque[float] = field(default_factory=deque)
    bad_in_a_row: int = 0
    rollbacks: int = 0

    def __post_init__(self) -> None:
        self.losses, self.norms = (deque(x, maxlen=self.config.window) for x in (self.losses, self.norms))

    def judge(self, loss: float, norm: float) -> Verdict:
        """Judge a step and add it to the history."""
        verdict = self._verdict(loss, norm)
        if verdict.bad is not None:
            self.bad_in_a_row += 1
        else:
            self.bad_in_a_row = 0
            self.losses.append(loss)
            self.norms.append(norm)
        return verdict

    def judge_applied(self, loss: float, norm: float) -> Verdict:
        """Judge a step that is applied already: a reason to skip it becomes an alarm."""
        verdict = self.judge(loss, norm)
        self.bad_in_a_row = 0
        return Verdict(alarm=verdict.bad or verdict.alarm)

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were bad than may be skipped."""
        return self.bad_in_a_row > self.config.skips

    def rolled_back(self) -> None:
        """Count a rollback to a checkpoint."""
        self.rollbacks += 1
        self.bad_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, of JSON types."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "bad_in_a_row": self.bad_in_a_row,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def of(cls, config: GuardConfig, state: Mapping[str, Any]) -> Guard:
        """The inverse of :meth:`state`."""
        return cls(config, deque(state["losses"]), deque(state["norms"]), state["bad_in_a_row"], state["rollbacks"])

    def _verdict(self, loss: float, norm: float) -> Verdict:
        config = self.config
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Verdict(f"the loss is {loss:g} and the gradient's norm {norm:g}")
        for what, value, before, factor in (
            ("loss", loss, self.losses, config.loss_spike),
            ("gradient's norm", norm, self.norms, config.norm_spike),
        ):
            if _exceeds(value, before, factor):
                return Verdict(
                    f"the {what} is {value:.4g}, more than {factor:g} times the median of the last {len(before)} "
                    f"steps, {statistics.median(before):.4g}"
                )
        if _exceeds(norm, self.norms, config.norm_alarm):
            return Verdict(
                alarm=f"the gradient's norm is {norm:.4g}; the median of the last {len(self.norms)} steps is "
                f"{statistics.median(self.norms):.4g}"
            )
        return Verdict()


def _exceeds(value: float, before: deque[float], factor: float) -> bool:
    return factor > 0 and len(before) >= MIN_HISTORY and value > factor * statistics.median(before)
