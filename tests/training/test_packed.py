"""Packing text, opening a packed corpus, and errors about truncated or changed files."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from race_dist.training.data import packed
from race_dist.training.data.corpus import load_corpus
from race_dist.training.data.packed import DOCUMENTS, INDEX, TOKENS, open_packed, pack, verify_packed

TEXTS = {"a.txt": "first ä\n" * 3, "b/c.txt": "second €\n", "d.txt": "first ä\n" * 3, "e.txt": "", "f.txt": "x" * 50}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(text, encoding="utf-8")
    return tmp_path / "text"


def test_a_folder_packs_into_its_documents(folder: Path, tmp_path: Path) -> None:
    corpus = pack(str(folder), tmp_path / "packed")
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.documents is not None
    pieces = [corpus.tokens[a:b].tobytes().decode() for a, b in zip(corpus.documents, corpus.documents[1:])]
    assert pieces == [TEXTS["a.txt"], TEXTS["b/c.txt"], TEXTS["f.txt"]]  # in order, each content once, none empty
    plain = load_corpus(str(folder))
    assert np.array_equal(plain.tokens, corpus.tokens)
    assert plain.documents is not None
    assert np.array_equal(plain.documents, corpus.documents)
    assert load_corpus(str(tmp_path / "packed")).digest() == corpus.digest() == plain.digest()
    one = pack(str(folder), tmp_path / "one", one_document=True)
    assert one.documents is not None
    assert one.documents.tolist() == [0, len(one.tokens)]
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


@pytest.mark.parametrize("piece", [7, 64])
def test_a_long_document_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(packed, "_PIECE", piece)
    monkeypatch.setattr(packed.utf8_pieces, "__defaults__", (piece,))
    text = "".join(f"zeile {n}: {'äö€😀' * (n % 5)}" + "\n" * (n % 3) for n in range(60))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert pack(str(tmp_path / "long.txt"), tmp_path / "packed").tokens.tobytes().decode() == text
    corpus = pack(str(tmp_path / "long.txt"), tmp_path / "tokens", tokenizer=tokenizer(tmp_path, text))
    assert packed.load_tokenizer(tmp_path / "tokens" / "tokenizer.json").decode(corpus.tokens.tolist()) == text


def tokenizer(folder: Path, text: str) -> Path:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    model.save(str(folder / "bpe.json"))
    return folder / "bpe.json"


def test_a_tokenizer_makes_fewer_tokens_that_decode_to_the_text(tmp_path: Path) -> None:
    text = "the cat sat on the mat. " * 40 + "\n" + "grüße\n" * 10
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = pack(str(tmp_path / "text.txt"), tmp_path / "packed", tokenizer=tokenizer(tmp_path, text))
    assert corpus.tokens.dtype == np.uint16
    assert corpus.bytes_per_token == len(text.encode()) / len(corpus.tokens) > 2
    assert corpus.tokenizer == tmp_path / "packed" / "tokenizer.json"
    assert packed.load_tokenizer(corpus.tokenizer).decode(corpus.tokens.tolist()) == text
    with pytest.raises(ValueError, match="there is no tokenizer file"):
        pack(str(tmp_path / "text.txt"), tmp_path / "other", tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is no file of the tokenizers library"):
        pack(str(tmp_path / "text.txt"), tmp_path / "other", tokenizer=tmp_path / "bad.json")


def test_text_that_is_not_utf8_is_refused_or_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.txt").write_bytes(b"good for a while\n" * 3 + b"\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text \(near byte 51\)"):
        pack(str(folder), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    corpus = pack(str(folder), tmp_path / "packed", skip_undecodable=True)
    assert np.array_equal(corpus.tokens, np.frombuffer((TEXTS["a.txt"] + TEXTS["b/c.txt"] + TEXTS["f.txt"]).encode(), np.uint8))
    with pytest.raises(FileExistsError, match="choose another --out"):
        pack(str(folder), tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        pack(str(tmp_path / "none"), tmp_path / "other")
    with pytest.raises(ValueError, match="no text was found"):
        pack(str(folder), tmp_path / "other", pattern="*.md")


def test_a_truncated_or_changed_corpus_is_reported(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    size = len(pack(str(folder), path).tokens)

    def broken(file: str, change: bytes | None, says: str) -> None:
        whole = (path / file).read_bytes()
        if change is None:
            (path / file).unlink()
        else:
            (path / file).write_bytes(change)
        with pytest.raises(ValueError, match=says):
            open_packed(path)
        (path / file).write_bytes(whole)
        open_packed(path)

    tokens, documents, index = ((path / f).read_bytes() for f in (TOKENS, DOCUMENTS, INDEX))
    broken(TOKENS, tokens[:-1], rf"tokens.bin has {size - 1} bytes, but {size} were packed: it was cut short")
    broken(TOKENS, tokens + b"x", "it was changed")
    broken(TOKENS, None, "has 0 bytes")
    broken(TOKENS, b"y" + tokens[1:], "is not what was packed")
    broken(DOCUMENTS, documents[:-8], "documents.bin has .* it was cut short")
    broken(DOCUMENTS, documents[8:16] + documents[8:], "documents do not follow each other")
    broken(INDEX, index[:40], "corpus.json is damaged")
    broken(INDEX, index.replace(b'"<u1"', b'"<f8"'), "corpus.json is damaged: dtype")
    broken(INDEX, index.replace(b'"format": 1', b'"format": 9'), "has format 9, this version reads 1")


def test_a_full_check_finds_what_samples_miss(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(os.urandom(2**22).hex().encode())
    pack(str(tmp_path / "text.txt"), tmp_path / "packed")
    verify_packed(tmp_path / "packed")
    tokens = np.memmap(tmp_path / "packed" / TOKENS, mode="r+")
    tokens[5000] ^= 1  # between two samples
    tokens.flush()
    open_packed(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"tokens.bin is not what was packed \(its SHA-256 differs\)"):
        verify_packed(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / INDEX).read_text())["tokens"] == 2**23


def test_a_full_disk_is_reported_with_the_corpus_name(folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # bytes a file may have
    try:
        with pytest.raises(OSError, match=r"/packed could not be written: File too large"):
            pack(str(folder), tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
