"""Texts to the ids of a ``tokenizer.json``: those that ``tokenizer.encode`` gives for the whole text, whatever its length.

Encoding takes a few hundred bytes of memory per character, so that a long text goes through the tokenizer a window at a time.
Where two windows overlap, their tokens differ near the windows' edges only (a prepended space, a word cut in two, a merge or a
normalization across the edge). Windows are joined in the middle of a stretch where both have the same tokens; where there is
none, the window grows, in the end to the whole text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 2**22  # characters that are encoded at a time; a text that is not longer is encoded by one call
OVERLAP = 2**16  # characters that two windows share
_FEWEST_EQUAL = 16  # tokens that both windows must have alike before they are joined

Ids = NDArray[np.int64]


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a ``tokenizer.json``, without what was stored with it for batches: truncation, padding, BPE dropout.

    Raises:
        ImportError: the library is not installed.
        ValueError: there is no such file, or it is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError("tokenizer files need the tokenizers library: pip install 'race-dist[tokenizers]'") from None
    if not file.is_file():
        raise ValueError(f"there is no tokenizer file {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no file of the tokenizers library: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


@dataclass(frozen=True)
class _Window:
    """Tokens of a part of a text.

    Attributes:
        text: the part.
        starts, ends: ``[n]`` where each token begins and ends, in characters of the part.
        ids: ``[n]``.
    """

    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    ids: Ids

    def stretch(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens that begin at ``start`` or later and before ``stop``; none where tokens are not in order."""
        if (np.diff(self.starts) < 0).any():
            return 0, 0
        low, high = np.searchsorted(self.starts, [start, stop])
        return int(low), int(high)


class TextTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library.

    No special tokens are put around a text (``add_special_tokens=False``); special tokens that are written in a text are
    encoded as ``tokenizer.encode`` does.

    Attributes:
        tokenizer: of the library.
        known_ids: ``[n]`` ascending, every id that it has. There may be gaps.
        vocab_size: the largest id plus one.

    Args:
        file: the ``tokenizer.json``.
        window: characters that are encoded at a time.
        overlap: characters that two windows share; less than ``window``.

    Raises:
        ImportError: the library is not installed.
        ValueError: there is no such file, or it is no tokenizer, or one without tokens.
    """

    def __init__(self, file: Path, *, window: int = WINDOW, overlap: int = OVERLAP) -> None:
        self.tokenizer = load_tokenizer(file)
        self.known_ids: Ids = np.unique(np.fromiter(self.tokenizer.get_vocab(with_added_tokens=True).values(), np.int64))
        if not len(self.known_ids):
            raise ValueError(f"{file} is a tokenizer without tokens")
        self.vocab_size = int(self.known_ids[-1]) + 1
        self._file, self._window, self._overlap = file, window, overlap

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Ids]:
        """The ids of one text, that comes in pieces of UTF-8; a few of them at a time.

        Raises:
            ValueError: the tokenizer cannot encode the text.
        """
        source = _Characters(pieces)
        left = self._encode(source.take(self._window))
        emitted = 0  # tokens of the window that were handed out
        while fresh := source.take(self._window - self._overlap):
            right, low, high = self._join(left, fresh, emitted)
            yield left.ids[emitted:low]
            left, emitted = right, high
        yield left.ids[emitted:]

    def _encode(self, text: str) -> _Window:
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizer {self._file} cannot encode the text: {error}") from None
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        return _Window(text, offsets[:, 0], offsets[:, 1], np.asarray(encoding.ids, np.int64))

    def _join(self, left: _Window, fresh: str, emitted: int) -> tuple[_Window, int, int]:
        """Go on from a window with ``fresh`` text: the next window, and the first token of ``left`` and of the next one
        behind the place where they are joined."""
        overlap = self._overlap
        while overlap < len(left.text):
            right = self._encode(left.text[-overlap:] + fresh)
            shift, quarter = len(left.text) - overlap, overlap // 4
            a, b = left.stretch(shift + quarter, shift + 3 * quarter), right.stretch(quarter, 3 * quarter)
            if a[0] >= emitted and _equal(left, a, right, b, shift):
                return right, left.stretch(shift + 2 * quarter, 0)[0], right.stretch(2 * quarter, 0)[0]
            overlap *= 4
        grown = self._encode(left.text + fresh)
        before = max(0, emitted - _FEWEST_EQUAL)
        if not _equal(left, (before, emitted), grown, (before, emitted), 0, fewest=0):
            raise ValueError(
                f"the tokenizer {self._file} encodes a text of more than {self._window:,} characters otherwise "
                "wherever it is cut; split the text into documents"
            )
        return grown, emitted, emitted


def _equal(
    left: _Window, a: tuple[int, int], right: _Window, b: tuple[int, int], shift: int, fewest: int = _FEWEST_EQUAL
) -> bool:
    """Whether two windows have the same tokens in the same places, ``fewest`` of them or more."""
    x, y = slice(*a), slice(*b)
    return (
        a[1] - a[0] >= fewest
        and np.array_equal(left.ids[x], right.ids[y])
        and np.array_equal(left.starts[x] - shift, right.starts[y])
        and np.array_equal(left.ends[x] - shift, right.ends[y])
    )


class _Characters:
    """Characters of a text that comes in pieces of UTF-8."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._held, self._size = iter(pieces), list[str](), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def take(self, count: int) -> str:
        """The next ``count`` characters, fewer at the end of the text."""
        while self._size <= count:
            piece = next(self._pieces, None)
            if piece is None:
                self._held.append(self._decoder.decode(b"", final=True))
                break
            self._held.append(self._decoder.decode(piece))
            self._size += len(self._held[-1])
        text = "".join(self._held)
        self._held, self._size = [text[count:]], max(0, len(text) - count)
        return text[:count]
