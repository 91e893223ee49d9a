"""Shard order: which rows of a sequence a rank holds, and in which order. The one place that knows.

*contiguous*: rank r holds one run of rows. :func:`shard_sequence` gives the first ``T mod W`` of W ranks one row more;
shards cut by hand may have any lengths, 0 included.

*zigzag*: the sequence is cut into 2W equal slices and rank r holds slices r and 2W-1-r, in this order, so that every
rank has as many early rows as late ones. With ``cu_seqlens`` each document is cut so on its own, and a rank's rows
are, document after document, its two slices of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.collectives import gather_rows
from race_dist.distributed.communication import group_rank, group_size
from race_dist.distributed.consistency import all_gather_lengths, check_same_call
from race_dist.distributed.eager import eager

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
MAX_RANKS = 2**20


def check_layout(layout: str) -> Layout:
    """``layout``, or ValueError when there is no such layout (TypeError where it is no string)."""
    return checks.choice("layout", layout, LAYOUTS)


def shard_lengths(total: int, world: int) -> list[int]:
    """Rows of each rank under the contiguous layout: the first ``total mod world`` ranks have one more."""
    total, world = (
        checks.integer("total", total, minimum=0, maximum=2**62),
        checks.integer("world", world, minimum=1, maximum=MAX_RANKS),
    )
    base, rest = divmod(total, world)
    return [base + (rank < rest) for rank in range(world)]


def check_zigzag(total: int, world: int, cu_seqlens: Tensor | None = None) -> None:
    """Raise ValueError unless every document (or the sequence) divides into 2 * ``world`` slices.

    Document lengths are read only where ``cu_seqlens`` is on the CPU.
    """
    if total % (2 * world):
        raise ValueError(
            f"the zigzag layout cuts the sequence into 2 * {world} equal slices, but {total} rows do not "
            f"divide by {2 * world}: pad the sequence or use layout='contiguous'"
        )
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        uneven = (cu_seqlens.diff() % (2 * world)).nonzero()
        if len(uneven):
            document = int(uneven[0])
            length = int(cu_seqlens[document + 1] - cu_seqlens[document])
            raise ValueError(
                f"the zigzag layout cuts each document into 2 * {world} equal slices, but document "
                f"{document} has {length} rows, which do not divide by {2 * world}: pad it or use "
                "layout='contiguous'"
            )


@dataclass(frozen=True)
class Segments:
    """A rank's rows as runs of consecutive rows of one document (of the sequence, where nothing is packed).

    Contiguous: one run, or one a document (empty for documents that lie on other ranks). Zigzag: two runs, or two a
    document, the earlier slice first.

    Attributes:
        cu_seqlens: ``[M + 1]`` local row at which each run begins; the last entry is the rank's number of rows.
        documents: ``[M]`` the document each run belongs to.
        starts: ``[M]`` position within its document of each run's first row.
    """

    cu_seqlens: Tensor
    documents: Tensor
    starts: Tensor

    def positions(self, length: int) -> Tensor:
        """``[length]`` position of each of the rank's rows within its document."""
        row = torch.arange(length, device=self.cu_seqlens.device)
        run = torch.searchsorted(self.cu_seqlens[1:].contiguous(), row, right=True)
        return row - self.cu_seqlens[run] + self.starts[run]


def local_segments(
    length: int,
    rank: int,
    world: int,
    *,
    layout: Layout = "contiguous",
    cu_seqlens: Tensor | None = None,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Segments:
    """How ``length`` rows of ``rank`` fall into documents. No communication, no synchronisation with the device.

    Args:
        length: rows on this rank.
        rank, world: of the group.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]`` boundaries of the packed documents in the whole sequence, or None.
        offset: contiguous only: rows on earlier ranks (:func:`shard_offset`).
        device: of the result; that of ``cu_seqlens`` when it is given.
    """
    layout = check_layout(layout)
    if not torch.compiler.is_compiling():
        length = checks.integer("length", length, minimum=0, maximum=2**62)
        _check_rank(rank, world)
        if not isinstance(offset, Tensor):
            offset = checks.integer("offset", offset, minimum=0, maximum=2**62)
        elif offset.dim() != 0 or offset.is_floating_point():
            raise ValueError(f"offset must be an integer or a 0-dimensional int tensor; got {checks.short_repr(offset)}")
        checks.cu_seqlens(cu_seqlens)
        device = checks.device("device", device)
    if cu_seqlens is not None:
        cu = cu_seqlens.to(torch.int64)
    else:
        cu = torch.tensor([0, length * world if layout == "zigzag" else 2**62], device=device)
    documents = torch.arange(cu.numel() - 1, device=cu.device)
    if layout == "contiguous":
        return Segments((cu - offset).clamp(0, length), documents, (offset - cu[:-1]).clamp(min=0))
    slice_length = cu.diff() // (2 * world)
    first = cu[:-1] // world
    begins = torch.stack([first, first + slice_length], 1).flatten()
    starts = torch.stack([rank * slice_length, (2 * world - 1 - rank) * slice_length], 1).flatten()
    return Segments(torch.cat([begins, cu[-1:] // world]), documents.repeat_interleave(2), starts)


def shard_rows(
    total: int,
    rank: int,
    world: int,
    *,
    layout: Layout = "contiguous",
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[T_r]`` rows of the whole sequence that ``rank`` of ``world`` holds, in its order.

    Raises:
        ValueError: zigzag, and a document (or the sequence) does not divide by ``2 * world``.
    """
    layout, total = check_layout(layout), checks.integer("total", total, minimum=0, maximum=2**62)
    _check_rank(rank, world)
    checks.cu_seqlens(cu_seqlens, total)
    device = checks.device("device", device) if cu_seqlens is None else cu_seqlens.device
    if layout == "contiguous":
        lengths = shard_lengths(total, world)
        start = sum(lengths[:rank])
        return torch.arange(start, start + lengths[rank], device=device)
    check_zigzag(total, world, cu_seqlens)
    length = total // world
    runs = local_segments(length, rank, world, layout=layout, cu_seqlens=cu_seqlens, device=device)
    positions = runs.positions(length)
    if cu_seqlens is None:
        return positions
    row = torch.arange(length, device=device)
    run = torch.searchsorted(runs.cu_seqlens[1:].contiguous(), row, right=True)
    return positions + cu_seqlens.to(torch.int64)[runs.documents[run]]


def _check_rank(rank: int, world: int) -> None:
    checks.integer("world", world, minimum=1, maximum=MAX_RANKS)
    checks.integer("rank", rank, minimum=0, maximum=world - 1)


def shard_offset(length: int, group: ProcessGroup | None, device: torch.device | str | None = None) -> int | Tensor:
    """Rows on the ranks before this one, for contiguous shards of any lengths. Every rank of the group calls it.

    An int where the group talks over the CPU; on a CUDA ``device`` a 0-dimensional tensor, read without waiting for it.
    """
    length = checks.integer("length", length, minimum=0, maximum=2**62)
    if group_size(group) == 1:
        return 0
    assert group is not None
    lengths = all_gather_lengths(length, group, device, "shard_offset", {"layout": "contiguous"})
    before = lengths[: group_rank(group)].sum()
    return before if before.is_cuda else int(before)


@eager
def shard_positions(
    length: int,
    group: ProcessGroup | None,
    *,
    layout: str = "contiguous",
    cu_seqlens: Tensor | None = None,
    total: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``[length]`` int64 positions of this rank's rows in the whole sequence, restarting at each document.

    What a rotary embedding needs. Under the contiguous layout every rank of the group calls it (the ranks exchange
    their lengths), unless ``total`` is given.

    Args:
        length: rows on this rank.
        group: the sequence-parallel group; None is one rank.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]`` document boundaries in the whole sequence, or None.
        total: length of the whole sequence; says that contiguous shards are those of :func:`shard_sequence`.
        device: of the result; that of ``cu_seqlens`` when it is given.

    Raises:
        ValueError: no such layout, ``length`` is not what ``total`` gives this rank, or zigzag does not divide.
    """
    layout, length = check_layout(layout), checks.integer("length", length, minimum=0, maximum=2**62)
    rank, world = group_rank(group), group_size(group)
    total = None if total is None else checks.integer("total", total, minimum=0, maximum=2**62)
    checks.cu_seqlens(cu_seqlens, total if world > 1 else length)
    device = cu_seqlens.device if cu_seqlens is not None else checks.device("device", device)
    offset: int | Tensor = 0
    if layout == "zigzag":
        check_zigzag(length * world, world, cu_seqlens)
    elif total is None:
        offset = shard_offset(length, group, device)
    else:
        lengths = _expect_length(length, total, rank, world)
        offset = sum(lengths[:rank])
    return local_segments(length, rank, world, layout=layout, cu_seqlens=cu_seqlens, offset=offset, device=device).positions(
        length
    )


def _expect_length(length: int, total: int, rank: int, world: int) -> list[int]:
    lengths = shard_lengths(total, world)
    if lengths[rank] != length:
        raise ValueError(
            f"rank {rank} of {world} holds {lengths[rank]} of {total} rows under the contiguous layout, "
            f"but was given {length}; leave total out for shards of other lengths"
        )
    return lengths


def shard_sequence(
    x: Tensor, group: ProcessGroup | None, *, dim: int, layout: str = "contiguous", cu_seqlens: Tensor | None = None
) -> Tensor:
    """This rank's rows of a sequence that every rank holds. No communication.

    Differentiable: the gradient is this rank's share of x's, zero outside its rows; the shares add up over the ranks.

    Args:
        x: the whole sequence, ``T`` rows along ``dim``.
        group: the sequence-parallel group; None is one rank.
        dim: the sequence dimension.
        layout: "contiguous" (a view) or "zigzag".
        cu_seqlens: ``[N + 1]`` boundaries of packed documents, which zigzag cuts one by one.

    Raises:
        ValueError: no such layout, or zigzag and a document (or the sequence) does not divide by ``2 * W``.
    """
    layout, world, rank = check_layout(layout), group_size(group), group_rank(group)
    dim = _check_dim(x, dim)
    total = x.shape[dim]
    checks.cu_seqlens(cu_seqlens, total)
    if world == 1:
        return x
    if layout == "contiguous":
        lengths = shard_lengths(total, world)
        return x.narrow(dim, sum(lengths[:rank]), lengths[rank])
    if cu_seqlens is None:
        check_zigzag(total, world)
        size = total // (2 * world)
        return torch.cat([x.narrow(dim, rank * size, size), x.narrow(dim, (2 * world - 1 - rank) * size, size)], dim)
    rows = shard_rows(total, rank, world, layout=layout, cu_seqlens=cu_seqlens)
    return x.index_select(dim, rows.to(x.device))


def _check_dim(x: Tensor, dim: int) -> int:
    checks.tensor("x", x)
    dim = checks.integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim = {checks.short_repr(dim)} is no dimension of a tensor of shape {list(x.shape)}")
    return dim


@eager
def unshard_sequence(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    dim: int,
    layout: str = "contiguous",
    cu_seqlens: Tensor | None = None,
    total: int | None = None,
) -> Tensor:
    """The whole sequence on every rank, from the ranks' shards: the inverse of :func:`shard_sequence`.

    Differentiable: each rank's loss may read all of it, and the gradient of a shard is the sum over the ranks.

    Args:
        x: this rank's rows along ``dim``; contiguous shards may have any lengths, 0 included.
        group: the sequence-parallel group; None is one rank.
        dim: the sequence dimension.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]`` boundaries of packed documents, as given to :func:`shard_sequence`.
        total: length of the whole sequence; saves the exchange of lengths (and, on CUDA, waiting for it) when
            contiguous shards are those of :func:`shard_sequence`.

    Raises:
        ValueError: no such layout, ``total`` does not fit this rank's rows, zigzag does not divide, or the ranks' calls
            do not fit each other.
    """
    layout, world, rank = check_layout(layout), group_size(group), group_rank(group)
    dim = _check_dim(x, dim)
    length = x.shape[dim]
    total = None if total is None else checks.integer("total", total, minimum=0, maximum=2**62)
    checks.cu_seqlens(cu_seqlens, length if world == 1 else total)
    if world == 1:
        _expect_length(length, length if total is None else total, 0, 1)
        return x
    assert group is not None
    if total is not None and layout == "contiguous":
        _expect_length(length, total, rank, world)
    shape = [n for i, n in enumerate(x.shape) if i != dim % x.dim()]
    facts = {
        "layout": layout,
        "dim": dim % x.dim(),
        "other dimensions": shape,
        "dtype": x.dtype,
        "total": total,
        "requires_grad": torch.is_grad_enabled() and x.requires_grad,
    }
    exchanged = check_same_call(
        "unshard_sequence", facts, group, x.device, length=length, need_lengths=layout == "contiguous" and total is None
    )
    if layout == "zigzag":
        check_zigzag(length * world, world, cu_seqlens)
        lengths = [length] * world
    else:
        lengths = shard_lengths(total, world) if total is not None else cast(Tensor, exchanged).tolist()
    gathered = gather_rows(x.movedim(dim, 0), lengths, group)
    if layout == "zigzag":
        rows = torch.cat(
            [shard_rows(sum(lengths), r, world, layout=layout, cu_seqlens=cu_seqlens, device=x.device) for r in range(world)]
        )
        gathered = gathered.index_select(0, rows.argsort().to(x.device))
    return gathered.movedim(0, dim)
