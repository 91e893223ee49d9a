"""What a rank exchanges around its local calls: which state enters each of them, in the forward pass and in the backward.

A route starts an exchange and returns how to finish it, so that local work can run in between. ``initial`` and ``dfinal``
are of the whole sequence, the same on every rank; what a route gives back are the states of the local calls.

    Prefix     causal; one state a batch row, or (zigzag) a document
    Total      not causal; the sum over the other ranks
    Documents  contiguous shards that documents cross (:mod:`race_dist.parallel.packed_documents`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank, group_size, start_all_reduce
from race_dist.ops.inputs import AttentionInputs, document_ids
from race_dist.parallel.scan import Algorithm, start_scan
from race_dist.parallel.shard_partition import ShardPartition
from race_dist.parallel.sharding import Layout, local_segments
from race_dist.sketch import SketchState

States = list[SketchState]
Finish = Callable[[], States]
Arriving = Callable[[], SketchState]  # waits for the gradient of the final state of the whole sequence


class Route(Protocol):
    """The exchange of one kind of call."""

    cut: ShardPartition

    def known(self, initial: SketchState) -> States:
        """What enters each call, as far as this rank knows it before the exchange."""
        ...

    def start_forward(self, finals: States, initial: SketchState) -> Finish:
        """Exchange what leaves each call when what is :meth:`known` enters it; finishing gives each call's initial state."""
        ...

    def start_backward(self, suffixes: States, dfinal: Arriving) -> Finish:
        """Exchange the gradients of the calls' initial states when those of their final states are 0; finishing gives the
        gradient of each call's final state."""
        ...

    def final(self, finals: Sequence[SketchState]) -> SketchState:
        """This rank's share of the final state, from its calls'; the shares add up."""
        ...

    def dinitial(self, grads: Sequence[SketchState]) -> SketchState:
        """This rank's share of the initial state's gradient, from its calls'; the shares add up."""
        ...

    def rows(self, length: int) -> Tensor | None:
        """``[T]`` document of each of the rank's rows; None where nothing is packed."""
        ...


def plain(state: SketchState) -> SketchState:
    """Without the total log decay, which no call reads of a state that enters it."""
    return SketchState.unchecked(state.mass, state.values)


class Prefix:
    """Causal: what enters a piece is the combination of the pieces before it."""

    def __init__(self, group: ProcessGroup, layout: Layout, p: AttentionInputs, algorithm: Algorithm) -> None:
        rank, world = group_rank(group), group_size(group)
        self.group, self.layout, self.algorithm = group, layout, algorithm
        zigzag = layout == "zigzag"
        if p.cu_seqlens is not None:
            runs = local_segments(p.q.shape[1], rank, world, layout=layout, cu_seqlens=p.cu_seqlens)
            self.cut = ShardPartition(alternate=True, cu_seqlens=runs.cu_seqlens)
        else:
            self.cut = ShardPartition.zigzag(p) if zigzag else ShardPartition()
        self.num_pieces = 2 if zigzag else 1
        self.first = 0 if rank == 0 else None  # the piece that begins the sequence, where this rank has it
        self.last = self.num_pieces - 1 if rank == (0 if zigzag else world - 1) else None

    def _only(self, piece: int | None, state: SketchState) -> States:
        """The state for one of this rank's pieces, zero for the others."""
        return [state if i == piece else state.zero() for i in range(self.num_pieces)]

    def _entering(self, carries: States, piece: int | None, state: SketchState) -> States:
        """What the scan brought, but for the piece that the state from outside enters."""
        return self.cut.states([state if i == piece else plain(c) for i, c in enumerate(carries)])

    def known(self, initial: SketchState) -> States:
        return self.cut.states(self._only(self.first, initial))

    def start_forward(self, finals: States, initial: SketchState) -> Finish:
        scan = start_scan(self.cut.pieces(finals), self.group, self.layout, algorithm=self.algorithm)
        return lambda: self._entering(scan.wait(), self.first, initial)

    def start_backward(self, suffixes: States, dfinal: Arriving) -> Finish:
        state = dfinal()
        own = [state.combine(u) if i == self.last else u for i, u in enumerate(self.cut.pieces(suffixes))]
        scan = start_scan(own, self.group, self.layout, reverse=True, algorithm=self.algorithm)
        return lambda: self._entering(scan.wait(), self.last, state)

    def final(self, finals: Sequence[SketchState]) -> SketchState:
        pieces = self.cut.pieces(finals)
        state = pieces[0].zero() if self.last is None else pieces[self.last]
        decays = [piece.log_decay for piece in pieces if piece.log_decay is not None]
        return SketchState.unchecked(state.mass, state.values, sum(decays[1:], decays[0]) if decays else None)

    def dinitial(self, grads: Sequence[SketchState]) -> SketchState:
        pieces = self.cut.pieces(grads)
        return pieces[0].zero() if self.first is None else pieces[self.first]

    def rows(self, length: int) -> Tensor | None:
        if self.cut.cu_seqlens is None:
            return None
        return document_ids(self.cut.cu_seqlens, length) // self.num_pieces


class Total:
    """Not causal: what enters is the sum of the other ranks' sketches, by one all-reduce each way."""

    def __init__(self, group: ProcessGroup, p: AttentionInputs) -> None:
        self.group = group
        world = group_size(group)
        self.cut = ShardPartition(
            cu_seqlens=None if p.cu_seqlens is None else p.cu_seqlens // world
        )  # zigzag: the same of each

    def _start(self, own: SketchState, outside: SketchState) -> Finish:
        packed = torch.cat([own.mass.reshape(-1), own.values.reshape(-1)])
        pending = start_all_reduce(packed, self.group)

        def finish() -> States:
            mass, values = (pending.wait() - packed).split([own.mass.numel(), own.values.numel()])
            return [SketchState.unchecked(outside.mass + mass.view_as(own.mass), outside.values + values.view_as(own.values))]

        return finish

    def known(self, initial: SketchState) -> States:
        return [initial.zero()]

    def start_forward(self, finals: States, initial: SketchState) -> Finish:
        return self._start(finals[0], initial)

    def start_backward(self, suffixes: States, dfinal: Arriving) -> Finish:
        return self._start(suffixes[0], dfinal())

    def _on_first_rank(self, states: Sequence[SketchState]) -> SketchState:
        return states[0] if group_rank(self.group) == 0 else states[0].zero()

    def final(self, finals: Sequence[SketchState]) -> SketchState:
        return self._on_first_rank(finals)

    def dinitial(self, grads: Sequence[SketchState]) -> SketchState:
        return self._on_first_rank(grads)

    def rows(self, length: int) -> Tensor | None:
        return None if self.cut.cu_seqlens is None else document_ids(self.cut.cu_seqlens, length)
