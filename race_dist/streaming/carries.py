"""The carries at the chunks' starts: written in the forward phase, read in reverse in the backward phase."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from race_dist.models.backbone import ModelCarry
from race_dist.parallel.comm import pack, packed_size, unpack

Keep = Literal["device", "host"]
SLAB = 2**28  # bytes of carries that are allocated at a time


def as_leaves(carry: ModelCarry) -> tuple[ModelCarry, list[Tensor | None]]:
    """A carry as leaves of a new graph; and of its tensors, those that can have a gradient (None elsewhere)."""
    tensors = tuple(t.detach().contiguous() for t in carry.tensors())
    leaves = [t.requires_grad_() if t.is_floating_point() else None for t in tensors]
    return carry.with_tensors(tensors), leaves


class Carries:
    """A stack of carries, each one row of bytes in a slab on the device or in pinned memory of the host.

    On a CUDA device carries go to the host, and come back one chunk early, on a stream of their own beside the work.

    Args:
        keep: "device" or "host".
        like: any of the carries: they differ in their tensors' values alone.
        count: how many there will be at most.
    """

    def __init__(self, keep: Keep, like: ModelCarry, count: int) -> None:
        if keep not in ("device", "host"):
            raise ValueError(f'keep must be "device" or "host"; got {keep!r}')
        self._like, self._device = like, like.position.device
        self._row = packed_size(like.tensors())
        self._rows = max(1, min(count, SLAB // max(1, self._row)))  # of a slab
        self._host = keep == "host" and self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._host else None
        self._slabs: list[Tensor] = []
        self._returning: tuple[int, Tensor] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Of all carries that wait."""
        return self._count * self._row

    def push(self, carry: ModelCarry) -> None:
        """Keep one more; ``carry`` itself may be freed."""
        packed = pack([t.detach() for t in carry.tensors()])
        if self._count == self._rows * len(self._slabs):
            place = {"pin_memory": True} if self._host else {"device": self._device}
            self._slabs.append(torch.empty(self._rows, self._row, dtype=torch.uint8, **place))
        row = self._slot(self._count)
        self._count += 1
        if self._stream is None:
            row.copy_(packed)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            row.copy_(packed, non_blocking=True)
        packed.record_stream(self._stream)

    def pop(self) -> tuple[ModelCarry, list[Tensor | None]]:
        """The last one as leaves of a new graph; and of its tensors, those that can have a gradient (None elsewhere)."""
        self._count -= 1
        row = self._fetch(self._count)
        if self._count % self._rows == 0:
            self._slabs.pop()
        return as_leaves(self._like.with_tensors(unpack(row, self._like.tensors())))

    def _slot(self, index: int) -> Tensor:
        return self._slabs[index // self._rows][index % self._rows]

    def _fetch(self, index: int) -> Tensor:
        """A row on the device; the one before it starts on its way."""
        if self._stream is None:
            return self._slot(index)
        returning = self._returning or (-1, None)
        row = returning[1] if returning[0] == index else self._return(index)
        assert row is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        row.record_stream(current)
        self._returning = (index - 1, self._return(index - 1)) if index else None
        return row

    def _return(self, index: int) -> Tensor:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            return self._slot(index).to(self._device, non_blocking=True)
