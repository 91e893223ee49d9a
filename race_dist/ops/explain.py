"""Which kernels run for a call and why, and one warning per kind of call that does not run in the fastest kernels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


class SlowKernelWarning(UserWarning):
    """A call runs slower than its shape and the GPU would allow; the message says why and what to change."""


@dataclass(frozen=True)
class KernelPlan:
    """What :func:`race_dist.explain_plan` returns; printed, it is one paragraph.

    Attributes:
        backend: "triton", "chunked" (PyTorch) or "reference".
        family: "pipeline" (warp-specialized, Hopper), "chunk recurrence", "materialized states", "decode" (one token per
            row), "PyTorch chunks" or "all pairs".
        kernels: names of the GPU kernels, forward then backward, in their order; empty for PyTorch.
        reason: why nothing faster runs and what to change; None where this is the fastest.
    """

    backend: str
    family: str
    kernels: tuple[str, ...]
    reason: str | None

    def __str__(self) -> str:
        what = f'backend "{self.backend}", {self.family}'
        if self.kernels:
            what += f": {', '.join(self.kernels)}"
        why = "These are the fastest kernels" if self.reason is None else f"Nothing faster runs because {self.reason}"
        return f"{what}. {why}."


_said: set[str] = set()


def warn_slow(message: str) -> None:
    """Warn, once per process for each message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(f"{message}. race_dist.explain_plan(q, k, v, planes) tells more", SlowKernelWarning, stacklevel=2)
