"""A long text in chunks: split, sharded over the ranks, and prefetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import group_rank, group_size, shard_lengths

Tokens = Tensor | np.ndarray
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of the whole sequence, and the boundaries of documents inside it."""

    index: int
    start: int
    stop: int
    cu_seqlens: Tensor | None


class LoadedChunk(NamedTuple):
    """A chunk with this rank's tokens and labels, each ``[B, T]`` int64 on the model's device."""

    chunk: Chunk
    ids: Tensor
    labels: Tensor


class ChunkedTokens:
    """Tokens and their labels, each ``[B, T]``, in chunks of ``chunk_size`` tokens per rank.

    Attributes:
        batch, length: B and T.
        step: tokens of each row in a chunk, over all ranks.
        count: the number of chunks.
    """

    def __init__(
        self,
        input_ids: Tokens,
        labels: Tokens,
        chunk_size: int,
        group: ProcessGroup | None,
        cu_seqlens: Tensor | None,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        for name, tokens in (("input_ids", input_ids), ("labels", labels)):
            _check_tokens(name, tokens)
        chunk_size = checks.integer("chunk_size", chunk_size, minimum=1, maximum=2**62)
        if input_ids.ndim != 2 or tuple(input_ids.shape) != tuple(labels.shape):
            raise ValueError(f"input_ids and labels must both be [B, T]; got {list(input_ids.shape)} and {list(labels.shape)}")
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids holds no tokens: [B, T] needs T of at least 1")
        checks.cu_seqlens(cu_seqlens)
        if cu_seqlens is not None and (input_ids.shape[0] != 1 or int(cu_seqlens[-1]) != input_ids.shape[1]):
            raise ValueError(
                f"cu_seqlens must end at T = {input_ids.shape[1]} with B = 1; it ends at {int(cu_seqlens[-1])} "
                f"with B = {input_ids.shape[0]}"
            )
        self.ids, self.labels, self._group, self._device = input_ids, labels, group, device
        self._vocab_size = vocab_size
        self._boundaries = None if cu_seqlens is None else cu_seqlens[1:-1].unique().tolist()
        self.batch, self.length = int(input_ids.shape[0]), int(input_ids.shape[1])
        self.step = chunk_size * group_size(group)
        self.count = -(-self.length // self.step)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def chunk(self, index: int) -> Chunk:
        """The chunk with that index."""
        start = index * self.step
        stop = min(start + self.step, self.length)
        return Chunk(index, start, stop, self._documents(start, stop))

    def _documents(self, start: int, stop: int) -> Tensor | None:
        """The boundaries of documents inside a chunk. A boundary at its start leaves the first document, which continues the
        carry, empty; a boundary at its end belongs to the next chunk."""
        if self._boundaries is None:
            return None
        inside = [b - start for b in self._boundaries if start <= b < stop and b > 0]
        return torch.tensor([0, *inside, stop - start], dtype=torch.int64, device=self._device)

    def count_targets(self) -> int:
        """The number of targets in the whole sequence, counted piece by piece."""
        if isinstance(self.labels, np.ndarray) and self.labels.dtype.kind == "u":
            return self.batch * self.length
        step = max(self.step, 2**22)
        pieces = (self.labels[:, start : start + step] for start in range(0, self.length, step))
        return sum(int((piece != IGNORE_INDEX).sum()) for piece in pieces)

    def read(self, indices: Iterable[int]) -> Iterator[LoadedChunk]:
        """Chunks in the given order. A thread reads the next chunk and copies it to the device while one is processed."""
        with ThreadPoolExecutor(1, thread_name_prefix="race_dist-text") as reader:
            order = iter(indices)
            pending = None
            for index in order:
                pending = reader.submit(self._fetch, index)
                break
            while pending is not None:
                chunk, ids, labels, copied = pending.result()
                following = next(order, None)
                pending = None if following is None else reader.submit(self._fetch, following)
                if copied is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(copied)
                    for x in (ids, labels):
                        x.record_stream(stream)
                yield LoadedChunk(chunk, ids.to(torch.int64), labels.to(torch.int64))

    def _fetch(self, index: int) -> tuple[Chunk, Tensor, Tensor, torch.cuda.Event | None]:
        """This rank's shard of a chunk, on the device once the event has passed. Runs on the reader's thread."""
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            chunk = self.chunk(index)
            first, last = self._shard(chunk)
            ids, labels = (
                self._copy_to_device(x, name, first, last) for name, x in (("input_ids", self.ids), ("labels", self.labels))
            )
            if self._copies is None:
                return chunk, ids, labels, None
            event = torch.cuda.Event()
            event.record(self._copies)
            return chunk, ids, labels, event

    def _shard(self, chunk: Chunk) -> tuple[int, int]:
        """The first token of this rank's contiguous shard of a chunk in the sequence, and the token after its last."""
        lengths = shard_lengths(chunk.stop - chunk.start, group_size(self._group))
        rank = group_rank(self._group)
        first = chunk.start + sum(lengths[:rank])
        return first, first + lengths[rank]

    def _copy_to_device(self, x: Tokens, name: str, first: int, last: int) -> Tensor:
        """This rank's tokens in their own dtype, being copied to the device."""
        part: Any = x[:, first:last]
        if isinstance(part, np.ndarray):
            narrow = part.dtype in (np.uint8, np.int16, np.int32)
            part = torch.from_numpy(part.copy() if narrow else part.astype(np.int64))
        if part.device.type == "cpu":
            self._check_range(name, part)
        if self._device.type == "cuda" and part.device.type == "cpu":
            part = part.contiguous().pin_memory()
        return part.to(device=self._device, non_blocking=True)

    def _check_range(self, name: str, part: Tensor) -> None:
        """Raise ValueError for ids outside the vocabulary: on a device they would abort the process."""
        if name == "labels" and part.dtype != torch.uint8:
            part = part.masked_fill(part == IGNORE_INDEX, 0)
        if part.numel() == 0:
            return
        low, high = (int(bound) for bound in part.aminmax())
        if low < 0 or high >= self._vocab_size:
            also = f" (or {IGNORE_INDEX})" if name == "labels" else ""
            raise ValueError(
                f"{name} must be from 0 to vocab_size - 1 = {self._vocab_size - 1}{also}; got {low if low < 0 else high}"
            )


def _check_tokens(name: str, x: Tokens) -> None:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array; got {checks.typed_repr(x)}")
    if isinstance(x, Tensor):
        checks.tensor(name, x)
    is_integer = np.issubdtype(x.dtype, np.integer) if isinstance(x, np.ndarray) else x.dtype in INTEGER_DTYPES
    if not is_integer:
        raise TypeError(f"{name} must be integers; got {x.dtype}")
