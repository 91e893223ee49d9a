"""Parameter gradients of one step, added up over its chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.parallel import all_reduce_sum


class Gradients:
    """Added up over chunks in at least float32.

    Entering sets aside what stands in ``.grad``; an exception puts it back as it was.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._held: list[Tensor | None] = []
        self._wide: dict[int, Tensor] = {}

    def __enter__(self) -> Gradients:
        self._held = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for p, held in zip(self._parameters, self._held):
                p.grad = held

    def collect(self) -> None:
        """Take the chunk's gradients of narrow parameters away; wide ones add up where they are."""
        for i, p in enumerate(self._parameters):
            if p.grad is None or p.dtype in (torch.float32, torch.float64):
                continue
            self._wide[i] = self._wide[i].add_(p.grad) if i in self._wide else p.grad.float()
            p.grad = None

    def finish(self, group: ProcessGroup | None) -> None:
        """Sum over the ranks and add to what stood in ``.grad`` before."""
        for i, (p, held) in enumerate(zip(self._parameters, self._held)):
            fresh = self._wide.pop(i, p.grad)
            fresh = torch.zeros_like(p) if fresh is None else fresh
            if group is not None:
                fresh = all_reduce_sum(fresh, group)
            p.grad = (fresh if held is None else fresh + held).to(p.dtype)
