"""The carries at the starts of chunks: pushed in the forward phase, popped in reverse order in the backward phase."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import pack, packed_size, unpack
from race_dist.models.backbone import Block, ModelCarry
from race_dist.models.language import LanguageModel
from race_dist.nn import LayerCarry

Keep = Literal["device", "host", "subtract"]
KEEPS = ("device", "host", "subtract")
SLAB_BYTES = 2**28  # allocated at a time


def carry_leaves(carry: ModelCarry) -> tuple[ModelCarry, list[Tensor | None]]:
    """The carry with its tensors as leaves of a new autograd graph, and the leaves that can have a gradient (else None)."""
    tensors = tuple(t.detach().contiguous() for t in carry.tensors())
    leaves = [t.requires_grad_() if t.is_floating_point() else None for t in tensors]
    return carry.with_tensors(tensors), leaves


class CarryStack:
    """A stack of carries. Each is one row of bytes in a slab, on the device or in pinned host memory.

    On a CUDA device carries are copied to the host on a side stream, and prefetched one chunk early, beside the computation.

    Args:
        keep: "device", "host", or "subtract": on the device, without tensors that can be recovered by subtraction.
        like: any of the carries; they differ only in values.
        count: the largest number of carries.
    """

    def __init__(self, keep: Keep, like: ModelCarry, count: int) -> None:
        self._like, self._device = like, like.position.device
        self._kept = _kept(like, additive=keep != "subtract")
        self._row = packed_size(self._stored(like))
        self._rows = max(1, min(count, SLAB_BYTES // max(1, self._row)))  # per slab
        self._host = keep == "host" and self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._host else None
        self._slabs: list[Tensor] = []
        self._prefetched: tuple[int, Tensor] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, carry: ModelCarry) -> None:
        """Store one more; ``carry`` itself may be freed."""
        self._push(pack([t.detach() for t in self._stored(carry)]))

    def pop(self) -> ModelCarry:
        """Remove and return the last one; tensors that are not stored are zero."""
        self._count -= 1
        row = self._fetch(self._count)
        if self._count % self._rows == 0:
            self._slabs.pop()
        tensors = iter(unpack(row, self._stored(self._like)))
        every = zip(self._like.tensors(), self._kept, strict=True)
        return self._like.with_tensors(tuple(next(tensors) if kept else torch.zeros_like(t) for t, kept in every))

    def rows(self, first: int) -> Tensor | None:
        """``[count - first, bytes]`` on the CPU: the carries from ``first`` on, for a checkpoint; None if there are none."""
        if first >= self._count:
            return None
        if self._stream is not None:
            self._stream.synchronize()
        begins = range(0, self._count, self._rows)  # of the slabs
        parts = [slab[max(0, first - begin) : self._count - begin] for slab, begin in zip(self._slabs, begins, strict=True)]
        return torch.cat([part.cpu() for part in parts if len(part)])

    def restore(self, rows: Tensor) -> None:
        """Push the carries that :meth:`rows` returned.

        Raises:
            ValueError: a row has another size.
        """
        if rows.shape[1:] != (self._row,):
            raise ValueError(
                f"the stored carries have {rows.shape[1]} bytes each, this step's {self._row}: they belong to "
                "another model or batch"
            )
        for row in rows:
            self._push(row.to(self._device))

    def _stored(self, carry: ModelCarry) -> list[Tensor]:
        """The tensors of a carry that are stored."""
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
        """A row on the device; prefetches the row before it."""
        if self._stream is None:
            return self._slot(index)
        prefetched = self._prefetched or (-1, None)
        row = prefetched[1] if prefetched[0] == index else self._copy_back(index)
        assert row is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        row.record_stream(current)
        self._prefetched = (index - 1, self._copy_back(index - 1)) if index else None
        return row

    def _copy_back(self, index: int) -> Tensor:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            return self._slot(index).to(self._device, non_blocking=True)


def _kept(carry: ModelCarry, *, additive: bool) -> list[bool]:
    """For each tensor of a carry, whether it is stored; ``additive``: also those that can be recovered by subtraction."""
    kept = [additive or not adds for layer in carry.layers for adds in layer.additive()]
    return [*kept, True]


@torch.no_grad()
def subtract(
    model: LanguageModel, ids: Tensor, after: ModelCarry, stored: ModelCarry, group: ProcessGroup | None
) -> ModelCarry:
    """The carry at a chunk's start, recovered from the carry after the chunk: without decay, sketches of disjoint tokens add.

    Layer by layer: what the chunk adds to a layer's carry is known once the layers below have run from theirs.

    Args:
        ids: the chunk's tokens, this rank's.
        after: the carry after the chunk, with float64 sketches.
        stored: the carry at the chunk's start, in which tensors that add are zero.
    """
    x, sequence = model.embed_inputs(ids, stored.position, group=group)
    layers: list[LayerCarry] = []
    for block, behind, at_start in zip(cast(Iterable[Block], model.blocks), after.layers, stored.layers, strict=True):
        start = at_start
        if any(behind.additive()):
            added = cast(LayerCarry, block.mixer(block.mixer_norm(x), at_start, sequence)[1])
            columns = zip(behind.additive(), behind.tensors(), added.tensors(), at_start.tensors(), strict=True)
            start = at_start.with_tensors(tuple(b - a if adds else s for adds, b, a, s in columns))
        layers.append(start)
        x = cast(Tensor, block(x, start, sequence)[0])
    return ModelCarry(tuple(layers), stored.position)
