"""The last tokens of a piece of sequence (its halo): the carry of every layer that looks back a fixed distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.context_parallel import exchange_carries
from race_dist.nn.mixing_layer import LayerCarry
from race_dist.nn.padding import Compaction
from race_dist.nn.sequence import Sequence, Span
from race_dist.parallel import group_rank


@dataclass(frozen=True)
class TailCarry(LayerCarry):
    """The last ``n`` tokens of some tensors, right-aligned: the inputs of a convolution, the keys and values of a window.

    Attributes:
        tails: tensors ``[B, n, ...]``; the last ``count`` slots hold tokens, the others zeros.
        count: ``[B]`` int64: the number of slots with tokens of the document that is open at the piece's end.
        reset: ``[B]`` bool: whether a document began inside the piece, so that no token before the piece is visible after it.
    """

    tails: tuple[Tensor, ...]
    count: Tensor
    reset: Tensor

    @classmethod
    def empty(cls, like: tuple[Tensor, ...], width: int) -> TailCarry:
        """The tail of no tokens: ``width`` slots for tensors like these (``[B, T, ...]``)."""
        batch, device = like[0].shape[0], like[0].device
        return cls(
            tuple(x.new_zeros(batch, width, *x.shape[2:]) for x in like),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], width: int, begin: Tensor | None = None, stop: Tensor | None = None) -> TailCarry:
        """The tail of a piece.

        Args:
            tensors: the piece, each ``[B, T, ...]``; T may be 0 or less than ``width``.
            width: ``n``.
            begin: scalar int64: the row of the piece at which its last document begins (T if it begins right after the piece);
                negative or None if no document begins in it.
            stop: ``[B]`` int64: the row at which the last document ends and padding follows; None: the piece's end.
        """
        batch, length = tensors[0].shape[:2]
        device = tensors[0].device
        if stop is None or not length:
            tails = tuple(_pad_front(x[:, max(0, length - width) :], width) for x in tensors)
            count = torch.full((batch,), min(length, width), dtype=torch.int64, device=device)
        else:
            source = (stop[:, None] + torch.arange(-width, 0, device=device)).clamp(min=0)
            tails = tuple(x.take_along_dim(_like(source, x), 1) for x in tensors)
            count = stop.clamp(max=width)
        reset = torch.zeros(batch, dtype=torch.bool, device=device)
        if begin is not None:
            count = torch.minimum(count, (length if stop is None else stop) - begin.clamp(min=0))
            reset = (begin >= 0).expand(batch)
        if begin is not None or stop is not None:
            held = torch.arange(width, device=device) >= width - count[:, None]
            tails = tuple(_keep(held, x) for x in tails)
        return cls(tails, count, reset)

    @property
    def width(self) -> int:
        """``n``."""
        return self.tails[0].shape[1]

    @property
    def held(self) -> Tensor:
        """``[B, n]`` bool: the slots that hold a token."""
        return torch.arange(self.width, device=self.count.device) >= self.width - self.count[:, None]

    def zero(self) -> Self:
        return self.with_tensors(tuple(torch.zeros_like(t) for t in self.tensors()))

    def combine(self, later: Self) -> Self:
        checks.instance("later", later, TailCarry)
        slot = torch.arange(self.width, device=self.count.device)
        source = (slot + later.count[:, None]).clamp(max=self.width - 1)  # for slots that ``later`` does not fill
        seen = later.held | ~later.reset[:, None]
        tails = tuple(
            _keep(seen, torch.where(_like(later.held, b), b, a.take_along_dim(_like(source, a), 1)))
            for a, b in zip(self.tails, later.tails, strict=True)
        )
        count = torch.where(later.reset, later.count, (self.count + later.count).clamp(max=self.width))
        return type(self)(tails, count, self.reset | later.reset)

    def with_reset(self) -> Self:
        return replace(self, reset=torch.ones_like(self.reset))

    def tensors(self) -> tuple[Tensor, ...]:
        """``(*tails, count, reset)``."""
        return (*self.tails, self.count, self.reset)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        return type(self)(tuple(tensors[:-2]), tensors[-2], tensors[-1])


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """``[B, n]`` with as many trailing dimensions as ``x [B, n, ...]``."""
    return mask.view(*mask.shape, *(1,) * (x.dim() - 2))


def _keep(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``mask`` is True, 0 elsewhere."""
    return torch.where(_like(mask, x), x, torch.zeros((), dtype=x.dtype, device=x.device))


def _pad_front(x: Tensor, length: int) -> Tensor:
    """``x [B, t, ...]`` padded with zeros in front to ``length`` tokens."""
    missing = length - x.shape[1]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (missing, 0))


def _from_leaves(leaves: tuple[Any, ...]) -> TailCarry:
    return TailCarry(leaves[:-2], leaves[-2], leaves[-1])


pytree.register_pytree_node(
    TailCarry,
    lambda t: ([*t.tails, t.count, t.reset], None),
    lambda leaves, _: _from_leaves(tuple(leaves)),
    serialized_type_name="race_dist.TailCarry",
)


class SpanWithTail(NamedTuple):
    """A span of tokens with its initial tail in front.

    Attributes:
        tensors: each ``[B, n + length, ...]``.
        held: ``[B, n + length]`` bool: False for empty slots of the tail.
        documents: ``[n + length]``: the document of each token, or None if all are in one.
        span: the rows.
        compaction: with a key_mask, the order that puts the real tokens of each document before its padding.
    """

    tensors: tuple[Tensor, ...]
    held: Tensor
    documents: Tensor | None
    span: Span
    compaction: Compaction | None = None

    def of(self, x: Tensor) -> Tensor:
        """The rows of the span in this rank's ``x [B, T, ...]``, in the order of ``tensors``."""
        rows = self.span.of(x)
        return rows if self.compaction is None else self.compaction.gather(rows)


def run_with_tail(
    tensors: tuple[Tensor, ...],
    width: int,
    carry: TailCarry | None,
    sequence: Sequence,
    layer: Callable[[SpanWithTail], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], TailCarry | None]:
    """Run a layer that looks back ``width`` tokens over this rank's rows, wherever the tokens before them are.

    The layer sees real tokens only. With a key_mask, ``layer`` gets the span's real tokens first and padding after them; tails
    hold real tokens only; the outputs of padding are 0 and have no gradient.

    Args:
        tensors: inputs of the layer, of which it reads earlier tokens, each ``[B, T, ...]``.
        width: ``n``, the number of tokens that the layer looks back.
        carry: the tail before the call's sequence, or None.
        sequence: the position of the rows in their sequence.
        layer: from a span with its initial tail to its outputs, each ``[B, length, ...]``; no output may depend on a later
            token. It reads other tensors of the same rows through :meth:`SpanWithTail.of`.

    Returns:
        The outputs ``[B, T, ...]`` and the tail after the call's sequence (None unless ``sequence.return_carry``).
    """
    empty = TailCarry.empty(tensors, width)
    if carry is None:
        carry = empty
    carry = carry.with_tensors(tuple(t.to(like.dtype) for t, like in zip(carry.tensors(), empty.tensors(), strict=True)))
    spans, compactions = sequence.spans(), sequence.compactions
    pieces = [tuple(span.of(x) for x in tensors) for span in spans]
    if compactions is not None:
        pieces = [tuple(map(compact.gather, piece)) for compact, piece in zip(compactions, pieces, strict=True)]
    initial, final = _exchange_tails(pieces, spans, carry, sequence)
    outputs = []
    for i, (piece, span, tail) in enumerate(zip(pieces, spans, initial, strict=True)):
        extended = tuple(torch.cat([before, x], 1) for before, x in zip(tail.tails, piece, strict=True))
        held = F.pad(tail.held, (0, span.length), value=True)
        compact = None if compactions is None else compactions[i]
        output = layer(SpanWithTail(extended, held, sequence.documents(span, width), span, compact))
        outputs.append(output if compact is None else tuple(map(compact.scatter, output)))
    return tuple(torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)), final


def _exchange_tails(
    pieces: list[tuple[Tensor, ...]], spans: list[Span], carry: TailCarry, sequence: Sequence
) -> tuple[list[TailCarry], TailCarry | None]:
    """The initial tail of each span, and the final tail of the sequence."""
    if torch.compiler.is_compiling() and _supports_graph(pieces, carry, sequence):
        exchange = _exchange_in_graph if sequence.compactions is None else _exchange_masked_in_graph
        return exchange(pieces[0], carry, sequence)
    stops = [None] * len(spans) if sequence.compactions is None else [compact.stop for compact in sequence.compactions]
    tails = [
        TailCarry.of(piece, carry.width, sequence.last_document_start(span), stop)
        for piece, span, stop in zip(pieces, spans, stops, strict=True)
    ]
    initial, final = exchange_carries(tails, carry, sequence.group, sequence.layout, return_carry=sequence.return_carry)
    if final is not None and len(spans) > 2:  # each document is sharded on its own: the last one began inside the sequence
        final = final.with_reset()
    return initial, final


# --- inside a compiled graph ---------------------------------------------------------------------------------------------


def _supports_graph(pieces: list[tuple[Tensor, ...]], carry: TailCarry, sequence: Sequence) -> bool:
    """Whether tails can be exchanged without a graph break.

    That needs contiguous shards and one document; without padding also shards so much longer than a tail that on every rank
    (shards have about one length) only the last tokens of the rank before matter.
    """
    return (
        sequence.group is not None
        and sequence.layout == "contiguous"
        and sequence.cu_seqlens is None
        and (sequence.key_mask is not None or pieces[0][0].shape[1] >= 4 * carry.width)
    )


def _exchange_in_graph(
    piece: tuple[Tensor, ...], carry: TailCarry, sequence: Sequence
) -> tuple[list[TailCarry], TailCarry | None]:
    """:func:`_exchange_tails` as one opaque operator."""
    from race_dist.parallel.compile_ops import compiled_halo_exchange

    assert sequence.group is not None
    own = [x[:, x.shape[1] - carry.width :] for x in piece]
    to_float = lambda tensors: [t if t.is_floating_point() else t.float() for t in tensors]
    before, last = compiled_halo_exchange(to_float(own), to_float(carry.tails), sequence.group)
    restore = lambda tensors: tuple(t if x.is_floating_point() else t > 0.5 for t, x in zip(tensors, own, strict=True))
    full = torch.full_like(carry.count, carry.width)
    initial = TailCarry(restore(before), carry.count if group_rank(sequence.group) == 0 else full, carry.reset)
    return [initial], TailCarry(restore(last), full, carry.reset) if sequence.return_carry else None


def _exchange_masked_in_graph(
    piece: tuple[Tensor, ...], carry: TailCarry, sequence: Sequence
) -> tuple[list[TailCarry], TailCarry | None]:
    """:func:`_exchange_tails` with padding, which can leave a shard fewer real tokens than a tail holds, or none.

    Every rank gathers the tails of all ranks. Combining tails of slot numbers then tells which of the gathered slots belong to
    the initial and to the final tail.
    """
    from race_dist.parallel.compile_ops import compiled_all_gather

    assert sequence.group is not None
    assert sequence.compactions is not None
    own = TailCarry.of(piece, carry.width, stop=sequence.compactions[0].stop)
    *gathered, counts = compiled_all_gather([*own.tails, own.count], sequence.group)
    slots = [torch.cat([before, t.transpose(0, 1).flatten(1, 2)], 1) for before, t in zip(carry.tails, gathered, strict=True)]
    no_reset = torch.zeros_like(own.reset)
    numbers = torch.arange(carry.width, device=own.count.device).expand(own.count.shape[0], -1)
    initial = final = TailCarry((numbers,), carry.count, no_reset)
    for rank, count in enumerate(counts.unbind(0)):
        if rank == group_rank(sequence.group):
            initial = final
        final = final.combine(TailCarry((numbers + (rank + 1) * carry.width,), count, no_reset))

    def tail(numbered: TailCarry) -> TailCarry:
        (number,) = numbered.tails
        tails = tuple(_keep(numbered.held, t.take_along_dim(_like(number, t), 1)) for t in slots)
        return TailCarry(tails, numbered.count, carry.reset)

    return [tail(initial)], tail(final) if sequence.return_carry else None
