"""Every text file of a folder is read once, named as skipped, or refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_evaluate import invoke, settings
from test_packed import tokenizer

from race_dist.training.data import text_files
from race_dist.training.data.corpus import Corpus, load_corpus
from race_dist.training.data.packed import pack
from race_dist.training.data.text_files import Undecodable, find_texts, printable
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.trainer import Trainer


def make(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def documents(corpus: Corpus) -> list[bytes]:
    bounds = [0, len(corpus.tokens)] if corpus.documents is None else corpus.documents
    return [corpus.tokens[a:b].tobytes() for a, b in zip(bounds, bounds[1:])]


def both(root: Path, out: Path, pattern: str = "*") -> Corpus:
    """The corpus read directly and packed, which must be equal."""
    read, packed = load_corpus(str(root), pattern), pack(str(root), out, pattern=pattern)
    assert documents(read) == documents(packed)
    assert read.skipped.describe() == packed.skipped.describe()
    return read


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", "real/b.txt": "b", "z/c.txt": "c"})
    make(tmp_path / "elsewhere", {"d.txt": "d", "deep/e.txt": "e"})
    (root / "linked").symlink_to("../elsewhere")
    (root / "also").symlink_to(tmp_path / "elsewhere")  # twice: read once
    (root / "z/up").symlink_to("..")  # a loop
    (root / "self").symlink_to(".")
    (root / "alias").symlink_to("real")  # a folder that has its own path: read under that
    (tmp_path / "elsewhere/back").symlink_to(root)
    (root / "file.txt").symlink_to(tmp_path / "elsewhere/d.txt")  # the same content as linked/d.txt
    found, skipped = find_texts(root, "*")
    assert [f.relative_to(root).as_posix() for f in found] == [
        "a.txt",
        "also/d.txt",
        "also/deep/e.txt",
        "file.txt",
        "real/b.txt",
        "z/c.txt",
    ]
    assert not skipped
    corpus = both(root, tmp_path / "out")
    assert documents(corpus) == [b"a", b"d", b"e", b"b", b"c"]
    assert corpus.skipped.describe() == f"left out: {root}/file.txt (has the content of another file)"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", {"a.txt": "a", "sub/b.txt": "b"})
    (tmp_path / "data").symlink_to("real")
    assert documents(both(tmp_path / "data", tmp_path / "out")) == [b"a", b"b"]


def test_special_files_are_named(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a"})
    (root / "dangling.txt").symlink_to("nowhere")
    (root / "round.txt").symlink_to("round.txt")
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket.txt"))
        corpus = both(root, tmp_path / "out")
    assert documents(corpus) == [b"a"]
    assert {Path(name).name: why for name, why in corpus.skipped.names} == {
        "dangling.txt": "a link to nothing",
        "round.txt": "Too many levels of symbolic links",
        "pipe.txt": "no regular file",
        "socket.txt": "no regular file",
    }
    assert corpus.skipped.describe().endswith(" and 1 more")
    assert not load_corpus(str(make(tmp_path / "other", {"b.md": "b"})), "*.md").skipped


def test_a_dangling_folder_link_is_named_whatever_the_pattern(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", "b.md": "b"})
    (root / "more").symlink_to(tmp_path / "unmounted")
    (root / "readme").symlink_to(root / "b.md")  # a file, of another name than those that are read
    corpus = load_corpus(str(root), "*.txt")
    assert documents(corpus) == [b"a"]
    assert [(Path(name).name, why) for name, why in corpus.skipped.names] == [("more", "a link to nothing")]


def test_hidden_files_and_folders_of_compiled_code_are_named_where_they_match(tmp_path: Path) -> None:
    root = make(
        tmp_path / "data", {"a.txt": "a", ".hidden.txt": "h", ".git/config": "g", "__pycache__/a.pyc": b"\xff", ".env": "x"}
    )
    names = {Path(name).name: why for name, why in both(root, tmp_path / "out", "*.txt").skipped.names}
    assert names == {".hidden.txt": "hidden", ".git": "hidden", "__pycache__": "installed or compiled code"}


def test_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a"})
    strange = os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt")
    Path(strange).write_text("b")
    assert documents(both(root, tmp_path / "out")) == [b"a", b"b"]
    Path(strange).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"caf\\xe9.txt is not UTF-8 text"):
        load_corpus(str(root))
    assert printable(strange).endswith("caf\\xe9.txt")
    code, text = invoke("data", "pack", root, "--out", tmp_path / "packed", "--skip-undecodable")
    assert (code, "caf\\xe9.txt (is not UTF-8 text)" in text.replace("\n", "")) == (0, True)


@pytest.mark.parametrize("call", ["read", "pack"])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", "closed/b.txt": "b"})
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # stands for permissions, which root has all of
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(text_files.os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"the folder .*closed cannot be listed \(Permission denied\); make it readable"):
        load_corpus(str(root)) if call == "read" else pack(str(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", "b.txt": "b"})
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"b.txt cannot be read: Permission denied"):
        load_corpus(str(root))


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", ".b.md": "b"})
    for call in (lambda p: load_corpus(str(root), p), lambda p: pack(str(root), tmp_path / "out", pattern=p)):
        with pytest.raises(ValueError, match=r"no file in .*data matches the pattern '\*.md'; left out: .*\.b\.md \(hidden\)"):
            call("*.md")
        with pytest.raises(ValueError, match=r"data.pattern = '/' names no files"):
            call("/")
    with pytest.raises(ValueError, match=r"data.pattern = '\*.md' does not match the file .*a.txt"):
        load_corpus(str(root / "a.txt"), "*.md")
    assert len(load_corpus(str(root / "a.txt"), "*.txt").tokens) == 1
    with pytest.raises(ValueError, match=r"does not go with python-stdlib"):
        load_corpus("python-stdlib", "*.md")
    packed = str(tmp_path / "corpus")
    pack(str(root), Path(packed))
    with pytest.raises(ValueError, match=r"data.pattern = '\*.txt' picks files of a folder, but .* is a packed corpus"):
        load_corpus(packed, "*.txt")
    with pytest.raises(ValueError, match="is a packed corpus already"):
        pack(packed, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no regular file"):
        load_corpus("/dev/null")
    with pytest.raises(ValueError, match="its files are empty"):
        load_corpus(str(make(tmp_path / "empty", {"a.txt": ""})))


def test_skipped_files_are_printed_by_the_commands(tmp_path: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(400))
    root = make(tmp_path / "data", {"a.txt": text, "b.txt": text, "c.txt": text.upper()})
    code, said = invoke("data", "pack", root, "--out", tmp_path / "packed")
    assert (code, f"left out: {root}/b.txt (has the content of another file)" in said.replace("\n", "")) == (0, True)
    trainer = Trainer(
        settings(tmp_path, data={"path": str(root), "context": 32, "batch_size": 2}), RankMesh(torch.device("cpu"))
    )
    assert list(trainer.describe())[-1] == f"left out of {root}: {root}/b.txt (has the content of another file)"
    assert len(list(Trainer(settings(tmp_path), RankMesh(torch.device("cpu"))).describe())) == 2


def test_skipped_files_are_printed_with_megatrons_engine(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from race_dist.integrations.megatron.training import MegatronEngine

    text = "".join(f"line {n}\n" for n in range(400))
    root = make(tmp_path / "data", {"a.txt": text, "b.txt": text})
    engine = object.__new__(MegatronEngine)
    engine.num_parameters = 5
    engine.mesh = SimpleNamespace(world=None, dp=1, sp=1, tp=1, device=torch.device("cpu"))  # type: ignore[assignment]
    config = settings(tmp_path, data={"path": str(root), "context": 32, "batch_size": 2})
    said = list(Trainer(config, RankMesh(torch.device("cpu")), lambda *_: engine).describe())
    assert "megatron-core" in said[0]
    assert said[-1] == f"left out of {root}: {root}/b.txt (has the content of another file)"


def test_text_that_is_not_utf8_is_reported_with_the_fix(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"a.txt": "a", "b.txt": b"caf\xe9 au lait"})
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 text; .*data pack .*--skip-undecodable"):
        load_corpus(str(root))
    with pytest.raises(Undecodable, match=r"b.txt is not UTF-8 text \(near byte 3\): .*--skip-undecodable"):
        pack(str(root), tmp_path / "out")
    corpus = pack(str(root), tmp_path / "out", skip_undecodable=True)
    assert corpus.skipped.describe() == f"left out: {root}/b.txt (is not UTF-8 text)"


def test_only_undecodable_files_are_skipped(tmp_path: Path) -> None:
    """Other errors of packing are not taken for them."""
    root = make(tmp_path / "data", {"a.txt": "a"})
    file = tokenizer(tmp_path, "a b c")
    file.write_text(file.read_text().replace('"type": "BPE"', '"type": "Nothing"').replace('"type":"BPE"', '"type":"Nothing"'))
    with pytest.raises(ValueError, match="is no file of the tokenizers library"):
        pack(str(root), tmp_path / "out", tokenizer=file, skip_undecodable=True)
