"""Packed corpora: a folder with all tokens in one file that is mapped, and an index of where documents begin.

    corpus.json      format, counts, the type of a token, checksums
    tokens.bin       [N] uint8 (bytes), uint16 or uint32, little-endian
    documents.bin    [D + 1] int64: where each document begins, and N
    tokenizer.json   the tokenizer, where the tokens are not bytes

Packing reads text a piece at a time; reading a packed corpus touches only what a batch needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from race_dist.outputs import check_output_folder
from race_dist.training.corpus import BYTE_VOCAB, STDLIB, Corpus, sample_digest, text_files, utf8_pieces

FORMAT = 1
INDEX, TOKENS, DOCUMENTS, TOKENIZER = "corpus.json", "tokens.bin", "documents.bin", "tokenizer.json"
_PIECE = 2**22


class Encode(Protocol):
    """Text to tokens."""

    vocab_size: int
    dtype: str

    def __call__(self, data: bytes) -> bytes:
        """The tokens of some whole characters of UTF-8, as bytes of ``dtype``."""
        ...


class ByteEncode:
    """A token is a byte."""

    vocab_size, dtype = BYTE_VOCAB, "<u1"

    def __call__(self, data: bytes) -> bytes:
        return data


class TokenizerEncode:
    """A ``tokenizer.json`` of the ``tokenizers`` library, without special tokens around a text.

    Long documents are encoded some megabytes at a time, cut behind a line: a token never spans such a cut.
    """

    def __init__(self, file: Path) -> None:
        self._tokenizer = load_tokenizer(file)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.dtype = "<u2" if self.vocab_size <= 2**16 else "<u4"

    def __call__(self, data: bytes) -> bytes:
        ids = self._tokenizer.encode(data.decode(), add_special_tokens=False).ids
        return np.asarray(ids, dtype=self.dtype).tobytes()


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a ``tokenizer.json``.

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
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no file of the tokenizers library: {error}") from None


@dataclass
class _Writer:
    """Documents one after the other into an open file."""

    file: IO[bytes]
    encode: Encode
    one_document: bool
    starts: list[int] = field(default_factory=lambda: [0])
    text_bytes: int = 0
    seen: set[bytes] = field(default_factory=set)

    def add(self, pieces: Iterator[bytes]) -> None:
        """One document; a content that was there before is left out."""
        content, before, text = hashlib.sha256(), self.file.tell(), 0
        for lines in lines_of(pieces):
            content.update(lines)
            text += len(lines)
            self.file.write(self.encode(lines))
        if content.digest() in self.seen:
            self.file.seek(before)
            self.file.truncate()
            return
        self.seen.add(content.digest())
        self.text_bytes += text
        end = self.file.tell() // np.dtype(self.encode.dtype).itemsize
        if end > self.starts[-1]:
            self.starts.append(end)

    def bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """``[D + 1]``."""
        return np.array([0, self.starts[-1]] if self.one_document else self.starts, dtype="<i8")


def lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text in pieces, cut anew behind lines (or, in very long ones, behind whole characters)."""
    rest = b""
    for piece in pieces:
        whole, rest = _behind_a_line(rest + piece)
        if whole:
            yield whole
    if rest:
        yield rest


def _behind_a_line(data: bytes) -> tuple[bytes, bytes]:
    """Cut behind the last line, or behind the last whole character of a line that is longer than a piece."""
    cut = data.rfind(b"\n") + 1
    if not cut and len(data) >= _PIECE:
        cut = len(data)
        while cut and data[cut - 1] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        cut -= cut > 0 and data[cut - 1] >= 0xC0
    return data[:cut], data[cut:]


def pack(path: str, out: Path, *, pattern: str = "*", tokenizer: Path | None = None, one_document: bool = False,
         skip_undecodable: bool = False, progress: Callable[[Path], None] | None = None) -> Corpus:
    """Pack a text file, a folder or ``"python-stdlib"`` into the folder ``out``, which appears when it is complete.

    Args:
        path: what to pack; files are read in the order of their paths, each content once.
        out: must not exist.
        pattern: of the names of a folder's files.
        tokenizer: a ``tokenizer.json``; None: tokens are bytes.
        one_document: whether all files are one long document.
        skip_undecodable: leave out files that are not UTF-8 instead of refusing them.
        progress: called with each file.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no text there, or a file that is not UTF-8.
    """
    check_output_folder(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    files = _sources(path, pattern)
    encode = ByteEncode() if tokenizer is None else TokenizerEncode(tokenizer)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with (partial / TOKENS).open("wb") as file:
            writer = _Writer(file, encode, one_document)
            for source in files:
                if progress is not None:
                    progress(source)
                _add(writer, source, skip_undecodable or path == STDLIB)
        bounds = writer.bounds()
        if not bounds[-1]:
            raise ValueError(f"no text was found in {path}; give a text file, or a folder and --pattern")
        bounds.tofile(partial / DOCUMENTS)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / TOKENIZER)
        _write_index(partial, encode, len(bounds) - 1, writer.text_bytes, path)
        try:
            partial.rename(out)
        except OSError as error:
            if not out.exists():
                raise
            raise FileExistsError(f"{out} was made by another process while this one packed; choose another --out or remove "
                                  f"it ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_packed(out)


def _sources(path: str, pattern: str) -> list[Path]:
    if path == STDLIB:
        return list(text_files(Path(sysconfig.get_paths()["stdlib"]), "*.py"))
    source = Path(path).expanduser()
    if source.is_dir():
        return list(text_files(source, pattern))
    if not source.is_file():
        raise FileNotFoundError(f"there is no file or folder {source}")
    return [source]


def _add(writer: _Writer, source: Path, skip: bool) -> None:
    before = writer.file.tell()
    try:
        writer.add(utf8_pieces(source, _PIECE))
    except ValueError:
        if not skip:
            raise
        writer.file.seek(before)
        writer.file.truncate()


def _write_index(folder: Path, encode: Encode, documents: int, text_bytes: int, source: str) -> None:
    tokens = np.memmap(folder / TOKENS, dtype=encode.dtype, mode="r")
    index = {"format": FORMAT, "tokens": len(tokens), "documents": documents, "dtype": encode.dtype,
             "vocab_size": encode.vocab_size, "text_bytes": text_bytes, "source": source,
             "sample": sample_digest(tokens),
             "sha256": {name: _sha256(folder / name) for name in (TOKENS, DOCUMENTS, TOKENIZER) if (folder / name).is_file()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def is_packed(path: Path) -> bool:
    """Whether a folder looks like a packed corpus."""
    return (path / INDEX).is_file()


def open_packed(path: Path) -> Corpus:
    """Map a packed corpus, once sizes, index and samples all over the tokens are what was written.

    Raises:
        ValueError: a file is missing, cut short or changed; the message names it.
    """
    index = _read_index(path)
    size = np.dtype(index["dtype"]).itemsize
    for name, wanted in ((TOKENS, size * index["tokens"]), (DOCUMENTS, 8 * (index["documents"] + 1))):
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != wanted:
            raise ValueError(f"{path / name} has {found:,} bytes, but {wanted:,} were packed: "
                             f"{'it was cut short' if found < wanted else 'it was changed'}; pack the text again")
    tokens = np.memmap(path / TOKENS, dtype=index["dtype"], mode="r")
    documents = np.fromfile(path / DOCUMENTS, dtype="<i8")
    if documents[0] != 0 or documents[-1] != len(tokens) or (np.diff(documents) < 1).any():
        raise ValueError(f"{path / DOCUMENTS} is damaged: documents do not follow each other from 0 to {len(tokens):,}; "
                         "pack the text again")
    if sample_digest(tokens) != index["sample"]:
        raise ValueError(f"{path / TOKENS} is not what was packed (samples of it differ); pack the text again")
    tokenizer = path / TOKENIZER
    return Corpus(str(path), tokens, documents, index["vocab_size"], index["text_bytes"],
                  tokenizer if tokenizer.is_file() else None)


def verify_packed(path: Path) -> Corpus:
    """Read all of a packed corpus and compare its checksums. Raises ValueError naming the file that was changed."""
    corpus = open_packed(path)
    for name, wanted in _read_index(path)["sha256"].items():
        if _sha256(path / name) != wanted:
            raise ValueError(f"{path / name} is not what was packed (its SHA-256 differs); pack the text again")
    return corpus


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
        kinds = {"format": int, "tokens": int, "documents": int, "dtype": str, "vocab_size": int, "text_bytes": int,
                 "sample": str, "sha256": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(index.get(key), kind)]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / INDEX} is damaged: {error}") from None
    if wrong or index["dtype"] not in ("<u1", "<u2", "<u4") or index["tokens"] < 1:
        raise ValueError(f"{path / INDEX} is damaged: {', '.join(wrong) or 'dtype or tokens'} is missing or wrong")
    if index["format"] != FORMAT:
        raise ValueError(f"{path} has format {index['format']}, this version reads {FORMAT}: pack the text again")
    return index
