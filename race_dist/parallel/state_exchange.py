"""Exchange of states between the ranks: which state enters each local call, in the forward pass and in the backward pass.

An exchange is started and finished in two steps, so that local work runs in between. ``initial`` and ``dfinal`` belong to the
whole sequence and are the same on every rank; the states that an exchange returns belong to the local calls.

    PrefixExchange           causal: exclusive scan; one state per batch row, or (zigzag) per document
    SumExchange              not causal: sum over the other ranks
    PackedDocumentsExchange  contiguous shards that documents cross (:mod:`race_dist.parallel.packed_documents`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank, group_size, start_all_reduce
from race_dist.ops import inputs as attention_inputs
from race_dist.ops.inputs import AttentionInputs
from race_dist.parallel.scan import Algorithm, start_scan
from race_dist.parallel.shard_partition import ShardPartition
from race_dist.parallel.sharding import Layout, local_segments
from race_dist.sketch import SketchState

States = list[SketchState]  # one state per local call
FinishExchange = Callable[[], States]  # waits for the exchange
WaitState = Callable[[], SketchState]  # waits for the gradient of the final state of the whole sequence


class StateExchange(Protocol):
    """The exchange of one kind of call."""

    partition: ShardPartition

    def known_initial(self, initial: SketchState) -> States:
        """The state that enters each local call, as far as this rank knows it before the exchange."""
        ...

    def start_exchange(self, finals: States, initial: SketchState) -> FinishExchange:
        """Exchange the final states of the local calls, computed from :meth:`known_initial`; finishing returns the initial
        state of each local call."""
        ...

    def start_reverse_exchange(self, dinitials: States, wait_dfinal: WaitState) -> FinishExchange:
        """Exchange the gradients of the calls' initial states, computed with a gradient of 0 of their final states; finishing
        returns the gradient of the final state of each local call."""
        ...

    def final_share(self, finals: Sequence[SketchState]) -> SketchState:
        """This rank's share of the final state of the whole sequence; the shares add up."""
        ...

    def initial_gradient_share(self, dinitials: Sequence[SketchState]) -> SketchState:
        """This rank's share of the gradient of the initial state of the whole sequence; the shares add up."""
        ...

    def document_ids(self, length: int) -> Tensor | None:
        """``[T]`` document of each of the rank's rows; None where no documents are packed."""
        ...


def without_decay(state: SketchState) -> SketchState:
    """The state without its total log decay, which no local call reads of its initial state."""
    return SketchState.unchecked(state.mass, state.values)


class PrefixExchange:
    """Causal: the combination of all earlier pieces of the sequence enters a piece."""

    def __init__(self, group: ProcessGroup, layout: Layout, inputs: AttentionInputs, algorithm: Algorithm) -> None:
        rank, world = group_rank(group), group_size(group)
        self.group, self.layout, self.algorithm = group, layout, algorithm
        zigzag = layout == "zigzag"
        if inputs.cu_seqlens is not None:
            segments = local_segments(inputs.q.shape[1], rank, world, layout=layout, cu_seqlens=inputs.cu_seqlens)
            self.partition = ShardPartition(interleaved=True, cu_seqlens=segments.cu_seqlens)
        else:
            self.partition = ShardPartition.zigzag(inputs) if zigzag else ShardPartition()
        self.num_pieces = 2 if zigzag else 1
        # index of the piece on this rank that begins the sequence, and of the one that ends it
        self.first = 0 if rank == 0 else None
        self.last = self.num_pieces - 1 if rank == (0 if zigzag else world - 1) else None

    def known_initial(self, initial: SketchState) -> States:
        pieces = [initial if i == self.first else initial.zero() for i in range(self.num_pieces)]
        return self.partition.from_pieces(pieces)

    def start_exchange(self, finals: States, initial: SketchState) -> FinishExchange:
        scan = start_scan(self.partition.to_pieces(finals), self.group, self.layout, algorithm=self.algorithm)
        return lambda: self._with_outer_state(scan.wait(), self.first, initial)

    def start_reverse_exchange(self, dinitials: States, wait_dfinal: WaitState) -> FinishExchange:
        dfinal = wait_dfinal()
        pieces = self.partition.to_pieces(dinitials)
        own = [dfinal.combine(piece) if i == self.last else piece for i, piece in enumerate(pieces)]
        scan = start_scan(own, self.group, self.layout, reverse=True, algorithm=self.algorithm)
        return lambda: self._with_outer_state(scan.wait(), self.last, dfinal)

    def final_share(self, finals: Sequence[SketchState]) -> SketchState:
        pieces = self.partition.to_pieces(finals)
        state = pieces[0].zero() if self.last is None else pieces[self.last]
        decays = [piece.log_decay for piece in pieces if piece.log_decay is not None]
        return SketchState.unchecked(state.mass, state.values, sum(decays[1:], decays[0]) if decays else None)

    def initial_gradient_share(self, dinitials: Sequence[SketchState]) -> SketchState:
        pieces = self.partition.to_pieces(dinitials)
        return pieces[0].zero() if self.first is None else pieces[self.first]

    def document_ids(self, length: int) -> Tensor | None:
        if self.partition.cu_seqlens is None:
            return None
        return attention_inputs.document_ids(self.partition.cu_seqlens, length) // self.num_pieces

    def _with_outer_state(self, scanned: States, piece: int | None, state: SketchState) -> States:
        """The scanned states, with ``state`` for the piece at the end of the sequence, which no other rank's state enters."""
        pieces = [state if i == piece else without_decay(s) for i, s in enumerate(scanned)]
        return self.partition.from_pieces(pieces)


class SumExchange:
    """Not causal: the sum of the other ranks' states enters, by one all-reduce per direction."""

    def __init__(self, group: ProcessGroup, inputs: AttentionInputs) -> None:
        self.group = group
        # a zigzag rank holds an equal share of each document
        cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens // group_size(group)
        self.partition = ShardPartition(cu_seqlens=cu_seqlens)

    def known_initial(self, initial: SketchState) -> States:
        return [initial.zero()]

    def start_exchange(self, finals: States, initial: SketchState) -> FinishExchange:
        return self._start_sum(finals[0], initial)

    def start_reverse_exchange(self, dinitials: States, wait_dfinal: WaitState) -> FinishExchange:
        return self._start_sum(dinitials[0], wait_dfinal())

    def final_share(self, finals: Sequence[SketchState]) -> SketchState:
        return self._on_first_rank(finals[0])

    def initial_gradient_share(self, dinitials: Sequence[SketchState]) -> SketchState:
        return self._on_first_rank(dinitials[0])

    def document_ids(self, length: int) -> Tensor | None:
        cu_seqlens = self.partition.cu_seqlens
        return None if cu_seqlens is None else attention_inputs.document_ids(cu_seqlens, length)

    def _start_sum(self, own: SketchState, outer: SketchState) -> FinishExchange:
        packed = torch.cat([own.mass.reshape(-1), own.values.reshape(-1)])
        pending = start_all_reduce(packed, self.group)

        def finish() -> States:
            mass, values = (pending.wait() - packed).split([own.mass.numel(), own.values.numel()])
            return [SketchState.unchecked(outer.mass + mass.view_as(own.mass), outer.values + values.view_as(own.values))]

        return finish

    def _on_first_rank(self, state: SketchState) -> SketchState:
        """The total is known on every rank: the first one contributes it."""
        return state if group_rank(self.group) == 0 else state.zero()
