"""Files with checksums, written atomically and verified when they are read.

A file is written under a temporary name, flushed to disk and renamed, so that it is complete or does not exist. Tensors have
their checksums in the header of the safetensors file. A checksummed JSON file contains the checksum of itself. The size and
checksum of any other file are in a checksummed JSON file (a manifest), which is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from race_dist.output_paths import atomic_write

JsonTypes = Mapping[str, type | tuple[type, ...]]

DIGEST = "digest"  # the key of the checksum in a checksummed JSON file
_HEADER = "race_dist"  # the only key of the safetensors metadata, because the order of several keys is not deterministic
_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class DamagedFileError(ValueError):
    """The content of a file is not what was written to it, or not what it should be. The message names the file."""


# --- writing ---------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Lone surrogates, which UTF-8 cannot represent, become question marks."""
    with atomic_write(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


def write_checksummed_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write an object as JSON with a checksum of itself, for :func:`read_checksummed_json`; no newline at the end."""
    write_text(path, json.dumps({**tree, DIGEST: json_digest(tree)}, indent=1))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, with checksums of the tensors and of ``metadata`` in the header."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} could not be written: there is no folder {path.parent}")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {
        "metadata": dict(metadata or {}),
        "tensors": {name: _tensor_digest(tensor) for name, tensor in sorted(on_cpu.items())},
    }
    header[DIGEST] = json_digest(header)
    with atomic_write(path) as partial:
        try:
            save_file(on_cpu, partial, {_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


# --- checksums -------------------------------------------------------------------------------------------------------------


def file_digest(file: Path) -> dict[str, Any]:
    """Size (``bytes``) and BLAKE2b (``blake2b``, hexadecimal) of a file."""
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"bytes": os.fstat(data.fileno()).st_size, "blake2b": digest}


def verify_file(file: Path, expected: Any) -> None:
    """Raise DamagedFileError unless a file has the size and checksum that :func:`file_digest` returned."""
    if not file.is_file():
        raise DamagedFileError(f"{file} is missing")
    found = file_digest(file)
    size = expected.get("bytes") if isinstance(expected, Mapping) else None
    if found["bytes"] != size:
        raise DamagedFileError(f"{file} has {found['bytes']} bytes, {size} were written")
    if found != expected:
        raise DamagedFileError(f"{file} does not have the checksum it was written with")


def json_digest(tree: Mapping[str, Any]) -> str:
    """BLAKE2b of a value of JSON types."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark. Raises DamagedFileError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text: {error}") from None


def read_json_object(path: Path, types: JsonTypes | None = None) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        path: of the file.
        types: required keys, and the types of their values. A bool is not a number, and an int is also a float.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: it is not a JSON object, or a key is missing or has a value of another type.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DamagedFileError(f"{path} must hold a JSON object; got {'null' if tree is None else type(tree).__name__}")
    return _check_types(path, tree, types or {})


def read_checksummed_json(path: Path, types: JsonTypes | None = None, *, required: bool = True) -> dict[str, Any]:
    """Read what :func:`write_checksummed_json` has written, without the checksum.

    Args:
        path: of the file.
        types: as for :func:`read_json_object`.
        required: whether a file without a checksum is refused.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: as :func:`read_json_object`, or the file was changed after it was written.
    """
    tree = read_json_object(path)
    verify_json(path, tree, required=required)
    return _check_types(path, tree, types or {})


def verify_json(path: Path, tree: dict[str, Any], *, required: bool = True) -> None:
    """Remove the checksum from an object that was read from ``path``. Raises DamagedFileError if the checksum is wrong."""
    if (required or DIGEST in tree) and tree.pop(DIGEST, None) != json_digest(tree):
        raise DamagedFileError(f"{path} was changed: it does not have the checksum it was written with")


def has_json_type(value: Any, expected: type | tuple[type, ...]) -> bool:
    """Whether a JSON value has one of the types. A bool is not a number, and an int is also a float."""
    types = expected if isinstance(expected, tuple) else (expected,)
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, (*types, int) if float in types else types)


class CheckedTensors:
    """The tensors of a safetensors file, each verified when it is read. Files of other programs, without checksums, are
    accepted.

    Attributes:
        path: of the file.
        metadata: strings by name, without the checksums.
    """

    def __init__(self, path: Path, stored: Any) -> None:
        self.path, self._stored = path, stored
        self.metadata: dict[str, str] = dict(stored.metadata() or {})
        self._sums: dict[str, str] | None = None
        text = self.metadata.pop(_HEADER, None)
        if text is not None:
            self._read_header(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored.keys())

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, without reading it."""
        return list(self._stored.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._stored.get_tensor(name)
        if self._sums is not None and self._sums[name] != _tensor_digest(tensor):
            raise DamagedFileError(f"{self.path} is damaged: {name} does not have the checksum it was written with")
        return tensor

    def _read_header(self, text: str) -> None:
        try:
            header = json.loads(text)
            intact = header.pop(DIGEST) == json_digest(header) and header["tensors"].keys() == set(self._stored.keys())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            intact = False
        if not intact:
            raise DamagedFileError(f"{self.path} is damaged: its header, or the set of its tensors, is not what was written")
        self.metadata, self._sums = {**self.metadata, **header["metadata"]}, header["tensors"]


@contextmanager
def open_tensors(path: Path) -> Iterator[CheckedTensors]:
    """Open a safetensors file, to read one tensor at a time to the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: it is not a safetensors file, or a checksum is wrong.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as stored:
            yield CheckedTensors(path, stored)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file to the CPU; returns them and the metadata. Raises as :func:`open_tensors`."""
    with open_tensors(path) as stored:
        return {name: stored[name] for name in stored}, stored.metadata


def _check_types(path: Path, tree: dict[str, Any], types: JsonTypes) -> dict[str, Any]:
    for key, kind in types.items():
        if key not in tree:
            raise DamagedFileError(f"{path} is damaged: {key} is missing")
        if not has_json_type(tree[key], kind):
            raise DamagedFileError(
                f"{path} is damaged: {key} is {_WORDS.get(type(tree[key]), 'something else')}, not "
                f"{' or '.join(_WORDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))}"
            )
    return tree
