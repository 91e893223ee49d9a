"""Sharding of a sequence for context parallelism: which rows a rank holds, and in which order.

*contiguous*: rank r holds one run of rows. :func:`shard_sequence` gives the first ``T mod W`` of W ranks one row more;
shards made otherwise may have any lengths, including 0.

*zigzag*: the sequence is split into 2W equal slices, and rank r holds slices r and 2W-1-r, in this order, so that every
rank has as many early rows as late ones. With ``cu_seqlens`` each document is split on its own; a rank's rows are its two
slices of the first document, then of the second, and so on.
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
    """``layout``; ValueError if it is unknown, TypeError if it is not a string."""
    return checks.choice("layout", layout, LAYOUTS)


def shard_lengths(total: int, world: int) -> list[int]:
    """The rows of each rank under the contiguous layout: the first ``total mod world`` ranks have one more."""
    total, world = (
        checks.integer("total", total, minimum=0, maximum=2**62),
        checks.integer("world", world, minimum=1, maximum=MAX_RANKS),
    )
    base, rest = divmod(total, world)
    return [base + (rank < rest) for rank in range(world)]


def check_zigzag(total: int, world: int, cu_seqlens: Tensor | None = None) -> None:
    """Raise ValueError unless every document (or the sequence) divides into 2 * ``world`` slices.

    The lengths of documents are checked only if ``cu_seqlens`` is on the CPU.
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
    """A rank's rows as runs of consecutive rows of one document (of the sequence, without packed documents).

    Contiguous: one run, or one per document (empty for documents on other ranks). Zigzag: two runs, or two per document, the
    earlier slice first.

    Attributes:
        cu_seqlens: ``[M + 1]``: the local row at which each run begins; the last entry is the rank's number of rows.
        documents: ``[M]``: the document of each run.
        starts: ``[M]``: the position in its document of each run's first row.
    """

    cu_seqlens: Tensor
    documents: Tensor
    starts: Tensor

    def positions(self, length: int) -> Tensor:
        """``[length]``: the position of each of the rank's rows in its document."""
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
    """The runs of the ``length`` rows of ``rank``. It needs no communication and does not wait for the device.

    Args:
        length: rows on this rank.
        rank, world: of the group.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]``: the boundaries of packed documents in the whole sequence, or None.
        offset: contiguous only: the number of rows on earlier ranks (:func:`shard_offset`).
        device: of the result; the device of ``cu_seqlens`` if that is given.
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
    """``[T_r]``: the rows of the whole sequence that ``rank`` of ``world`` holds, in its order.

    Raises:
        ValueError: under zigzag a document (or the sequence) does not divide by ``2 * world``.
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
    """The number of rows on the ranks before this one, for contiguous shards. Every rank of the group must call it.

    It is an int if the group communicates on the CPU; on a CUDA ``device`` it is a 0-dimensional tensor, so that nothing waits.
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
    """``[length]`` int64: the positions of this rank's rows in the whole sequence, restarting at each document.

    Rotary embeddings need them. Under the contiguous layout every rank of the group must call it (the ranks exchange their
    lengths), unless ``total`` is given.

    Args:
        length: rows on this rank.
        group: the context-parallel group; None is one rank.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]``: the boundaries of documents in the whole sequence, or None.
        total: the length of the whole sequence, if contiguous shards are those of :func:`shard_sequence`.
        device: of the result; the device of ``cu_seqlens`` if that is given.

    Raises:
        ValueError: the layout is unknown, ``length`` is not this rank's share of ``total``, or zigzag does not divide.
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
    """This rank's rows of a sequence that every rank holds. It needs no communication.

    It is differentiable: the gradient of x is this rank's share, zero outside its rows; the shares add up over the ranks.

    Args:
        x: the whole sequence, ``T`` rows along ``dim``.
        group: the context-parallel group; None is one rank.
        dim: the sequence dimension.
        layout: "contiguous" (a view) or "zigzag".
        cu_seqlens: ``[N + 1]``: the boundaries of packed documents, each of which zigzag splits on its own.

    Raises:
        ValueError: the layout is unknown, or under zigzag a document (or the sequence) does not divide by ``2 * W``.
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
    """The whole sequence on every rank, gathered from the shards: the inverse of :func:`shard_sequence`.

    It is differentiable: the loss of every rank may read all rows, and the gradient of a shard is the sum over the ranks.

    Args:
        x: this rank's rows along ``dim``; contiguous shards may have any lengths, including 0.
        group: the context-parallel group; None is one rank.
        dim: the sequence dimension.
        layout: "contiguous" or "zigzag".
        cu_seqlens: ``[N + 1]``: the boundaries of packed documents, as given to :func:`shard_sequence`.
        total: the length of the whole sequence; it saves the exchange of lengths (and, on CUDA, waiting for it) if
            contiguous shards are those of :func:`shard_sequence`.

    Raises:
        ValueError: the layout is unknown, ``total`` does not fit this rank's rows, zigzag does not divide, or the calls of
            the ranks differ.
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
