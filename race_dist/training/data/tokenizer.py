"""Encoding text of any length with a ``tokenizer.json``; the ids are those of ``tokenizer.encode`` of the whole text.

Encoding takes a few hundred bytes of memory per character, so a long text is encoded in overlapping windows. In the overlap the
tokens of two windows differ only near the edges (a prepended space, a split word, a merge or a normalization across the edge).
Two windows are joined in the middle of a range where both have the same tokens; if there is no such range, the window grows, in
the end to the whole text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 2**22  # characters per window; a text that is not longer is encoded by one call
OVERLAP = 2**16  # characters that two windows share
_MIN_EQUAL = 16  # equal tokens that two windows need to be joined

Ids = NDArray[np.int64]


def load_tokenizer(file: Path) -> Any:
    """Load a ``tokenizer.json``. Truncation, padding and BPE dropout that are stored in it are turned off.

    Raises:
        ImportError: the library is not installed.
        ValueError: the file does not exist or is not a tokenizer.
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
    """The tokens of one window of a text.

    Attributes:
        text: the characters of the window.
        starts, ends: ``[n]`` first and last + 1 character of each token.
        ids: ``[n]`` token ids.
    """

    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    ids: Ids

    def token_range(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens that begin in ``[start, stop)``, as a range; empty if the tokens are not in order."""
        if (np.diff(self.starts) < 0).any():
            return 0, 0
        low, high = np.searchsorted(self.starts, [start, stop])
        return int(low), int(high)


class TextTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library.

    No special tokens are added (``add_special_tokens=False``); special tokens that are written in a text are encoded as
    ``tokenizer.encode`` does.

    Attributes:
        tokenizer: the library's object.
        known_ids: ``[n]`` all ids, ascending. There may be gaps.
        vocab_size: the largest id + 1.

    Args:
        file: the ``tokenizer.json``.
        window: characters per window.
        overlap: characters that two windows share; less than ``window``.

    Raises:
        ImportError: the library is not installed.
        ValueError: the file does not exist, is not a tokenizer, or has no tokens.
    """

    def __init__(self, file: Path, *, window: int = WINDOW, overlap: int = OVERLAP) -> None:
        self.tokenizer = load_tokenizer(file)
        self.known_ids: Ids = np.unique(np.fromiter(self.tokenizer.get_vocab(with_added_tokens=True).values(), np.int64))
        if not len(self.known_ids):
            raise ValueError(f"{file} is a tokenizer without tokens")
        self.vocab_size = int(self.known_ids[-1]) + 1
        self._file, self._window, self._overlap = file, window, overlap

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Ids]:
        """The ids of one text that is given as pieces of UTF-8, in several arrays.

        Raises:
            ValueError: the tokenizer cannot encode the text.
        """
        source = _Characters(pieces)
        left = self._encode(source.take(self._window))
        emitted = 0  # tokens of the window that were yielded
        while next_text := source.take(self._window - self._overlap):
            right, low, high = self._join(left, next_text, emitted)
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

    def _join(self, left: _Window, next_text: str, emitted: int) -> tuple[_Window, int, int]:
        """Encode the next window, and join it to the previous one.

        Args:
            left: the previous window.
            next_text: the text after it.
            emitted: tokens of ``left`` that were yielded.

        Returns:
            The next window, and the first token after the join in ``left`` and in the next window.
        """
        overlap = self._overlap
        while overlap < len(left.text):
            right = self._encode(left.text[-overlap:] + next_text)
            shift, quarter = len(left.text) - overlap, overlap // 4
            a, b = left.token_range(shift + quarter, shift + 3 * quarter), right.token_range(quarter, 3 * quarter)
            if a[0] >= emitted and _equal(left, a, right, b, shift):
                return right, left.token_range(shift + 2 * quarter, 0)[0], right.token_range(2 * quarter, 0)[0]
            overlap *= 4
        grown = self._encode(left.text + next_text)
        before = max(0, emitted - _MIN_EQUAL)
        if not _equal(left, (before, emitted), grown, (before, emitted), 0, fewest=0):
            raise ValueError(
                f"the tokenizer {self._file} encodes a text of more than {self._window:,} characters otherwise "
                "wherever it is cut; split the text into documents"
            )
        return grown, emitted, emitted


def _equal(left: _Window, a: tuple[int, int], right: _Window, b: tuple[int, int], shift: int, fewest: int = _MIN_EQUAL) -> bool:
    """Whether two windows have the same tokens at the same positions, at least ``fewest`` of them."""
    x, y = slice(*a), slice(*b)
    return (
        a[1] - a[0] >= fewest
        and np.array_equal(left.ids[x], right.ids[y])
        and np.array_equal(left.starts[x] - shift, right.starts[y])
        and np.array_equal(left.ends[x] - shift, right.ends[y])
    )


class _Characters:
    """The characters of a text that is given as pieces of UTF-8."""

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
