"""Packed documents over contiguous shards: only the first and the last document of a shard meet other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank
from race_dist.ops.inputs import AttentionInputs, document_ids
from race_dist.parallel.scan import Algorithm, ScanHandle, start_scan
from race_dist.parallel.shard_partition import ShardPartition
from race_dist.parallel.state_exchange import Arriving, Finish, States, plain
from race_dist.sketch import SketchState


class Documents:
    """The route of such a call; one state a rank is exchanged each way, whatever the number of documents.

    What goes on to later ranks is the state at the shard's end, that of its last document, with a reset (a log decay of
    ``-inf``) if any document begins in the shard. What goes back to earlier ranks is the first document's, with a reset
    if any ends in the shard. Causal attention sends the one forward and the other backward; without ``causal`` both go
    both ways. A document without tokens belongs to rank 0. All of it is computed on the device of ``cu_seqlens``.
    """

    def __init__(self, group: ProcessGroup, p: AttentionInputs, offset: int | Tensor, algorithm: Algorithm) -> None:
        assert p.cu_seqlens is not None
        self.group, self.causal, self.algorithm = group, p.causal, algorithm
        cu, length = p.cu_seqlens, p.q.shape[1]
        self.cut = ShardPartition(cu_seqlens=(cu - offset).clamp(0, length))
        start, end, stop = cu[:-1], cu[1:], offset + length
        filled = end > start
        begins, ends = filled & (start >= offset) & (start < stop), filled & (end > offset) & (end <= stop)
        self.any_begins, self.any_ends = begins.any(), ends.any()
        empty = ~filled if group_rank(group) == 0 else torch.zeros_like(filled)
        self.begins, self.ends = begins | empty, ends | empty  # [N]: whose first and last tokens are here
        edges = offset + torch.arange(2, device=cu.device) * (length - 1)
        self.first, self.last = (torch.searchsorted(cu, edges, right=True) - 1).clamp(0, filled.numel() - 1).split(1)
        index = torch.arange(filled.numel(), device=cu.device)
        self.from_left = (index == self.first) & (start < offset) & (length > 0)  # [N]: the one that began earlier
        self.to_right = (index == self.last) & (end > stop) & (length > 0)  # [N]: the one that goes on later

    def known(self, initial: SketchState) -> States:
        return [initial.zero()]

    def start_forward(self, finals: States, initial: SketchState) -> Finish:
        (own,) = finals
        # the state after the shard's last row, as far as this rank knows it
        entered = _where(self.any_begins, initial[self.last])
        right = self._scan(_with_reset(entered.combine(own[self.last]), self.any_begins))
        left = None
        if not self.causal:
            left = self._scan(_with_reset(own[self.first], self.any_ends), reverse=True)
        outside = _where(self.begins, initial)
        return lambda: [self._entering(outside, right, left)]

    def start_backward(self, suffixes: States, dfinal: Arriving) -> Finish:
        (own,) = suffixes
        state = dfinal()
        first = _where(self.any_ends, state[self.first]).combine(own[self.first])
        left = self._scan(_with_reset(first, self.any_ends), reverse=True)
        right = None
        if not self.causal:
            right = self._scan(_with_reset(own[self.last], self.any_begins))
        outside = _where(self.ends, state)
        return lambda: [self._entering(outside, right, left)]

    def final(self, finals: Sequence[SketchState]) -> SketchState:
        state = _where(self.ends, finals[0])
        return SketchState.unchecked(state.mass, state.values, finals[0].log_decay)

    def dinitial(self, grads: Sequence[SketchState]) -> SketchState:
        return _where(self.begins, grads[0])

    def rows(self, length: int) -> Tensor | None:
        assert self.cut.cu_seqlens is not None
        return document_ids(self.cut.cu_seqlens, length)

    def _scan(self, carry: SketchState, *, reverse: bool = False) -> ScanHandle[SketchState]:
        return start_scan([carry], self.group, reverse=reverse, algorithm=self.algorithm)

    def _entering(
        self, outside: SketchState, right: ScanHandle[SketchState] | None, left: ScanHandle[SketchState] | None
    ) -> SketchState:
        """``[N, ...]``: the states from outside, and what the neighbours sent for the shard's first and last document."""
        mass, values = outside.mass, outside.values
        for scan, document in ((right, self.from_left), (left, self.to_right)):
            if scan is not None:
                (carried,) = scan.wait()
                sent = _where(document, plain(carried))
                mass, values = mass + sent.mass, values + sent.values
        return SketchState.unchecked(mass, values)


def _where(rows: Tensor, state: SketchState) -> SketchState:
    """The state in some rows, 0 in the others; ``rows`` is ``[N]`` or one flag."""
    mask = rows.view(-1, 1, 1)
    return SketchState.unchecked(torch.where(mask, state.mass, 0.0), torch.where(mask[..., None], state.values, 0.0))


def _with_reset(state: SketchState, reset: Tensor) -> SketchState:
    """The carry that lets nothing through if ``reset``."""
    decay = state.mass.new_zeros(state.mass.shape[:2]) if state.log_decay is None else state.log_decay
    return SketchState.unchecked(state.mass, state.values, torch.where(reset, -torch.inf, decay))
