"""Positions, packed documents, padding and shards: the position of a call's tokens in their sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.nn.context_parallel import exchange_carries
from race_dist.nn.padding import Compaction, TokenCount, real_positions
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
from race_dist.parallel.sharding import check_layout, check_zigzag


class Span(NamedTuple):
    """Consecutive tokens of the sequence that this rank holds.

    Attributes:
        first: the span's first row on this rank.
        length: rows.
        start: index of the first row in the sequence; in its document where ``document`` is set.
        document: the document that the span lies in, where each document is sharded on its own (zigzag); otherwise None.
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
    """The position of a call's rows in their sequence, for a mixing layer. :meth:`of` makes it.

    The sequence of a call continues what its incoming carry has seen. ``cu_seqlens`` splits it into documents: the first
    document continues the carry (it is empty if that document had ended), and the last one stays open in the outgoing carry (it
    is empty if another document begins next). Under a group each rank holds a shard; carries are those of the whole sequence
    and the same on every rank.

    Where ``key_mask`` is False the row is absent: every other row gets what it would get in the sequence without that row.
    Positions count real rows only. The output of a False row is finite and has no gradient.

    Attributes:
        positions: ``[T]`` or ``[B, T]`` int64: the position of each local row in its document.
        cu_seqlens: ``[N + 1]`` int64 document boundaries in the whole sequence (masked rows included), or None.
        key_mask: ``[B, T]`` bool of the local rows, False where a row is padding, or None. Give it to :meth:`of` and do not
            replace it: other fields are computed from it.
        group: the ranks that share the sequence; None is one rank.
        layout: which rows of it this rank holds, "contiguous" or "zigzag".
        offset: rows on earlier ranks (contiguous).
        return_carry: whether layers compute the outgoing carry; otherwise they return None in its place.
        rotations: cosines and sines of the rotary angles by (head_dim, base, dtype), where they are computed already.
        compactions: with a key_mask, the order of each span's real rows; otherwise None.
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
            position: of the first row of the whole sequence in its document: the number of real tokens of this document that
                the carry has seen. An int, a 0-dimensional tensor, or ``[B]``.
            return_carry: whether layers compute the outgoing carry.
            device: of the rows.

        Raises:
            ValueError: the layout is unknown, a zigzag sequence does not divide, or a shape does not fit.
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
            checks.cu_seqlens(cu_seqlens, length * world if world == 1 or layout == "zigzag" else None)
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
        """This sequence with a mask ``[B, T]``; ``position``, ``[]`` or ``[B]``, is that of its first real token."""
        spans = self.spans()
        begins, documents = [self.last_document_start(span) for span in spans], [self.documents(span, 0) for span in spans]
        real = [span.of(key_mask) for span in spans]
        own = [TokenCount.of(*piece) for piece in zip(real, begins, strict=True)]
        before = TokenCount(position.expand(key_mask.shape[0]), torch.zeros_like(own[0].reset))
        initial, after = exchange_carries(own, before, self.group, self.layout, return_carry=self.return_carry)
        positions = [
            real_positions(mask, count.count, self._starts(span, document))
            for mask, count, span, document in zip(real, initial, spans, documents, strict=True)
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
        """``[length]``: the row of the span at which each row's document begins; negative where the document began before the
        span. None: all began before."""
        if documents is None or self.cu_seqlens is None:
            return None
        return torch.where(documents == 0, -1, self.cu_seqlens[documents] - span.start)

    @classmethod
    def of_one_document(cls, x: Tensor, carry: object, rope_base: float | None) -> Sequence:
        """The sequence of a layer that is called by itself with ``x [B, T, dim]``: one rank, one document, no padding.

        Raises:
            ValueError: there is a carry and the layer has rotary positions, so that it matters where the carry ends.
        """
        if carry is not None and rope_base is not None:
            raise ValueError(
                "a layer with rotary positions that continues a carry needs the position of its tokens: give "
                "sequence=Sequence.of(T, position=tokens seen so far)"
            )
        return cls.of(x.shape[1], device=x.device)

    @property
    def length(self) -> int:
        """The number of rows on this rank."""
        return self.positions.shape[-1]

    @property
    def boundaries(self) -> Tensor | None:
        """``[N - 1]``: where in the whole sequence the documents after the first begin; None without ``cu_seqlens``."""
        return None if self.cu_seqlens is None else self.cu_seqlens[1:-1].clone()

    @property
    def num_documents(self) -> int:
        """``N``; 1 without ``cu_seqlens``."""
        return 1 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def rows(self) -> Tensor:
        """``[T]`` int64: the index in the whole sequence of each row of this rank."""
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

    def mask_padding(self, x: Tensor) -> Tensor:
        """``x [B, T, dim]`` with padding rows set to 0, so that values there (even NaN) have no effect."""
        return x if self.key_mask is None else torch.where(self.key_mask[..., None], x, 0)

    def gather(self, x: Tensor) -> Tensor:
        """The whole sequence ``[B, total, ...]``, gathered from every rank's shard ``x [B, T, ...]``; differentiable."""
        if self.group is None:
            return x
        return unshard_sequence(x, self.group, dim=1, layout=self.layout, cu_seqlens=self.cu_seqlens)

    def spans(self) -> list[Span]:
        """This rank's rows as runs of consecutive tokens: one (contiguous), two (zigzag), or two per document."""
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
        """``[before + length]``: the document of each token of a span and of ``before`` tokens carried into it; None if all are
        in one document."""
        boundaries = self.boundaries
        if boundaries is None or span.document is not None:
            return None
        index = span.start + torch.arange(span.length, device=boundaries.device)
        carried = (boundaries < span.start).sum().expand(before)
        return torch.cat([carried, torch.searchsorted(boundaries, index, right=True)])

    def last_document_start(self, span: Span) -> Tensor | None:
        """The row of a span at which its last document begins (negative: before the span); None if the span has no boundary."""
        boundaries = self.boundaries
        if self.cu_seqlens is None or boundaries is None or span.document is not None or boundaries.numel() == 0:
            return None
        stop = span.start + span.length
        seen = (boundaries < stop) | ((boundaries == stop) & (stop == self.cu_seqlens[-1]))
        return torch.where(seen, boundaries - span.start, -1).amax(dim=0)

    def document_starts(self, span: Span) -> Tensor | None:
        """``[length]`` bool: the tokens of a span at which a document begins (not the sequence's first, which continues the
        carry); None where the span has no boundary."""
        documents = self.documents(span, 1)
        return None if documents is None else documents[1:] != documents[:-1]

    def document_begins_after(self, span: Span) -> Tensor | None:
        """Whether the open document of the sequence begins right after a span and has no tokens yet: 0-dimensional bool, or
        None where the span has no boundary."""
        begin = self.last_document_start(span)
        return None if begin is None else begin == span.length

    def end_position(self, position: Tensor | None = None) -> Tensor:
        """The position of the token after the whole sequence, in the document that is open then.

        Under a group with contiguous shards and no documents, every rank must call it.

        Args:
            position: of the first token, as given to :meth:`of`.

        Returns:
            int64, 0-dimensional; ``[B]`` with a key_mask or if ``position`` is ``[B]``.
        """
        if self.key_mask is not None:
            assert self.end is not None, "the sequence was made with return_carry=False"
            return self.end
        if self.cu_seqlens is not None:
            end = self.cu_seqlens[-1] - self.cu_seqlens[-2]
        else:
            # torch.full on the device: a copy from the host would wait for all work queued there
            end = torch.full((), self.length, dtype=torch.int64, device=self.positions.device)
            end = all_reduce_sum(end, self.group)
        return end if position is None or self.num_documents > 1 else position + end

    def with_rotations(self, kinds: Iterable[tuple[int, float]], dtype: torch.dtype) -> Sequence:
        """This sequence with the rotary angles of each (head_dim, base) computed, so that layers share them."""
        known = {(head_dim, base, dtype): self.rotation(head_dim, base, dtype) for head_dim, base in kinds}
        return replace(self, rotations=known)

    def rotation(self, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles of the rows, each ``[T, D/2]`` or ``[B, T, D/2]``."""
        known = self.rotations.get((head_dim, base, dtype))
        return rotation(self.positions, head_dim, base, dtype) if known is None else known


def _check_mask(key_mask: Tensor, length: int) -> None:
    """Raise unless it is bool ``[B, length]``."""
    checks.tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool or key_mask.dim() != 2 or key_mask.shape[1] != length:
        raise ValueError(f"key_mask must be bool [B, {length}]; got {key_mask.dtype} {list(key_mask.shape)}")
