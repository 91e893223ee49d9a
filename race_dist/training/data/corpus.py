"""Loading a corpus: a text file, a folder of text files, the standard library's source, or a packed corpus.

A token is a byte of UTF-8 text, unless the corpus was packed with a tokenizer (:mod:`race_dist.training.data.packed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from race_dist.training.data.packed import is_packed, open_packed
from race_dist.training.data.splits import BLOCK, BYTE_VOCAB, Corpus, HeldOut, Split, Tokens, sample_digest
from race_dist.training.data.text_files import (
    STDLIB,
    SkippedFiles,
    check_pattern,
    expand_home,
    find_texts,
    printable,
    read_utf8,
    stdlib_texts,
    utf8_pieces,
)

__all__ = ["BLOCK", "BYTE_VOCAB", "Corpus", "HeldOut", "Split", "Tokens", "load_corpus", "sample_digest"]
LARGEST_IN_MEMORY = 2**31  # bytes of a folder that is read without packing


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
