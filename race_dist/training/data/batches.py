"""Batches: which windows of a text a step reads, and the part of them that a rank needs.

A training batch is a function of (seed, position) alone, where position counts the batches drawn. So the run does not
depend on how the ranks are arranged, and a position in the data is one number. A rank reads the tokens of its own rows and
its own shard of them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import shard_lengths
from race_dist.training.data.corpus import Split, Tokens


@dataclass(frozen=True)
class Shard:
    """Which part of every sequence a rank holds: place ``rank`` of ``world`` under a layout."""

    rank: int = 0
    world: int = 1
    layout: str = "contiguous"

    def runs(self, length: int) -> list[tuple[int, int]]:
        """The rank's rows of a sequence of that length, as runs ``(start, stop)`` in its order."""
        if self.layout == "contiguous":
            lengths = shard_lengths(length, self.world)
            start = sum(lengths[: self.rank])
            return [(start, start + lengths[self.rank])]
        size = length // (2 * self.world)
        return [(n * size, (n + 1) * size) for n in (self.rank, 2 * self.world - 1 - self.rank)]


@dataclass(frozen=True)
class ShardedBatch:
    """What a rank puts into the model.

    Attributes:
        inputs: ``[B, t]`` int64 tokens.
        labels: ``[B, t]`` int64, the token after each; -100 where it does not count.
        cu_seqlens: ``[N + 1]`` int64 boundaries of the documents in the whole sequence (B = 1), or None.
    """

    inputs: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """The windows of one step, over all ranks together. Nothing is read until it is asked for.

    Attributes:
        split: the text.
        starts: where in it each window (row) begins.
        context: tokens a row; the one after the last is the last target.
        count: rows that count; those after them fill the batch up.
    """

    split: Split
    starts: tuple[int, ...]
    context: int
    count: int

    @property
    def targets(self) -> int:
        """Targets that count, over all rows. The first token of a document is nobody's target."""
        starts = self.starts[: self.count]
        return self.count * self.context - sum(len(self.split.boundaries_in(s + 1, s + self.context + 1)) for s in starts)

    def rows_of_dp_rank(self, group: int, groups: int) -> range:
        """The rows of one of ``groups`` groups of ranks."""
        return range(group * len(self.starts) // groups, (group + 1) * len(self.starts) // groups)

    def row(self, index: int) -> Tokens:
        """``context + 1`` tokens, unread where they lie in one piece of a memory map (``data.held_out = "tail"``)."""
        return self.split.view(self.starts[index], self.context + 1)

    def shard(self, rows: range, shard: Shard) -> ShardedBatch:
        """The shard of some rows. Documents that are kept apart need one sequence: rows are then strung together."""
        if self.split.boundaries is None:
            pieces = [self._window(row, shard.runs(self.context)) for row in rows]
            inputs, labels = (torch.stack([piece[n] for piece in pieces]) for n in (0, 1))
            return ShardedBatch(inputs, labels)
        runs = shard.runs(len(rows) * self.context)
        pieces = [self._window(rows[n], [(low, high)]) for start, stop in runs for n, low, high in self._cut(start, stop)]
        empty = torch.zeros(0, dtype=torch.int64)
        inputs, labels = (torch.cat([empty, *(piece[n] for piece in pieces)])[None] for n in (0, 1))
        return ShardedBatch(inputs, labels, self._documents(rows))

    def _cut(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows strung together: a run of that sequence as (row, start, stop) of each row it touches."""
        while start < stop:
            n, low = divmod(start, self.context)
            high = min(self.context, low + stop - start)
            yield n, low, high
            start += high - low

    def _window(self, row: int, runs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Tokens and targets of runs of one row."""
        start, inputs, labels = self.starts[row], [], []
        for low, high in runs:
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
        """``cu_seqlens`` of rows strung together: each row begins a document."""
        bounds = [np.array([len(rows) * self.context], np.int64)]
        for n, row in enumerate(rows):
            start = self.starts[row]
            bounds += [
                np.array([n * self.context], np.int64),
                self.split.boundaries_in(start + 1, start + self.context) - start + n * self.context,
            ]
        return torch.from_numpy(np.unique(np.concatenate(bounds)))


def training_batch(split: Split, *, seed: int, position: int, batch_size: int, context: int) -> Batch:
    """The batch at a position in the data: ``batch_size`` windows drawn over the whole text.

    Only the raw words of numpy's Philox are used: their stream is fixed for good.
    """
    words = np.random.Philox(key=[seed, position]).random_raw(batch_size)
    starts = words % np.uint64(len(split) - context)
    return Batch(split, tuple(map(int, starts)), context, batch_size)


def evaluation_batches(split: Split, *, tokens: int, batch_size: int, context: int) -> Iterator[Batch]:
    """Windows spread evenly over ``split``, about ``tokens`` in all, the same on every call. The last batch is filled up
    with rows that do not count."""
    fit = (len(split) - 1) // context
    count = max(1, min(fit, tokens // context))
    starts = [n * fit // count * context for n in range(count)]
    for first in range(0, count, batch_size):
        rows = starts[first : first + batch_size]
        yield Batch(split, tuple(rows + rows[:1] * (batch_size - len(rows))), context, len(rows))


def check_fits(train: Split, held_out: Split, context: int, name: str) -> None:
    """Raise ValueError where a side of the corpus is too short for one sequence of ``context`` tokens."""
    for split, side in ((train, "training"), (held_out, "held-out")):
        if len(split) < context + 1:
            raise ValueError(
                f"the {side} part of {name} has {len(split)} tokens, too few for one sequence of "
                f"data.context + 1 = {context + 1}; lower data.context or give more text"
            )


def check_shards(context: int, rows: int, shard: Shard, *, separate: bool) -> None:
    """Raise ValueError where sequences do not divide by the layout."""
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
