"""Packed corpora: a folder with one memory-mapped token file and an index of the documents.

    corpus.json      format, counts, dtype of the tokens, checksums
    tokens.bin       [N] uint8 (bytes), uint16 or uint32, little-endian
    documents.bin    [D + 1] int64: first token of each document, and N
    tokenizer.json   the tokenizer, if tokens are not bytes

Packing streams the text; training on a packed corpus reads only the tokens of its batches.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from race_dist.files import DamagedFileError, read_json_object, verify_json, write_checksummed_json
from race_dist.output_paths import check_output_folder
from race_dist.training.data.splits import BYTE_VOCAB, Corpus, sample_digest
from race_dist.training.data.text_files import (
    STDLIB,
    SkippedFiles,
    Undecodable,
    check_pattern,
    expand_home,
    find_texts,
    stdlib_texts,
    utf8_pieces,
)
from race_dist.training.data.tokenizer import TextTokenizer, load_tokenizer

__all__ = ["is_packed", "load_tokenizer", "open_packed", "pack", "verify_packed"]

FORMAT = 1
INDEX, TOKENS, DOCUMENTS, TOKENIZER = "corpus.json", "tokens.bin", "documents.bin", "tokenizer.json"
_KINDS = {
    "format": int,
    "tokens": int,
    "documents": int,
    "dtype": str,
    "vocab_size": int,
    "text_bytes": int,
    "sample": str,
    "sha256": dict,
}
_PIECE = 2**22


class Encode(Protocol):
    """Text to tokens."""

    vocab_size: int
    dtype: str

    def __call__(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The tokens of a document, given as pieces of UTF-8, as bytes of ``dtype``."""
        ...


class ByteEncode:
    """A token is a byte."""

    vocab_size, dtype = BYTE_VOCAB, "<u1"

    def __call__(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        return iter(pieces)


class TokenizerEncode:
    """A ``tokenizer.json`` of the ``tokenizers`` library; no special tokens are added. ``dtype`` holds the largest token id."""

    def __init__(self, file: Path) -> None:
        self._tokenizer = TextTokenizer(file)
        self.vocab_size = self._tokenizer.vocab_size
        self.dtype = "<u2" if self.vocab_size <= 2**16 else "<u4"

    def __call__(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        return (ids.astype(self.dtype).tobytes() for ids in self._tokenizer.encode(pieces))


@dataclass
class _Writer:
    """Writes documents one after the other to an open file."""

    file: IO[bytes]
    encode: Encode
    one_document: bool
    starts: list[int] = field(default_factory=lambda: [0])
    text_bytes: int = 0
    seen: set[bytes] = field(default_factory=set)

    def add(self, pieces: Iterator[bytes]) -> bool:
        """Write one document; False if it is skipped because an earlier one has the same content."""
        content, before, text = hashlib.sha256(), self.file.tell(), 0

        def hashed_pieces() -> Iterator[bytes]:
            nonlocal text
            for piece in pieces:
                content.update(piece)
                text += len(piece)
                yield piece

        for tokens in self.encode(hashed_pieces()):
            self.file.write(tokens)
        if content.digest() in self.seen:
            self.file.seek(before)
            self.file.truncate()
            return False
        self.seen.add(content.digest())
        self.text_bytes += text
        end = self.file.tell() // np.dtype(self.encode.dtype).itemsize
        if end > self.starts[-1]:
            self.starts.append(end)
        return True

    def bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Document boundaries, ``[D + 1]``."""
        return np.array([0, self.starts[-1]] if self.one_document else self.starts, dtype="<i8")


def pack(
    path: str,
    out: Path,
    *,
    pattern: str = "*",
    tokenizer: Path | None = None,
    one_document: bool = False,
    skip_undecodable: bool = False,
    progress: Callable[[Path], None] | None = None,
) -> Corpus:
    """Pack a text file, a folder or ``"python-stdlib"`` into the folder ``out``, atomically.

    Args:
        path: the text; files are read in the order of their paths, each content once.
        out: must not exist.
        pattern: of the names of a folder's files.
        tokenizer: a ``tokenizer.json``; None: tokens are bytes.
        one_document: whether all files are one long document.
        skip_undecodable: skip files that are not UTF-8 instead of raising.
        progress: called with each file.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: the path does not exist.
        OSError: a file cannot be read, or ``out`` cannot be written; the message names it.
        ValueError: there is no text, or a file is not UTF-8.
    """
    check_output_folder(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    files, skipped = _sources(path, pattern)
    encode = ByteEncode() if tokenizer is None else TokenizerEncode(tokenizer)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with (partial / TOKENS).open("wb") as file:
            writer = _Writer(file, encode, one_document)
            for source in files:
                if progress is not None:
                    progress(source)
                _add(writer, source, skip_undecodable or path == STDLIB, skipped)
        bounds = writer.bounds()
        if not bounds[-1]:
            raise ValueError(f"no text was found in {path}: its files are empty{skipped.describe('; left out')}")
        (partial / DOCUMENTS).write_bytes(bounds.tobytes())
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER)
        _write_index(partial, encode, len(bounds) - 1, writer.text_bytes, path)
        try:
            partial.rename(out)
        except OSError as error:
            if not out.exists():
                raise
            raise FileExistsError(
                f"{out} was made by another process while this one packed; choose another --out or remove it ({error.strerror})"
            ) from None
    except OSError as error:
        if error.strerror is None or isinstance(error, FileExistsError):  # the message names it already
            raise
        raise OSError(f"{out} could not be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(open_packed(out), skipped=skipped if path != STDLIB else SkippedFiles())


def _sources(path: str, pattern: str) -> tuple[list[Path], SkippedFiles]:
    check_pattern(path, pattern)
    if path == STDLIB:
        return stdlib_texts(), SkippedFiles()
    source = expand_home(path, "PATH")
    if is_packed(source):
        raise ValueError(f"{source} is a packed corpus already; give the text that it was packed from")
    if source.is_dir():
        return find_texts(source, pattern)
    if not source.is_file():
        what = "is no regular file" if source.exists() else "is no file or folder"
        raise FileNotFoundError(f"{source} {what}; give a text file or a folder")
    return [source], SkippedFiles()


def _add(writer: _Writer, source: Path, skip: bool, skipped: SkippedFiles) -> None:
    before = writer.file.tell()
    try:
        if not writer.add(utf8_pieces(source, _PIECE)):
            skipped.add(source, "has the content of another file")
    except Undecodable as error:
        if not skip:
            raise Undecodable(f"{error}, or leave such files out with --skip-undecodable") from None
        skipped.add(source, "is not UTF-8 text")
        writer.file.seek(before)
        writer.file.truncate()


def _write_index(folder: Path, encode: Encode, documents: int, text_bytes: int, source: str) -> None:
    tokens = np.memmap(folder / TOKENS, dtype=encode.dtype, mode="r")
    index = {
        "format": FORMAT,
        "tokens": len(tokens),
        "documents": documents,
        "dtype": encode.dtype,
        "vocab_size": encode.vocab_size,
        "text_bytes": text_bytes,
        "source": source,
        "sample": sample_digest(tokens),
        "sha256": {name: _sha256(folder / name) for name in (TOKENS, DOCUMENTS, TOKENIZER) if (folder / name).is_file()},
    }
    write_checksummed_json(folder / INDEX, index)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def is_packed(path: Path) -> bool:
    """Whether a folder is a packed corpus, even one that has lost its index: its files must not be read as text."""
    return (path / INDEX).is_file() or all((path / name).is_file() for name in (TOKENS, DOCUMENTS))


def open_packed(path: Path) -> Corpus:
    """Map a packed corpus. Verified are the index, the documents, the tokenizer, the number of tokens and samples of them;
    :func:`verify_packed` reads all tokens.

    Raises:
        ValueError: a file is missing, truncated or changed; the message names it.
    """
    index = _read_index(path)
    size = np.dtype(index["dtype"]).itemsize
    for name, expected in ((TOKENS, size * index["tokens"]), (DOCUMENTS, 8 * (index["documents"] + 1))):
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != expected:
            raise ValueError(
                f"{path / name} has {found:,} bytes, but {expected:,} were packed: "
                f"{'it was cut short' if found < expected else 'it was changed'}; pack the text again"
            )
    tokens = np.memmap(path / TOKENS, dtype=index["dtype"], mode="r")
    documents = np.fromfile(path / DOCUMENTS, dtype="<i8")
    if documents[0] != 0 or documents[-1] != len(tokens) or (np.diff(documents) < 1).any():
        raise ValueError(
            f"{path / DOCUMENTS} is damaged: documents do not follow each other from 0 to {len(tokens):,}; pack the text again"
        )
    if sample_digest(tokens) != index["sample"]:
        raise ValueError(f"{path / TOKENS} is not what was packed (samples of it differ); pack the text again")
    for name in (DOCUMENTS, TOKENIZER):  # small files, which are read completely anyway
        if name in index["sha256"]:
            _check_sha256(path, name, index)
    tokenizer = path / TOKENIZER if TOKENIZER in index["sha256"] else None  # a file that the index does not list is ignored
    return Corpus(str(path), tokens, documents, index["vocab_size"], index["text_bytes"], tokenizer)


def verify_packed(path: Path) -> Corpus:
    """Read a packed corpus completely and compare its checksums. Raises ValueError, naming the file, if a file was changed or a
    token is outside the vocabulary."""
    corpus = open_packed(path)
    index = _read_index(path)
    for name in index["sha256"]:
        _check_sha256(path, name, index)
    pieces = range(0, len(corpus.tokens), _PIECE)
    largest = max(int(corpus.tokens[start : start + _PIECE].max()) for start in pieces)
    if largest >= corpus.vocab_size:
        raise ValueError(
            f"{path / TOKENS} has the token {largest}, but {path / INDEX} says that tokens are below "
            f"{corpus.vocab_size}; pack the text again"
        )
    return corpus


def _check_sha256(path: Path, name: str, index: Mapping[str, Any]) -> None:
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing; pack the text again")
    if _sha256(path / name) != index["sha256"][name]:
        raise ValueError(f"{path / name} is not what was packed (its SHA-256 differs); pack the text again")


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    if not file.is_file():
        raise DamagedFileError(f"{file} is {'no file' if os.path.lexists(file) else 'missing'}; pack the text again")
    try:
        index = read_json_object(file, _KINDS)
        wrong = [key for key in ("tokens", "documents", "vocab_size", "text_bytes") if index[key] < 1]
        wrong += ["dtype"] if index["dtype"] not in ("<u1", "<u2", "<u4") else []
        if wrong:
            raise DamagedFileError(f"{', '.join(wrong)} cannot be right")
        if index["format"] == FORMAT:
            verify_json(file, index, required=False)  # an index of an older version has no checksum
    except (OSError, DamagedFileError) as error:
        reason = str(error).removeprefix(f"{file} is damaged: ")
        raise DamagedFileError(f"{file} is damaged: {reason}; pack the text again") from None
    if index["format"] != FORMAT:
        raise ValueError(f"{path} has format {index['format']}, this version reads {FORMAT}: pack the text again")
    return index
