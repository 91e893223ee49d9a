"""A tokenized text: its document boundaries, and its splits into training text and held-out text."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from race_dist.training.data.text_files import SkippedFiles

HELD_OUT_EVERY = 10  # of ten blocks or documents, the last is held out; for "tail", the last tenth of the text
BLOCK = 256 * 1024
MIN_BLOCKS = 20  # a small corpus gets smaller blocks, so that two of them are held out
BYTE_VOCAB = 256
_FAULT_AROUND = 2**16  # bytes that the kernel maps around a page on a page fault

Tokens = NDArray[Any]  # uint8, uint16 or uint32, [N]
HeldOut = Literal["blocks", "documents", "tail"]


@dataclass(frozen=True)
class Split:
    """The training text or the held-out text: pieces of a corpus, read as one text.

    Attributes:
        tokens: the whole corpus.
        starts: ``[S]`` first token of each piece in the corpus.
        ends: ``[S + 1]`` first token of each piece in this split; the last entry is the length of the split.
        boundaries: ``[K]`` ascending, where documents begin in this split, without 0; None: one document.
    """

    tokens: Tokens
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    boundaries: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, length: int) -> Tokens:
        """A copy of ``length`` tokens from ``start``. Pages of a memory map are released, so that reading a whole corpus does
        not fill the memory."""
        pieces = [_copied(self.tokens, a, b) for a, b in self._ranges(start, length)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def view(self, start: int, length: int) -> Tokens:
        """The same without a copy if the tokens are contiguous: then they are read when they are used."""
        ranges = self._ranges(start, length)
        return self.tokens[ranges[0][0] : ranges[0][1]] if len(ranges) == 1 else self.read(start, length)

    def boundaries_in(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document boundaries b with ``start <= b < stop``."""
        if self.boundaries is None:
            return np.empty(0, np.int64)
        low, high = np.searchsorted(self.boundaries, [start, stop])
        return self.boundaries[low:high]

    def _ranges(self, start: int, length: int) -> list[tuple[int, int]]:
        """``length`` tokens from ``start``, as ranges of the corpus."""
        assert 0 <= start <= start + length <= len(self), (start, length, len(self))
        ranges, at, stop = [], start, start + length
        piece = int(np.searchsorted(self.ends, start, side="right")) - 1
        while at < stop:
            begin = int(self.starts[piece]) + at - int(self.ends[piece])
            count = min(stop, int(self.ends[piece + 1])) - at
            ranges.append((begin, begin + count))
            at, piece = at + count, piece + 1
        return ranges or [(0, 0)]


@dataclass(frozen=True)
class Corpus:
    """A tokenized text.

    Attributes:
        name: for messages.
        tokens: ``[N]``; a memory map if the corpus is one file.
        documents: ``[D + 1]`` first token of each document, and N; None: one document.
        vocab_size: every token is smaller.
        text_bytes: bytes of UTF-8 text in the corpus; None: N.
        tokenizer: the tokenizer file; None: tokens are bytes.
        skipped: files of the folder that were not read.
    """

    name: str
    tokens: Tokens
    documents: NDArray[np.int64] | None = None
    vocab_size: int = BYTE_VOCAB
    text_bytes: int | None = None
    tokenizer: Path | None = None
    skipped: SkippedFiles = field(default_factory=SkippedFiles)

    @property
    def bytes_per_token(self) -> float:
        """Average over the whole corpus."""
        return 1.0 if self.text_bytes is None else self.text_bytes / len(self.tokens)

    @property
    def block(self) -> int:
        """Tokens per block, for ``held_out = "blocks"``."""
        return max(1, min(BLOCK, len(self.tokens) // MIN_BLOCKS))

    @property
    def train(self) -> Split:
        """Nine blocks of ten, as one document."""
        return self.split()[0]

    @property
    def held_out(self) -> Split:
        """Every tenth block, as one document."""
        return self.split()[1]

    def split(self, held_out: HeldOut = "blocks", *, separate: bool = False) -> tuple[Split, Split]:
        """The training split and the held-out split.

        Args:
            held_out: "blocks" (every tenth block of 256 Ki tokens), "documents" (every tenth) or "tail" (the last tenth,
                so that the training split is contiguous).
            separate: whether documents stay separate; otherwise each split is one document.

        Raises:
            ValueError: the split needs documents and the corpus is one document.
        """
        size = len(self.tokens)
        if (separate or held_out == "documents") and (self.documents is None or len(self.documents) < 3):
            key = 'data.documents = "separate"' if separate else 'data.held_out = "documents"'
            raise ValueError(
                f"{key} needs several documents, but {self.name} is one; leave it out, or give a folder or a packed corpus"
            )
        if held_out == "tail":
            bounds = np.array([0, size - size // HELD_OUT_EVERY, size], np.int64)
            out = np.array([False, True])
        elif held_out == "documents":
            assert self.documents is not None
            bounds = self.documents
            out = np.arange(len(bounds) - 1) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if len(out) < HELD_OUT_EVERY:
                out[-1] = True
        else:
            bounds = np.append(np.arange(0, size, self.block, dtype=np.int64), np.int64(size))
            out = np.arange(len(bounds) - 1) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self._take(bounds, ~out, separate), self._take(bounds, out, separate)

    def whole(self, *, separate: bool = False) -> Split:
        """The whole corpus as one split."""
        bounds = np.array([0, len(self.tokens)], np.int64)
        return self._take(bounds, np.array([True]), separate)

    def _take(self, bounds: NDArray[np.int64], chosen: NDArray[np.bool_], separate: bool) -> Split:
        """The split of the chosen pieces; adjacent pieces are merged."""
        edge = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
        starts, stops = bounds[:-1][edge[:-1] == 1], bounds[1:][edge[1:] == -1]
        ends = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        if not separate:
            return Split(self.tokens, starts, ends)
        assert self.documents is not None
        inner = self.documents[1:-1]
        piece = np.searchsorted(starts, inner, side="right") - 1
        inside = (piece >= 0) & (inner < stops[piece]) & (inner > starts[piece])
        moved = inner[inside] - starts[piece[inside]] + ends[piece[inside]]
        return Split(self.tokens, starts, ends, np.union1d(moved, ends[1:-1]))

    def digest(self) -> str:
        """Checksum of the length and of samples of the text, for ranks to compare. Its cost does not depend on the length."""
        return sample_digest(self.tokens)

    def documents_digest(self) -> str:
        """SHA-256 of the document boundaries, as hexadecimal."""
        starts = np.array([0, len(self.tokens)]) if self.documents is None else self.documents
        return hashlib.sha256(np.asarray(starts, dtype="<i8").tobytes()).hexdigest()


def sample_digest(tokens: Tokens, pieces: int = 256, piece: int = 4096) -> str:
    """SHA-256 of the length and of ``pieces`` samples spread over the tokens, as hexadecimal."""
    size = len(tokens)
    digest = hashlib.sha256(f"{size} {tokens.dtype.itemsize}".encode())
    for n in range(pieces):
        start = n * max(0, size - piece) // (pieces - 1)
        digest.update(_copied(tokens, start, min(size, start + piece)).tobytes())
    return digest.hexdigest()


def _copied(tokens: Tokens, start: int, stop: int) -> Tokens:
    """A copy of ``tokens[start:stop]``. Pages of a memory map are unmapped; they stay in the system's page cache."""
    copy = np.array(tokens[start:stop])
    mapped = getattr(tokens, "_mmap", None)
    if isinstance(tokens, np.memmap) and isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        low = start * tokens.itemsize // _FAULT_AROUND * _FAULT_AROUND
        high = min(len(mapped), -(-stop * tokens.itemsize // _FAULT_AROUND) * _FAULT_AROUND)
        if high > low:
            mapped.madvise(mmap.MADV_DONTNEED, low, high - low)
    return copy
