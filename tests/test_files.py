"""Files are whole or not there, and what was changed after it was written is named."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from race_dist.files import (
    DamagedFileError,
    atomic_write,
    file_digest,
    load_tensors,
    open_tensors,
    read_checksummed_json,
    read_json_object,
    save_tensors,
    verify_file,
    write_checksummed_json,
    write_text,
)

TREE = {"step": 12, "loss": 0.5, "name": "ä", "flags": [True, None], "files": {"a": {"bytes": 1}}}


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 5, generator=draw)
    return {
        "a": wide,
        "narrow": wide.bfloat16(),
        "flags": wide > 0,
        "one": torch.tensor(7.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "whole": torch.arange(6)[::2],
    }


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", tensors(), {"b": "2", "a": "1"})
    found, metadata = load_tensors(tmp_path / "x")
    assert metadata == {"a": "1", "b": "2"}
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    first = (tmp_path / "x").read_bytes()
    save_tensors(tmp_path / "x", tensors(), {"b": "2", "a": "1"})
    assert (tmp_path / "x").read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_no_flipped_bit_of_a_tensor_file_is_taken(tmp_path: Path) -> None:
    file, draw, wrong = tmp_path / "x", random.Random(0), 0
    save_tensors(file, tensors(), {"config": "seed 3"})
    whole = file.read_bytes()
    for bit in [draw.randrange(8 * len(whole)) for _ in range(300)] + [8 * len(whole) - n for n in range(1, 9)]:
        file.write_bytes(flipped(whole, bit))
        try:
            found, metadata = load_tensors(file)
        except DamagedFileError as error:
            wrong += str(file) in str(error)
        else:  # the one key of the header that says that there are checksums: what it holds is unharmed
            assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items()), bit
            assert "config" not in metadata
    assert wrong > 290


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("a"),
        lambda t: t.update(b=t["a"] + 1),
        lambda t: t.update(a=t["a"] + 1),
        lambda t: t.update(a=t["a"].reshape(5, 3)),
        lambda t: t.update(narrow=t["narrow"].float()),
    ],
)
def test_tensors_that_were_exchanged_under_their_checksums_are_not_taken(change: Callable[[Any], Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    save_tensors(tmp_path / "x", tensors())
    with safe_open(tmp_path / "x", "pt") as stored:
        header = stored.metadata()
    other = {name: tensor.contiguous() for name, tensor in tensors().items()}
    change(other)
    save_file(other, tmp_path / "x", header)
    with pytest.raises(DamagedFileError, match="x is damaged"):
        load_tensors(tmp_path / "x")


def test_tensors_from_elsewhere_need_no_checksums(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x", {"format": "pt"})
    found, metadata = load_tensors(tmp_path / "x")
    assert torch.equal(found["a"], torch.ones(2))
    assert metadata == {"format": "pt"}
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "none")
    for data in (b"", b"\0" * 64, b"text that is no safetensors file"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(DamagedFileError, match="x is damaged"), open_tensors(tmp_path / "x"):
            pass


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "must hold a JSON object; got list"),
        (b"5", "got int"),
        (b"null", "got null"),
        (b'"x"', "got str"),
        (b"", "is not valid JSON"),
        (b"\0" * 20, "is not valid JSON"),
        (b'{"step": 1', "is not valid JSON"),
        (b"[" * 10**6, "is not valid JSON"),
        (b'{"step": "\xff"}', "is not UTF-8 text"),
        (b"{}", "step is missing"),
        (b'{"step": "1"}', "step is a string, not an integer"),
        (b'{"step": true}', "step is true or false, not an integer"),
        (b'{"step": 1.5}', "step is a number, not an integer"),
        (b'{"step": [1]}', "step is a list, not an integer"),
    ],
)
def test_json_that_is_not_what_it_should_be_is_one_sentence(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DamagedFileError, match=says) as caught:
        read_json_object(tmp_path / "x.json", {"step": int})
    assert str(tmp_path / "x.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"step": 3, "rate": 1}')
    assert read_json_object(tmp_path / "x.json", {"step": int, "rate": float}) == {"step": 3, "rate": 1}


def test_no_flipped_bit_of_a_record_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_checksummed_json(file, TREE)
    assert read_checksummed_json(file, {"step": int}) == TREE
    whole = file.read_bytes()
    taken = 0
    for bit in range(8 * len(whole)):
        file.write_bytes(flipped(whole, bit))
        with suppress(DamagedFileError):
            assert read_checksummed_json(file) == TREE
            taken += 1
    assert taken <= 2  # "\\u00E4" is "\\u00e4"
    file.write_text(json.dumps(TREE))
    assert read_checksummed_json(file, required=False) == TREE
    with pytest.raises(DamagedFileError, match=r"x\.json was changed"):
        read_checksummed_json(file)


def test_a_file_is_what_was_described_or_named(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"some bytes")
    wanted = file_digest(file)
    verify_file(file, wanted)
    for data, says in ((b"some byte", "has 9 bytes, 10 were written"), (b"some bytez", "does not have the checksum")):
        file.write_bytes(data)
        with pytest.raises(DamagedFileError, match=says):
            verify_file(file, wanted)
    file.unlink()
    with pytest.raises(DamagedFileError, match="x is missing"):
        verify_file(file, wanted)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file, limits = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_text(file, "before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes a file may have
    try:
        for write in (
            lambda: write_text(file, "after " * 100),
            lambda: save_tensors(file, {"a": torch.ones(99)}),
            lambda: write_checksummed_json(file, {"a": "after " * 100}),
        ):
            with pytest.raises(OSError, match=r"x could not be written: .*[Ff]ile too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    with suppress(KeyError), atomic_write(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    os.mkfifo(tmp_path / "pipe")
    for missing in (tmp_path / "none/x", file / "x", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="could not be written"):
            save_tensors(missing, {"a": torch.ones(1)})
        with pytest.raises(OSError, match="could not be written"):
            write_text(missing, "text")
