"""The corpus: its tokens, its document boundaries, and the split into training text and held-out text.

A token is a byte of UTF-8 text, unless the corpus was packed with a tokenizer (:mod:`race_dist.training.data.packed`).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from race_dist.training.data.text_files import (
    STDLIB,
    SkippedFiles,
    check_pattern,
    find_texts,
    printable,
    read_utf8,
    stdlib_texts,
    utf8_pieces,
)

HELD_OUT_EVERY = 10  # of ten blocks or documents, the last is held out; for "tail", the last tenth of the text
BLOCK = 256 * 1024
MIN_BLOCKS = 20  # a small corpus gets smaller blocks, so that two of them are held out
LARGEST_IN_MEMORY = 2**31  # bytes of a folder that is read without packing
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
        held = (piece >= 0) & (inner < stops[piece]) & (inner > starts[piece])
        moved = inner[held] - starts[piece[held]] + ends[piece[held]]
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


def expand_home(path: str, option: str = "data.path") -> Path:
    """Expand ``~`` or ``~USER``. Raises ValueError, naming ``option``, if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{option}: {path!r} begins with a home folder that is not there: write the whole path") from None


def load_corpus(path: str, pattern: str = "*", *, check: bool = True, option: str = "data.path") -> Corpus:
    """Read ``"python-stdlib"``, a text file, a folder of text files (UTF-8), or a corpus packed by ``race-dist data pack``.

    The files of a folder are its documents, in the order of their relative paths; symbolic links to folders are followed.
    Hidden files are skipped. Of files with the same content only the first is read, so that no held-out file is also in the
    training text. ``Corpus.skipped`` names what was not read.

    Args:
        path: as above.
        pattern: of the names of a folder's files.
        check: whether to check that a text file is UTF-8, which reads it once.
        option: the key or option that the path comes from, for error messages.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: there is no text, a file is not UTF-8 text, or a packed corpus was truncated or changed; the message names
            the file.
    """
    from race_dist.training.data.packed import is_packed, open_packed

    check_pattern(path, pattern)
    if path == STDLIB:
        return _join(path, stdlib_texts(), None, option)
    source = expand_home(path, option)
    if is_packed(source):
        if pattern != "*":
            raise ValueError(f"data.pattern = {pattern!r} picks files of a folder, but {path} is a packed corpus; leave it out")
        return open_packed(source)
    if source.is_dir():
        files, skipped = find_texts(source, pattern)
        return _join(path, files, skipped, option)
    if not source.is_file():
        what = f"{source} is no regular file" if source.exists() else f"there is no file or folder {source}"
        raise FileNotFoundError(f"{option}: {what}")
    if source.stat().st_size == 0:
        raise ValueError(f"{option}: {source} is empty")
    if check:
        for _ in utf8_pieces(source):
            pass
    return Corpus(path, np.memmap(source, dtype=np.uint8, mode="r"))


def _join(path: str, files: Iterable[Path], skipped: SkippedFiles | None, option: str) -> Corpus:
    """Concatenate the files' texts, each content once. Files that are not read are added to ``skipped``; None: files that
    are not text are expected."""
    seen: dict[bytes, bytes] = {}
    total = 0
    packed = 'data.path = "CORPUS"' if option == "data.path" else f"{option} CORPUS"
    for file in files:
        text = read_utf8(file)
        if text is None:
            if skipped is None:
                continue
            others = "pick other files with data.pattern, " if option == "data.path" else ""
            raise ValueError(
                f"{option}: {printable(file)} is not UTF-8 text; convert it (iconv -t UTF-8), {others}or pack the "
                f"folder without such files: race-dist data pack {path} --out CORPUS --skip-undecodable, then "
                f"{packed}"
            )
        key = hashlib.sha256(text).digest()
        if text and key not in seen:
            seen[key] = text
            total += len(text)
        elif text and skipped is not None:
            skipped.add(file, "has the content of another file")
        if total > LARGEST_IN_MEMORY:
            raise ValueError(
                f"{option}: the files in {path} are more than {LARGEST_IN_MEMORY // 2**30} GiB of text, which "
                "every rank would hold in memory; pack them first: race-dist data pack "
                f"{path} --out CORPUS, then {packed}"
            )
    if not total:
        raise ValueError(f"{option}: no text was found in {path}: its files are empty; give a text file, or a folder of them")
    ends = np.cumsum([0, *map(len, seen.values())]).astype(np.int64)
    return Corpus(path, np.frombuffer(b"".join(seen.values()), dtype=np.uint8), ends, skipped=skipped or SkippedFiles())
