"""The carries at the chunks' starts: written in the forward phase, read in reverse in the backward phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import pack, packed_size, unpack
from race_dist.models.backbone import Block, ModelCarry
from race_dist.models.language import LanguageModel
from race_dist.nn.race import RaceCarry

Keep = Literal["device", "host", "subtract"]
KEEPS = ("device", "host", "subtract")
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
        keep: "device", "host", or "subtract": on the device, without the sketches.
        like: any of the carries: they differ in their tensors' values alone.
        count: how many there will be at most.
    """

    def __init__(self, keep: Keep, like: ModelCarry, count: int) -> None:
        self._like, self._device = like, like.position.device
        self._kept = _kept(like, sketches=keep != "subtract")
        self._row = packed_size(self._of(like))
        self._rows = max(1, min(count, SLAB // max(1, self._row)))  # of a slab
        self._host = keep == "host" and self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._host else None
        self._slabs: list[Tensor] = []
        self._returning: tuple[int, Tensor] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, carry: ModelCarry) -> None:
        """Keep one more; ``carry`` itself may be freed."""
        self._push(pack([t.detach() for t in self._of(carry)]))

    def pop(self) -> ModelCarry:
        """The last one; sketches that are not kept are zero."""
        self._count -= 1
        row = self._fetch(self._count)
        if self._count % self._rows == 0:
            self._slabs.pop()
        tensors = iter(unpack(row, self._of(self._like)))
        every = zip(self._like.tensors(), self._kept, strict=True)
        return self._like.with_tensors(tuple(next(tensors) if kept else torch.zeros_like(t) for t, kept in every))

    def rows(self, first: int) -> Tensor | None:
        """``[count - first, bytes]`` on the CPU: those from ``first`` on, to be stored; None where there are none."""
        if first >= self._count:
            return None
        if self._stream is not None:
            self._stream.synchronize()
        begins = range(0, self._count, self._rows)  # of the slabs
        parts = [slab[max(0, first - begin) : self._count - begin] for slab, begin in zip(self._slabs, begins, strict=True)]
        return torch.cat([part.cpu() for part in parts if len(part)])

    def restore(self, rows: Tensor) -> None:
        """Put back what :meth:`rows` gave.

        Raises:
            ValueError: a row has another size.
        """
        if rows.shape[1:] != (self._row,):
            raise ValueError(
                f"the stored carries have {rows.shape[1]} bytes each, this step's {self._row}: they are of "
                "another model or batch"
            )
        for row in rows:
            self._push(row.to(self._device))

    def _of(self, carry: ModelCarry) -> list[Tensor]:
        """The tensors that are kept."""
        return [t for t, kept in zip(carry.tensors(), self._kept, strict=True) if kept]

    def _push(self, packed: Tensor) -> None:
        if self._count == self._rows * len(self._slabs):
            where = {"pin_memory": True} if self._host else {"device": self._device}
            self._slabs.append(torch.empty(self._rows, self._row, dtype=torch.uint8, **where))
        row = self._slot(self._count)
        self._count += 1
        if self._stream is None:
            row.copy_(packed)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            row.copy_(packed, non_blocking=True)
        packed.record_stream(self._stream)

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


def _kept(carry: ModelCarry, *, sketches: bool) -> list[bool]:
    """Of each of a carry's tensors, whether it is kept."""
    kept = []
    for layer in carry.layers:
        of_sketch = len(layer.sketch.tensors()) if isinstance(layer, RaceCarry) else 0
        kept += [sketches] * of_sketch + [True] * (len(layer.tensors()) - of_sketch)
    return [*kept, True]


@torch.no_grad()
def subtract(model: LanguageModel, ids: Tensor, after: ModelCarry, rest: ModelCarry, group: ProcessGroup | None) -> ModelCarry:
    """The carry at a chunk's start, from the one behind the chunk: without decay, sketches of disjoint tokens add.

    Layer by layer: what the chunk adds to a layer's sketch is known once the layers below are run from theirs.

    Args:
        ids: the chunk's tokens, this rank's.
        after: the carry behind the chunk, with float64 sketches.
        rest: the carry at its start, whose sketches are zero.
    """
    x, sequence = model.enter(ids, rest.position, group=group)
    layers = []
    for block, behind, at_start in zip(cast(Iterable[Block], model.blocks), after.layers, rest.layers, strict=True):
        start = at_start
        if isinstance(behind, RaceCarry) and isinstance(at_start, RaceCarry):
            added = cast(RaceCarry, block.mixer(block.mixer_norm(x), at_start, sequence)[1])
            pairs = zip(behind.sketch.tensors(), added.sketch.tensors(), strict=True)
            start = replace(at_start, sketch=behind.sketch.with_tensors(tuple(a - b for a, b in pairs)))
        layers.append(start)
        x = cast(Tensor, block(x, start, sequence)[0])
    return ModelCarry(tuple(layers), rest.position)
