"""Standard output that fails ends nothing."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from race_dist.terminal import TolerantStream, plain_console, print_line

PROGRAM = """
from race_dist.terminal import plain_console, print_line
console = plain_console()
for n in range(3):
    console.print("caf\\u00e9 [/b] :smile:")
    print_line("caf\\u00e9")
"""


def run(stdout: int | None, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(root)},
    )


def test_a_closed_pipe_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "standard output could not be written (Broken pipe): going on without it\n")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full on this system")
def test_a_full_disk_under_standard_output_does_not_end_the_run() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run(full.fileno())
    assert done.returncode == 0
    assert done.stderr.count("No space left on device") == 1
    assert "Traceback" not in done.stderr


def test_ascii_output_is_escaped_and_names_are_not_markup() -> None:
    done = run(subprocess.PIPE, "ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "caf\\xe9 [/b] :smile:\ncaf\\xe9\n" * 3


def test_a_closed_or_missing_stream_accepts_all_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        print_line("words")
        plain_console().print("words")
        assert TolerantStream(stream).write("words") == 5
        assert not TolerantStream(stream).isatty()


def test_missing_standard_streams_do_not_become_files_of_the_run(tmp_path: Path) -> None:
    """Else the next file that is opened is number 1, and what a library prints goes into it."""
    program = """
import os, sys
from race_dist.cli.errors import end_failed_rank, open_standard_streams
open_standard_streams()
file = open(sys.argv[1], "w")
os.write(1, b"a library's line")
os.write(2, b"a library's line")
sys.exit(0 if file.fileno() > 2 and os.read(0, 1) == b"" else 1)
"""
    words = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *words], check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_full_disk_under_standard_output_is_named(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # bytes a file may have

    with (tmp_path / "out.txt").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "race_dist.cli", "config"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            preexec_fn=limit,
            cwd=Path(__file__).parents[1],
        )
    assert (done.returncode, done.stderr) == (2, "race-dist: standard output could not be written: file too large\n")
