"""Batches: the windows of the text that a step reads, and the shard of them that a rank needs.

A training batch is a function of (seed, position) alone, where position counts the batches drawn. So the run does not depend on
how the ranks are arranged, and the position in the data is one number. A rank reads only its own shard of its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import shard_lengths
from race_dist.training.data.splits import Split, Tokens


@dataclass(frozen=True)
class Shard:
    """The part of every sequence that a rank holds.

    Attributes:
        rank, world: place in the context-parallel group, and its size.
        layout: "contiguous" or "zigzag".
    """

    rank: int = 0
    world: int = 1
    layout: str = "contiguous"

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """The rank's tokens of a sequence of that length, as ranges ``(start, stop)`` in the order of the shard."""
        if self.layout == "contiguous":
            lengths = shard_lengths(length, self.world)
            start = sum(lengths[: self.rank])
            return [(start, start + lengths[self.rank])]
        size = length // (2 * self.world)
        return [(n * size, (n + 1) * size) for n in (self.rank, 2 * self.world - 1 - self.rank)]


@dataclass(frozen=True)
class ShardedBatch:
    """The model's inputs on one rank.

    Attributes:
        inputs: ``[B, t]`` int64 tokens.
        labels: ``[B, t]`` int64, the next token; -100 if it does not count.
        cu_seqlens: ``[N + 1]`` int64 document boundaries in the full sequence (B = 1), or None.
    """

    inputs: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """The global batch of one step: windows of the text. Tokens are read when they are needed.

    Attributes:
        split: the text.
        starts: the first token of each window (row) in the split.
        context: tokens per row; the token after the last one is the last target.
        count: rows that count; further rows are padding.
    """

    split: Split
    starts: tuple[int, ...]
    context: int
    count: int

    @property
    def targets(self) -> int:
        """Number of targets that count, over all rows. The first token of a document is not a target."""
        starts = self.starts[: self.count]
        return self.count * self.context - sum(len(self.split.boundaries_in(s + 1, s + self.context + 1)) for s in starts)

    def rows_of_dp_rank(self, group: int, groups: int) -> range:
        """The rows of one data-parallel group."""
        return range(group * len(self.starts) // groups, (group + 1) * len(self.starts) // groups)

    def row(self, index: int) -> Tokens:
        """``context + 1`` tokens; a view of the memory map if they are contiguous (``data.held_out = "tail"``)."""
        return self.split.view(self.starts[index], self.context + 1)

    def shard(self, rows: range, shard: Shard) -> ShardedBatch:
        """One rank's shard of some rows. For separate documents, the rows are concatenated to one sequence."""
        if self.split.boundaries is None:
            pieces = [self._window(row, shard.ranges(self.context)) for row in rows]
            inputs, labels = (torch.stack([piece[n] for piece in pieces]) for n in (0, 1))
            return ShardedBatch(inputs, labels)
        ranges = shard.ranges(len(rows) * self.context)
        pieces = [
            self._window(rows[n], [(low, high)]) for start, stop in ranges for n, low, high in self._split_by_row(start, stop)
        ]
        empty = torch.zeros(0, dtype=torch.int64)
        inputs, labels = (torch.cat([empty, *(piece[n] for piece in pieces)])[None] for n in (0, 1))
        return ShardedBatch(inputs, labels, self._documents(rows))

    def _split_by_row(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Of rows that are concatenated: a range of that sequence, as (row, start, stop) per row."""
        while start < stop:
            n, low = divmod(start, self.context)
            high = min(self.context, low + stop - start)
            yield n, low, high
            start += high - low

    def _window(self, row: int, ranges: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Tokens and targets of ranges of one row."""
        start, inputs, labels = self.starts[row], [], []
        for low, high in ranges:
            tokens = torch.from_numpy(self.split.read(start + low, high - low + 1).astype(np.int64))
            targets = tokens[1:].clone()
            targets[torch.from_numpy(self.split.boundaries_in(start + low + 1, start + high + 1) - (start + low + 1))] = (
                IGNORE_INDEX
            )
            if row >= self.count:
                targets.fill_(IGNORE_INDEX)
            inputs.append(tokens[:-1])
            labels.append(targets)
        return torch.cat(inputs), torch.cat(labels)

    def _documents(self, rows: range) -> Tensor:
        """``cu_seqlens`` of concatenated rows: each row begins a document."""
        bounds = [np.array([len(rows) * self.context], np.int64)]
        for n, row in enumerate(rows):
            start = self.starts[row]
            bounds += [
                np.array([n * self.context], np.int64),
                self.split.boundaries_in(start + 1, start + self.context) - start + n * self.context,
            ]
        return torch.from_numpy(np.unique(np.concatenate(bounds)))


def training_batch(split: Split, *, seed: int, position: int, batch_size: int, context: int) -> Batch:
    """The batch at a position in the data: ``batch_size`` windows at random places of the text.

    Only the raw words of numpy's Philox generator are used, because numpy guarantees that they never change.
    """
    words = np.random.Philox(key=[seed, position]).random_raw(batch_size)
    starts = words % np.uint64(len(split) - context)
    return Batch(split, tuple(map(int, starts)), context, batch_size)


def evaluation_batches(split: Split, *, tokens: int, batch_size: int, context: int) -> Iterator[Batch]:
    """Windows spread evenly over ``split``, about ``tokens`` tokens in all, the same on every call. The last batch is padded
    with rows that do not count."""
    fit = (len(split) - 1) // context
    count = max(1, min(fit, tokens // context))
    starts = [n * fit // count * context for n in range(count)]
    for first in range(0, count, batch_size):
        rows = starts[first : first + batch_size]
        yield Batch(split, tuple(rows + rows[:1] * (batch_size - len(rows))), context, len(rows))


def check_fits(train: Split, held_out: Split, context: int, name: str) -> None:
    """Raise ValueError if a split of the corpus is too short for one sequence of ``context`` tokens."""
    for split, side in ((train, "training"), (held_out, "held-out")):
        if len(split) < context + 1:
            raise ValueError(
                f"the {side} part of {name} has {len(split)} tokens, too few for one sequence of "
                f"data.context + 1 = {context + 1}; lower data.context or give more text"
            )


def check_shards(context: int, rows: int, shard: Shard, *, separate: bool) -> None:
    """Raise ValueError if the layout does not divide the sequences."""
    if shard.layout == "zigzag" and shard.world > 1:
        if separate:
            raise ValueError(
                'parallel.layout = "zigzag" cuts every document into equal slices, which documents of all '
                'lengths do not allow; use "contiguous" with data.documents = "separate"'
            )
        if context % (2 * shard.world):
            raise ValueError(
                f"data.context = {context} does not divide into the 2 * {shard.world} slices of the zigzag "
                f'layout; make it a multiple of {2 * shard.world} or use parallel.layout = "contiguous"'
            )
    elif rows * context < shard.world:
        raise ValueError(f"data.context = {context} gives some of the {shard.world} ranks no token")
