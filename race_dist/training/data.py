"""Text as bytes: reading a corpus, holding a part of it out, and drawing batches.

A token is a byte. A batch is a function of (seed, step) alone: every rank draws the same global batch and takes its
own part, so the run does not depend on how the ranks are arranged, and a position in the data needs no state.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STDLIB = "python-stdlib"
HELD_OUT_EVERY = 10  # of ten blocks, the last is held out
BLOCK = 256 * 1024
MIN_BLOCKS = 20  # a small corpus gets smaller blocks, so that it has two to hold out
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """One side of a corpus cut into blocks: the training text (blocks 0 to 8 of each ten) or the held-out text.

    The blocks of a side stand one after the other as if they were one text.

    Attributes:
        tokens: the whole corpus.
        block: bytes a block.
        held_out: which side this is.
    """

    tokens: Bytes
    block: int
    held_out: bool

    def __len__(self) -> int:
        period, kept = HELD_OUT_EVERY * self.block, (HELD_OUT_EVERY - 1) * self.block
        periods, rest = divmod(len(self.tokens), period)
        return periods * self.block + max(0, rest - kept) if self.held_out else periods * kept + min(rest, kept)

    def read(self, start: int, length: int) -> Bytes:
        """``length`` bytes of this side from ``start``."""
        at = np.arange(start, start + length, dtype=np.int64)
        kept = (HELD_OUT_EVERY - 1) * self.block
        if self.held_out:
            at += (at // self.block + 1) * kept
        else:
            at += at // kept * self.block
        return np.asarray(self.tokens[at])


@dataclass(frozen=True)
class Corpus:
    """A text and its two sides.

    Attributes:
        name: what it is called in messages.
        tokens: its bytes; a memory map where it is one file.
    """

    name: str
    tokens: Bytes

    @property
    def block(self) -> int:
        """Bytes a block of the split."""
        return max(1, min(BLOCK, len(self.tokens) // MIN_BLOCKS))

    @property
    def train(self) -> Split:
        """Nine blocks of ten."""
        return Split(self.tokens, self.block, held_out=False)

    @property
    def held_out(self) -> Split:
        """Every tenth block."""
        return Split(self.tokens, self.block, held_out=True)

    def digest(self) -> str:
        """Of the length and of pieces all over the text, for ranks to compare: quick for any size."""
        size, pieces, piece = len(self.tokens), 256, 4096
        digest = hashlib.sha256(str(size).encode())
        for n in range(pieces):
            start = n * max(0, size - piece) // (pieces - 1)
            digest.update(self.tokens[start:start + piece].tobytes())
        return digest.hexdigest()


def load_corpus(path: str, pattern: str = "*") -> Corpus:
    """Read ``"python-stdlib"``, a text file or a folder of text files (UTF-8).

    The files of a folder are read in the order of their relative paths; hidden ones are left out, and of files with
    the same content only the first is kept, so that no held-out file is also trained on.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no text there, or a file that is not UTF-8 text; the message names it.
    """
    if path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return Corpus(STDLIB, _join(path, (text for file in _tree(root, "*.py") if (text := _utf8(file)) is not None)))
    source = Path(path).expanduser()
    if source.is_dir():
        return Corpus(path, _join(path, (_required(file) for file in _tree(source, pattern))))
    if not source.is_file():
        raise FileNotFoundError(f"data.path: there is no file or folder {source}")
    if source.stat().st_size == 0:
        raise ValueError(f"data.path: {source} is empty")
    tokens: Bytes = np.memmap(source, dtype=np.uint8, mode="r")
    _check_utf8(tokens, source)
    return Corpus(path, tokens)


def _tree(root: Path, pattern: str) -> Iterator[Path]:
    """The files under ``root`` whose names match, in the order of their paths; the same on every machine."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = (file for file in found if file.match(pattern) and file.is_file())
    return iter(sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def _join(path: str, texts: Iterator[bytes]) -> Bytes:
    """The texts one after the other, each content once."""
    seen: dict[bytes, bytes] = {}
    for text in texts:
        seen.setdefault(hashlib.sha256(text).digest(), text)
    joined = b"".join(seen.values())
    if not joined:
        raise ValueError(f"data.path: no text was found in {path}; give a text file, or a folder and data.pattern")
    return np.frombuffer(joined, dtype=np.uint8)


def _utf8(file: Path) -> bytes | None:
    """The file's bytes, None where they are not UTF-8 text."""
    text = file.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return text


def _required(file: Path) -> bytes:
    text = _utf8(file)
    if text is None:
        raise ValueError(f"data.path: {file} is not UTF-8 text; leave it out with data.pattern, for example \"*.txt\"")
    return text


def _check_utf8(tokens: Bytes, source: Path, piece: int = 2**24) -> None:
    """Raise ValueError unless the bytes are UTF-8; reads them in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(tokens), piece):
        end = min(start + piece, len(tokens))
        try:
            decoder.decode(tokens[start:end].tobytes(), final=end == len(tokens))
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: {source} is not UTF-8 text (near byte {start + error.start}): "
                             "convert it, for example with iconv") from None


def training_batch(split: Split, *, seed: int, step: int, batch_size: int, context: int) -> Bytes:
    """The global batch of a step: ``[batch_size, context + 1]`` bytes, inputs and the target after each.

    Only the raw words of numpy's Philox are used: their stream is fixed for good.
    """
    words = np.random.Philox(key=[seed, step]).random_raw(batch_size)
    starts = words % np.uint64(len(split) - context)
    return np.stack([split.read(int(start), context + 1) for start in starts])


def evaluation_batches(split: Split, *, tokens: int, batch_size: int, context: int) -> Iterator[tuple[Bytes, int]]:
    """Windows spread evenly over ``split``, about ``tokens`` in all, the same on every call.

    Yields:
        ``[batch_size, context + 1]`` bytes and how many of the rows count; the last batch is filled up with others.
    """
    fit = (len(split) - 1) // context
    count = max(1, min(fit, tokens // context))
    windows = [split.read(n * fit // count * context, context + 1) for n in range(count)]
    for first in range(0, count, batch_size):
        rows = windows[first:first + batch_size]
        yield np.stack(rows + rows[:1] * (batch_size - len(rows))), len(rows)


def check_fits(corpus: Corpus, context: int) -> None:
    """Raise ValueError where a side of the corpus is too short for one sequence of ``context`` tokens."""
    for split, name in ((corpus.train, "training"), (corpus.held_out, "held-out")):
        if len(split) < context + 1:
            raise ValueError(f"the {name} part of {corpus.name} has {len(split)} bytes, too few for one sequence of "
                             f"data.context + 1 = {context + 1}; lower data.context or give more text")
