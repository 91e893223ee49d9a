"""Files that a command is asked to write: nothing is written through links, onto folders or devices, nor read by others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from race_dist.cli import app
from race_dist.output_paths import atomic_write, check_output_file, check_output_folder, write_private
from race_dist.training.weights_file import save_weights


@pytest.fixture(params=["link", "dangling link", "link to a folder", "folder", "fifo", "device", "below a file"])
def unusable(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path, target = tmp_path / "out", tmp_path / "target"
    kind = request.param
    if "link" in kind:
        if kind == "link":
            target.write_text("kept")
        elif kind == "link to a folder":
            target.mkdir()
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        return Path("/dev/null")
    else:
        target.write_text("kept")
        return target / "out"
    return path


def test_unusable_paths_are_not_written(unusable: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for write in (check_output_file, lambda p: save_weights(p, {"a": torch.ones(1)}), lambda p: write_private(p, "x")):
        with pytest.raises(OSError, match=unusable.name):
            write(unusable)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert not (tmp_path / "target").is_file() or (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize(
    "words",
    [
        ["export", "RUN", "--out"],
        ["generate", "RUN", "--prompt", "a", "--save-context"],
        ["bench", "attention", "--out"],
        ["bench", "decode", "--out"],
        ["bench", "streaming", "RUN", "--out"],
        ["preflight", "--device", "cpu", "--json"],
        ["report", "RUN", "--out"],
        ["data", "pack", "RUN", "--out"],
    ],
)
def test_every_command_refuses_a_link_as_its_output_before_it_works(words: list[str], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    result = CliRunner().invoke(app, [*(str(tmp_path / "none") if w == "RUN" else w for w in words), str(link)])
    assert result.exit_code == 2, result.output
    assert "link" in result.output
    assert "Traceback" not in result.output
    assert link.is_symlink()
    assert not (tmp_path / "target").exists()


def test_folders_of_files_and_private_files(tmp_path: Path) -> None:
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "new" / "er")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is no folder"):
        check_output_folder(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="is a symbolic link"):
        check_output_folder(tmp_path / "link")
    check_output_folder(tmp_path / "link", follow=True)
    with pytest.raises(OSError, match="is no folder"):
        check_output_folder(tmp_path / "file", follow=True)
    made = write_private(tmp_path / "a" / "b", "ä")
    assert (made.read_text(encoding="utf-8"), stat.S_IMODE(made.stat().st_mode)) == ("ä", 0o600)
    assert [p.name for p in made.parent.iterdir()] == ["b"]
    with pytest.raises(OSError, match="make the folder first"):
        check_output_file(tmp_path / "none" / "file", make_folder=False)


def test_private_files_are_private_before_they_are_complete(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file", mode=0o600) as partial:
        assert (stat.S_IMODE(partial.stat().st_mode), partial.read_bytes()) == (0o600, b"")
        partial.write_text("x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["a\nb", "x" * 300, "nul\x00"])
def test_impossible_file_names_are_reported_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(OSError) as refused:
        check_output_file(tmp_path / name)
    assert "\n" not in str(refused.value)
