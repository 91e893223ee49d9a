"""A rank's rows as the local calls that compute them, and the states of those calls as carries of its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from race_dist.ops.inputs import AttentionInputs
from race_dist.sketch import SketchState


@dataclass(frozen=True)
class ShardPartition:
    """How one rank's problem is cut.

    Attributes:
        mode: "whole": one call over all rows. "rows": one call in which the two halves of each batch row are rows of
            their own. "halves": one call a half (zigzag shards whose halves no view can make batch rows).
        alternate: the call's states alternate between the first and the second piece of each row or document.
        cu_seqlens: document boundaries within this rank's rows, or None.
    """

    mode: Literal["whole", "rows", "halves"] = "whole"
    alternate: bool = False
    cu_seqlens: Tensor | None = None

    @classmethod
    def zigzag(cls, p: AttentionInputs) -> ShardPartition:
        """Of a causal problem without documents whose rows are two slices of the sequence."""
        return cls("rows", alternate=True) if all(map(_halves_are_rows, (p.q, p.k, p.v))) else cls("halves")

    def calls(self, p: AttentionInputs) -> list[AttentionInputs]:
        """The local calls, without an initial state. q, k and v are not copied."""
        decays = [None, None] if p.log_decay is None else self.of(p.log_decay)
        masks = [None, None] if p.key_mask is None else self.of(p.key_mask)
        return [
            replace(p, q=q, k=k, v=v, log_decay=decay, key_mask=mask, cu_seqlens=self.cu_seqlens, initial=None)
            for q, k, v, decay, mask in zip(self.of(p.q), self.of(p.k), self.of(p.v), decays, masks)
        ]

    def of(self, x: Tensor) -> list[Tensor]:
        """Each call's part of x ``[B, T, ...]``."""
        if self.mode == "whole":
            return [x]
        halves = x.unflatten(1, (2, -1)) if x.shape[1] else x.unsqueeze(1).expand(-1, 2, *x.shape[1:])
        return [halves.flatten(0, 1)] if self.mode == "rows" else list(halves.unbind(1))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`of`."""
        if self.mode == "halves":
            return torch.cat(list(parts), 1)
        return parts[0] if self.mode == "whole" else parts[0].unflatten(0, (-1, 2)).flatten(1, 2)

    def pieces(self, states: Sequence[SketchState]) -> list[SketchState]:
        """The calls' states as one carry a piece."""
        if not self.alternate:
            return list(states)
        return [states[0][0::2], states[0][1::2]]

    def states(self, pieces: Sequence[SketchState]) -> list[SketchState]:
        """The inverse of :meth:`pieces`."""
        if not self.alternate:
            return list(pieces)
        first, second = pieces
        return [
            first.with_tensors(
                tuple(torch.stack(pair, 1).flatten(0, 1) for pair in zip(first.tensors(), second.tensors(), strict=True))
            )
        ]


def _halves_are_rows(x: Tensor) -> bool:
    """Whether ``[B, T, ...]`` is ``[2 B, T / 2, ...]`` without a copy."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
