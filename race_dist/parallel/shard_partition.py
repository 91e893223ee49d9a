"""Partition of a rank's shard into local attention calls, and of their states into the pieces of the sequence."""

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
    """How the rows of a rank become local calls.

    Attributes:
        mode: "one_call": all rows. "halves_as_rows": one call in which the two halves of each batch row are batch rows of their
            own. "two_calls": one call per half (zigzag shards whose halves cannot be viewed as batch rows).
        interleaved: whether the states of the call alternate between the first and the second piece of each batch row or
            document.
        cu_seqlens: document boundaries within this rank's rows, or None.
    """

    mode: Literal["one_call", "halves_as_rows", "two_calls"] = "one_call"
    interleaved: bool = False
    cu_seqlens: Tensor | None = None

    @classmethod
    def zigzag(cls, inputs: AttentionInputs) -> ShardPartition:
        """Of causal inputs without documents whose rows are two slices of the sequence."""
        if all(map(_halves_are_rows, (inputs.q, inputs.k, inputs.v))):
            return cls("halves_as_rows", interleaved=True)
        return cls("two_calls")

    def calls(self, inputs: AttentionInputs, initials: Sequence[SketchState | None]) -> list[AttentionInputs]:
        """The inputs of the local calls, which start from the states ``initials``. q, k and v are not copied."""
        decays = [None, None] if inputs.log_decay is None else self.split(inputs.log_decay)
        masks = [None, None] if inputs.key_mask is None else self.split(inputs.key_mask)
        parts = zip(self.split(inputs.q), self.split(inputs.k), self.split(inputs.v), decays, masks, initials)
        return [
            replace(inputs, q=q, k=k, v=v, log_decay=decay, key_mask=mask, cu_seqlens=self.cu_seqlens, initial=initial)
            for q, k, v, decay, mask, initial in parts
        ]

    def split(self, x: Tensor) -> list[Tensor]:
        """The rows of each call, of x ``[B, T, ...]``."""
        if self.mode == "one_call":
            return [x]
        halves = x.unflatten(1, (2, -1)) if x.shape[1] else x.unsqueeze(1).expand(-1, 2, *x.shape[1:])
        return [halves.flatten(0, 1)] if self.mode == "halves_as_rows" else list(halves.unbind(1))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.mode == "two_calls":
            return torch.cat(list(parts), 1)
        return parts[0] if self.mode == "one_call" else parts[0].unflatten(0, (-1, 2)).flatten(1, 2)

    def to_pieces(self, states: Sequence[SketchState]) -> list[SketchState]:
        """The states of the calls as one carry per piece of the sequence."""
        if not self.interleaved:
            return list(states)
        return [states[0][0::2], states[0][1::2]]

    def from_pieces(self, pieces: Sequence[SketchState]) -> list[SketchState]:
        """The inverse of :meth:`to_pieces`."""
        if not self.interleaved:
            return list(pieces)
        first, second = pieces
        pairs = zip(first.tensors(), second.tensors(), strict=True)
        return [first.with_tensors(tuple(torch.stack(pair, 1).flatten(0, 1) for pair in pairs))]


def _halves_are_rows(x: Tensor) -> bool:
    """Whether ``[B, T, ...]`` is ``[2 B, T / 2, ...]`` without a copy."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
