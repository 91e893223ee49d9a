"""Packed documents over contiguous shards: only the first and the last document of a shard reach into other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank
from race_dist.ops.inputs import AttentionInputs, document_ids
from race_dist.parallel.scan import Algorithm, ScanHandle, start_scan
from race_dist.parallel.shard_partition import ShardPartition
from race_dist.parallel.state_exchange import FinishExchange, States, WaitState, without_decay
from race_dist.sketch import SketchState


class PackedDocumentsExchange:
    """Exchange of one state per rank and direction, whatever the number of documents.

    Later ranks get the state at the shard's end, which is that of its last document, with a reset (a log decay of ``-inf``) if
    any document begins in the shard. Earlier ranks get the state of the first document, with a reset if any document ends in
    the shard. Causal attention sends the former in the forward pass and the latter in the backward pass; without ``causal``
    both are sent in both passes. Empty documents belong to rank 0. Everything is computed on the device of ``cu_seqlens``.
    """

    def __init__(self, group: ProcessGroup, inputs: AttentionInputs, offset: int | Tensor, algorithm: Algorithm) -> None:
        assert inputs.cu_seqlens is not None
        self.group, self.causal, self.algorithm = group, inputs.causal, algorithm
        cu, length = inputs.cu_seqlens, inputs.q.shape[1]
        self.partition = ShardPartition(cu_seqlens=(cu - offset).clamp(0, length))
        start, end, stop = cu[:-1], cu[1:], offset + length
        filled = end > start
        begins, ends = filled & (start >= offset) & (start < stop), filled & (end > offset) & (end <= stop)
        self.any_begins, self.any_ends = begins.any(), ends.any()
        empty = ~filled if group_rank(group) == 0 else torch.zeros_like(filled)
        self.begins, self.ends = begins | empty, ends | empty  # [N]: whose first and last tokens are in this shard
        edges = offset + torch.arange(2, device=cu.device) * (length - 1)
        self.first, self.last = (torch.searchsorted(cu, edges, right=True) - 1).clamp(0, filled.numel() - 1).split(1)
        index = torch.arange(filled.numel(), device=cu.device)
        # [N]: the document that began on an earlier rank, and the one that goes on on a later rank
        self.from_earlier = (index == self.first) & (start < offset) & (length > 0)
        self.to_later = (index == self.last) & (end > stop) & (length > 0)

    def known_initial(self, initial: SketchState) -> States:
        return [initial.zero()]

    def start_exchange(self, finals: States, initial: SketchState) -> FinishExchange:
        (own,) = finals
        # the state after the shard's last row, as far as this rank knows it
        known = _where(self.any_begins, initial[self.last])
        from_earlier = self._scan(_with_reset(known.combine(own[self.last]), self.any_begins))
        from_later = None
        if not self.causal:
            from_later = self._scan(_with_reset(own[self.first], self.any_ends), reverse=True)
        outer = _where(self.begins, initial)
        return lambda: [self._entering(outer, from_earlier, from_later)]

    def start_reverse_exchange(self, dinitials: States, wait_dfinal: WaitState) -> FinishExchange:
        (own,) = dinitials
        dfinal = wait_dfinal()
        first = _where(self.any_ends, dfinal[self.first]).combine(own[self.first])
        from_later = self._scan(_with_reset(first, self.any_ends), reverse=True)
        from_earlier = None
        if not self.causal:
            from_earlier = self._scan(_with_reset(own[self.last], self.any_begins))
        outer = _where(self.ends, dfinal)
        return lambda: [self._entering(outer, from_earlier, from_later)]

    def final_share(self, finals: Sequence[SketchState]) -> SketchState:
        state = _where(self.ends, finals[0])
        return SketchState.unchecked(state.mass, state.values, finals[0].log_decay)

    def initial_gradient_share(self, dinitials: Sequence[SketchState]) -> SketchState:
        return _where(self.begins, dinitials[0])

    def document_ids(self, length: int) -> Tensor | None:
        assert self.partition.cu_seqlens is not None
        return document_ids(self.partition.cu_seqlens, length)

    def _scan(self, carry: SketchState, *, reverse: bool = False) -> ScanHandle[SketchState]:
        return start_scan([carry], self.group, reverse=reverse, algorithm=self.algorithm)

    def _entering(
        self,
        outer: SketchState,
        from_earlier: ScanHandle[SketchState] | None,
        from_later: ScanHandle[SketchState] | None,
    ) -> SketchState:
        """``[N, ...]``: the outer states, plus what other ranks sent for the shard's first and last document."""
        mass, values = outer.mass, outer.values
        for scan, document in ((from_earlier, self.from_earlier), (from_later, self.to_later)):
            if scan is not None:
                (scanned,) = scan.wait()
                sent = _where(document, without_decay(scanned))
                mass, values = mass + sent.mass, values + sent.values
        return SketchState.unchecked(mass, values)


def _where(rows: Tensor, state: SketchState) -> SketchState:
    """The state in some rows, 0 in the others; ``rows`` is ``[N]`` or one flag."""
    mask = rows.view(-1, 1, 1)
    return SketchState.unchecked(torch.where(mask, state.mass, 0.0), torch.where(mask[..., None], state.values, 0.0))


def _with_reset(state: SketchState, reset: Tensor) -> SketchState:
    """The state as a carry that cuts off every earlier one if ``reset``."""
    decay = state.mass.new_zeros(state.mass.shape[:2]) if state.log_decay is None else state.log_decay
    return SketchState.unchecked(state.mass, state.values, torch.where(reset, -torch.inf, decay))
