"""The layout of checkpoints on disk: manifests, atomic publishing, and which files are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from race_dist.checkpoint_files import MANIFEST, CheckpointFolder, Manifest, parse_name, remove_unlisted, save_tensors_file
from race_dist.files import DamagedFileError


def generation(folder: Path, number: int) -> Manifest:
    name = f"{number}.safetensors"
    files = {name: save_tensors_file(folder / name, {"x": torch.full((3,), number)})}
    return Manifest.write(folder / f"{number}.json", {"number": number}, files)


def test_a_manifest_verifies_its_files(tmp_path: Path) -> None:
    written = generation(tmp_path, 1)
    read = Manifest.read(tmp_path / "1.json", {"number": int})
    assert read == written
    read.verify()
    data = bytearray((tmp_path / "1.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "1.safetensors").write_bytes(data)
    read.verify(names=[])
    with pytest.raises(DamagedFileError, match=r"1\.safetensors does not have the checksum"):
        read.verify()
    with pytest.raises(DamagedFileError, match="number is missing"):
        Manifest.write(tmp_path / "2.json", {}, {}).read(tmp_path / "2.json", {"number": int})


def test_files_of_no_kept_manifest_are_removed(tmp_path: Path) -> None:
    first, second = generation(tmp_path, 1), generation(tmp_path, 2)
    (tmp_path / "step.json").write_text("{}")
    remove_unlisted(tmp_path, [first, second], keep=["step.json"])
    assert len(list(tmp_path.iterdir())) == 5
    remove_unlisted(tmp_path, [second])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2.json", "2.safetensors"]


def test_a_checkpoint_appears_when_it_is_published(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.remove_leftovers()
    for serial in range(1, 6):
        partial = folder.partial(str(serial))
        partial.mkdir()
        files = {"x": save_tensors_file(partial / "x", {"x": torch.ones(1)})}
        assert len(folder.complete()) == serial - 1
        folder.publish(partial, {"serial": serial, "step": 10 * serial}, files)
    assert [parse_name(path) for path in folder.complete()] == [(n, 10 * n) for n in range(1, 6)]
    Manifest.read(folder.complete()[0] / MANIFEST, {"step": int}).verify()
    folder.partial("crashed").mkdir()
    folder.prune(keep=2, keep_every=20)
    folder.remove_leftovers()
    assert [path.name for path in sorted(folder.path.iterdir())] == [
        "000002-step-00000020",
        "000004-step-00000040",
        "000005-step-00000050",
    ]
