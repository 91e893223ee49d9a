"""A recurrent layer over packed documents, padding and ranks, written once for any carry.

A layer defines how it runs over consecutive tokens from an initial carry. :func:`run_recurrence` splits this rank's rows into
spans, computes the initial carry of each span by an exclusive scan over the ranks, and returns the carry after the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from race_dist.nn.context_parallel import exchange_carries
from race_dist.nn.mixing_layer import LayerCarry
from race_dist.nn.sequence import Sequence

CarryT = TypeVar("CarryT", bound=LayerCarry)


class TokenSpan(NamedTuple):
    """Consecutive tokens of the sequence.

    Attributes:
        tensors: inputs of the layer, each ``[B, n, ...]``.
        starts: ``[n]`` bool: tokens at which a document begins, so that nothing before them is seen; None: no token.
        mask: ``[B, n]`` bool, False for padding: such a token does not change the carry (but a document may begin at it);
            None: every token is real.
    """

    tensors: tuple[Tensor, ...]
    starts: Tensor | None
    mask: Tensor | None


def run_recurrence(
    tensors: tuple[Tensor, ...],
    carry: CarryT,
    sequence: Sequence,
    scan: Callable[[TokenSpan, CarryT], tuple[Tensor, CarryT]],
) -> tuple[Tensor, CarryT | None]:
    """Run a recurrent layer over this rank's rows, wherever the tokens before them are.

    Args:
        tensors: inputs of the layer, each ``[B, T, ...]``.
        carry: the carry before the call's sequence, the same on every rank; ``zero_carry`` at a beginning.
        sequence: the position of the rows in their sequence.
        scan: from a span and its initial carry to its outputs ``[B, n, ...]`` and its final carry. Under a group it runs twice:
            from the zero carry, whose final carry the ranks exchange, and from the initial carry.

    Returns:
        The outputs ``[B, T, ...]`` and the carry after the call's sequence (None unless ``sequence.return_carry``).
    """
    spans = sequence.spans()
    pieces = [
        TokenSpan(
            tuple(span.of(x) for x in tensors),
            sequence.document_starts(span),
            None if sequence.key_mask is None else span.of(sequence.key_mask),
        )
        for span in spans
    ]
    ends = [sequence.document_begins_after(span) for span in spans]
    if sequence.group is None:
        (piece,), (end,) = pieces, ends
        outputs, after = scan(piece, carry)
        return outputs, _hide(after, end) if sequence.return_carry else None
    zero = carry.zero()
    own = [_depend_on_inputs(scan(piece, zero)[1], piece) for piece in pieces]
    own = [_hide(carry_of_piece, end) for carry_of_piece, end in zip(own, ends, strict=True)]
    initial, final = exchange_carries(own, carry, sequence.group, sequence.layout, return_carry=sequence.return_carry)
    if final is not None and sequence.num_documents > 1:
        final = final.with_reset()  # the open document began inside the sequence
    parts = [_depend_on_carry(scan(piece, before)[0], before) for piece, before in zip(pieces, initial, strict=True)]
    return torch.cat(parts, 1), final


def _depend_on_inputs(carry: CarryT, piece: TokenSpan) -> CarryT:
    """The carry of a piece. Without tokens it depends on the layer's inputs too: in the forward pass either all ranks exchange
    carries that require a gradient, or none does."""
    if piece.tensors[0].shape[1]:
        return carry
    zero = sum(x.sum() for x in piece.tensors if x.is_floating_point())
    return carry.with_tensors(tuple(t + zero if t.is_floating_point() else t for t in carry.tensors()))


def _depend_on_carry(outputs: Tensor, initial: LayerCarry) -> Tensor:
    """The outputs of a piece. Without tokens they depend on its initial carry too: in the backward pass every rank must come to
    the exchange."""
    if outputs.shape[1]:
        return outputs
    return outputs + sum(t.sum() for t in initial.tensors() if t.is_floating_point()).to(outputs.dtype)  # type: ignore[union-attr]


def _hide(carry: CarryT, begins: Tensor | None) -> CarryT:
    """The carry after a span: empty if a document begins (``begins``, 0-dimensional bool) right after it."""
    if begins is None:
        return carry
    empty = carry.zero().with_reset().tensors()
    return carry.with_tensors(tuple(torch.where(begins, e, t) for e, t in zip(empty, carry.tensors(), strict=True)))
