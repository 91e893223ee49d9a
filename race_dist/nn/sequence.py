"""Where the tokens of a call stand: positions, documents, masks, and the ranks that hold the rest of the sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.nn.pieces import Compaction, TokenCount, across_ranks, real_positions
from race_dist.nn.rope import rotation
from race_dist.parallel import (
    Layout,
    all_reduce_sum,
    group_rank,
    group_size,
    local_segments,
    shard_offset,
    shard_rows,
    unshard_sequence,
)
from race_dist.parallel.sharding import check_cu_seqlens, check_layout, check_zigzag


class Span(NamedTuple):
    """Consecutive tokens of the call's sequence that this rank holds.

    ``first`` local row, ``length`` rows, ``start``: index of the first in the sequence (in its document, where
    ``document`` says which one the span lies in).
    """

    first: int
    length: int
    start: int | Tensor
    document: int | None = None

    def of(self, x: Tensor) -> Tensor:
        """The span's rows of ``x [B, T, ...]``."""
        return x.narrow(1, self.first, self.length)


@dataclass(frozen=True)
class Sequence:
    """What a mixing layer is told about the rows it is given; made by :meth:`of`.

    A call's sequence continues what its incoming carry has seen. With ``cu_seqlens`` it is cut into documents: the
    first one continues the carry (it is empty if that document ended before), the last one stays open in the outgoing
    carry (it is empty if another document begins next). Under a group each rank holds a shard, and carries are those of
    the whole sequence, the same on every rank.

    With ``key_mask`` a False row is absent: every other row gets what it would get in the sequence without it. Positions count
    real rows only; what a False row gets is finite and has no gradient.

    Attributes:
        positions: ``[T]`` or ``[B, T]`` int64: position of each local row in its document.
        cu_seqlens: ``[N + 1]`` int64 document boundaries in the whole sequence (masked rows included), or None.
        key_mask: ``[B, T]`` bool of the local rows, False where a row is padding, or None. It is given to :meth:`of`, never
            replaced: other fields follow from it.
        group: the ranks that share the sequence; None is one rank.
        layout: which rows of it this rank holds, "contiguous" or "zigzag".
        offset: rows on earlier ranks (contiguous).
        return_carry: whether the outgoing carry is wanted; without it layers return None in its place and save the work.
        rotations: cosines and sines by (head_dim, base, dtype), where they are known already.
        compactions: with a key_mask, where each span's real rows go; None without.
        end: with a key_mask and ``return_carry``, ``[B]`` int64: the position after the whole sequence.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    key_mask: Tensor | None = None
    group: ProcessGroup | None = None
    layout: Layout = "contiguous"
    offset: int | Tensor = 0
    return_carry: bool = True
    rotations: Mapping[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    compactions: tuple[Compaction, ...] | None = None
    end: Tensor | None = None

    def __post_init__(self) -> None:
        if self.key_mask is not None and self.compactions is None:
            raise ValueError("a Sequence gets its key_mask from Sequence.of(length, key_mask=...), which counts its real rows")

    @classmethod
    def of(
        cls,
        length: int,
        *,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
        position: Tensor | int = 0,
        return_carry: bool = True,
        device: torch.device | str | None = None,
    ) -> Sequence:
        """The sequence of a call.

        Args:
            length: rows on this rank.
            cu_seqlens: ``[N + 1]`` int, boundaries of packed documents in the whole sequence.
            key_mask: ``[B, length]`` bool, False where a row is padding; under a group every rank gives one or none does.
            group, layout: as above; every rank of the group calls this.
            position: of the first row (of the whole sequence) in its document: what the carry has seen of it (of real
                tokens). An int, a 0-dimensional tensor, or ``[B]``.
            return_carry: whether carries are wanted.
            device: of the rows.

        Raises:
            ValueError: no such layout, a zigzag sequence does not divide, or a shape does not fit.
        """
        layout, length = check_layout(layout), checks.integer("length", length, minimum=0)
        checks.flag("return_carry", return_carry)
        if key_mask is not None:
            _check_mask(key_mask, length)
        if not torch.compiler.is_compiling():
            device = checks.device("device", device)
        if isinstance(position, Tensor):
            checks.tensor("position", position, dtypes=checks.INTEGERS)
        else:
            position = checks.integer("position", position, minimum=-(2**62), maximum=2**62)
        world, rank = group_size(group), group_rank(group)
        if world == 1:
            group = None
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, length * world if world == 1 or layout == "zigzag" else None)
            cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int64)
        if layout == "zigzag":
            check_zigzag(length * world, world, cu_seqlens)
        offset = shard_offset(length, group, device) if layout == "contiguous" else 0
        position = torch.as_tensor(position, dtype=torch.int64, device=device)[..., None]  # [1] or [B, 1]
        if key_mask is not None:
            unmasked = cls(torch.arange(length, device=device), cu_seqlens, None, group, layout, offset, return_carry)
            return unmasked._masked(key_mask, position[..., 0])
        positions = torch.arange(length, device=device)
        if cu_seqlens is None and layout == "contiguous":
            positions = positions + offset
        else:
            runs = local_segments(length, rank, world, layout=layout, cu_seqlens=cu_seqlens, offset=offset, device=device)
            run = torch.searchsorted(runs.cu_seqlens[1:].clone(), positions, right=True)
            positions = positions - runs.cu_seqlens[run] + runs.starts[run]
            position = torch.where(runs.documents[run] == 0, position, 0)
        return cls(positions + position, cu_seqlens, None, group, layout, offset, return_carry)

    def _masked(self, key_mask: Tensor, position: Tensor) -> Sequence:
        """This sequence with a mask ``[B, T]``. ``position``: of its first real token, ``[]`` or ``[B]``."""
        spans = self.spans()
        begins, documents = [self.begin(span) for span in spans], [self.documents(span, 0) for span in spans]
        real = [span.of(key_mask) for span in spans]
        own = [TokenCount.of(*piece) for piece in zip(real, begins, strict=True)]
        before = TokenCount(position.expand(key_mask.shape[0]), torch.zeros_like(own[0].reset))
        entering, after = across_ranks(own, before, self.group, self.layout, return_carry=self.return_carry)
        positions = [
            real_positions(mask, count.count, self._starts(span, document))
            for mask, count, span, document in zip(real, entering, spans, documents, strict=True)
        ]
        compactions = tuple(Compaction.of(*piece) for piece in zip(real, begins, documents, strict=True))
        return replace(
            self,
            positions=torch.cat(positions, 1),
            key_mask=key_mask,
            compactions=compactions,
            end=None if after is None else after.count,
        )

    def _starts(self, span: Span, documents: Tensor | None) -> Tensor | None:
        """``[length]``: row of the span at which each row's document begins; negative where it goes on from before the span,
        as the sequence's first does from the carry. None: all do."""
        if documents is None or self.cu_seqlens is None:
            return None
        return torch.where(documents == 0, -1, self.cu_seqlens[documents] - span.start)

    @classmethod
    def alone(cls, x: Tensor, carry: object, rope_base: float | None) -> Sequence:
        """The sequence of a layer that is told nothing: ``x [B, T, dim]``, on one rank, unmasked, of one document.

        Raises:
            ValueError: there is a carry and the layer has rotary positions, so that it matters where the carry ends.
        """
        if carry is not None and rope_base is not None:
            raise ValueError(
                "a layer with rotary positions that continues a carry must be told where it stands: give "
                "sequence=Sequence.of(T, position=tokens seen so far)"
            )
        return cls.of(x.shape[1], device=x.device)

    @property
    def length(self) -> int:
        """Rows on this rank."""
        return self.positions.shape[-1]

    @property
    def boundaries(self) -> Tensor | None:
        """``[N - 1]`` where in the whole sequence documents begin, but for the first; None if nothing is packed."""
        return None if self.cu_seqlens is None else self.cu_seqlens[1:-1].clone()

    @property
    def num_documents(self) -> int:
        """``N``; 1 if nothing is packed."""
        return 1 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def rows(self) -> Tensor:
        """``[T]`` int64: which rows of the whole sequence this rank holds, in its order."""
        arange = torch.arange(self.length, device=self.positions.device)
        if self.layout == "contiguous":
            return self.offset + arange
        world = group_size(self.group)
        return shard_rows(
            self.length * world,
            group_rank(self.group),
            world,
            layout=self.layout,
            cu_seqlens=self.cu_seqlens,
            device=arange.device,
        )

    def real(self, x: Tensor) -> Tensor:
        """``x [B, T, dim]`` with 0 where a row is padding: whatever stands there, NaN too, then changes nothing."""
        return x if self.key_mask is None else torch.where(self.key_mask[..., None], x, 0)

    def gather(self, x: Tensor) -> Tensor:
        """The whole sequence ``[B, total, ...]`` of which every rank holds ``x [B, T, ...]``; differentiable."""
        if self.group is None:
            return x
        return unshard_sequence(x, self.group, dim=1, layout=self.layout, cu_seqlens=self.cu_seqlens)

    def spans(self) -> list[Span]:
        """This rank's rows as runs of consecutive tokens: one (contiguous), two (zigzag), or two a document."""
        world, rank = group_size(self.group), group_rank(self.group)
        if self.layout == "contiguous" or world == 1:
            return [Span(0, self.length, self.offset)]
        if self.cu_seqlens is None:
            half = self.length // 2
            return [Span(0, half, rank * half), Span(half, half, (2 * world - 1 - rank) * half)]
        runs = local_segments(self.length, rank, world, layout=self.layout, cu_seqlens=self.cu_seqlens)
        first = runs.cu_seqlens.tolist()
        return [
            Span(a, b - a, start, document)
            for a, b, start, document in zip(first[:-1], first[1:], runs.starts.tolist(), runs.documents.tolist(), strict=True)
        ]

    def documents(self, span: Span, before: int) -> Tensor | None:
        """``[before + length]``: document of each token of a span and of ``before`` tokens carried into it.

        None where all are of one.
        """
        boundaries = self.boundaries
        if boundaries is None or span.document is not None:
            return None
        index = span.start + torch.arange(span.length, device=boundaries.device)
        entering = (boundaries < span.start).sum().expand(before)
        return torch.cat([entering, torch.searchsorted(boundaries, index, right=True)])

    def begin(self, span: Span) -> Tensor | None:
        """Row of a span at which its last document begins (negative: before the span), or None."""
        boundaries = self.boundaries
        if self.cu_seqlens is None or boundaries is None or span.document is not None or boundaries.numel() == 0:
            return None
        stop = span.start + span.length
        seen = (boundaries < stop) | ((boundaries == stop) & (stop == self.cu_seqlens[-1]))
        return torch.where(seen, boundaries - span.start, -1).amax(dim=0)

    def end_position(self, position: Tensor | None = None) -> Tensor:
        """Position of the token after the whole sequence, in the document that is open then: int64, 0-dimensional, or ``[B]``
        where there is a key_mask or ``position`` is.

        ``position``: that of the first token, as given to :meth:`of`. Under a contiguous group without documents, every rank
        calls this.
        """
        if self.key_mask is not None:
            assert self.end is not None, "the sequence was made with return_carry=False"
            return self.end
        if self.cu_seqlens is not None:
            end = self.cu_seqlens[-1] - self.cu_seqlens[-2]
        else:
            # filled there: a copy from the host would wait for all that the device has queued
            end = torch.full((), self.length, dtype=torch.int64, device=self.positions.device)
            end = all_reduce_sum(end, self.group)
        return end if position is None or self.num_documents > 1 else position + end

    def with_rotations(self, kinds: Iterable[tuple[int, float]], dtype: torch.dtype) -> Sequence:
        """This sequence with the rotary angles of each (head_dim, base) at hand, so that layers share them."""
        known = {(head_dim, base, dtype): self.rotation(head_dim, base, dtype) for head_dim, base in kinds}
        return replace(self, rotations=known)

    def rotation(self, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows' rotary angles, ``[T, D/2]`` or ``[B, T, D/2]`` each."""
        known = self.rotations.get((head_dim, base, dtype))
        return rotation(self.positions, head_dim, base, dtype) if known is None else known


def _check_mask(key_mask: Tensor, length: int) -> None:
    """Raise unless it is bool ``[B, length]``."""
    checks.tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[1] != length:
        raise ValueError(f"key_mask must be bool [B, {length}]; got {key_mask.dtype} {list(key_mask.shape)}")
