"""What every verb shares: mistakes and failures told in one sentence."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from race_dist.exit_codes import FAILED, INTERRUPTED, USER_ERROR

_LONG_WORD = re.compile(r"\S{301,}")  # mostly a path, which is shown in part
_PATHLIB = ("Symlink loop", "Could not determine home")  # how its RuntimeErrors about a path begin
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer has a copy of click, or click, by its version
_MISTAKES = (ValueError, TypeError, OSError, ImportError, RecursionError)  # what a user can mend


class Verbs(TyperGroup):
    """The command with all its verbs: the one place that turns errors into a sentence and an exit code.

    2: a mistake that the user can mend; 1: a run that failed. A traceback is for our own mistakes (1, too).
    """

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **extra: Any) -> Any:
        """Run a verb and end the process with its exit code."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            _refuse_empty(words)
            code = super().main(words, prog_name, *more, **{**extra, "standalone_mode": False})
        except Exception as error:
            code = _tell(error)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty value, mostly of a shell variable that is not set, is never "not given"."""
    for before, word in zip(("", *words), words):
        name, equals, value = word.partition("=")
        option = name if word.startswith("--") and equals and not value.strip() else before if not word.strip() else None
        if option is not None:
            where = f"the value of {option}" if option.strip("-") and option.startswith("-") else "an argument"
            raise ValueError(f"{where} is empty: give one" + (", or leave the option out" if where != "an argument" else ""))


def _tell(error: Exception) -> int:
    """Say what went wrong, on the error stream; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a verb without a word: its help, as its message
        print(error, file=sys.stderr)
        return USER_ERROR
    if isinstance(error, _UsageError):
        _print(error.format_message().replace("Value error, ", ""))  # type: ignore[attr-defined]
        return USER_ERROR
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, _failures()):
        _print(str(error))
        return _code_of(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
        _print(f"there is not enough memory: {str(error).splitlines()[0] if str(error) else 'make something smaller'}")
        return FAILED
    if isinstance(error, _MISTAKES) or (isinstance(error, RuntimeError) and str(error).startswith(_PATHLIB)):
        _print(_sentence(error))
        return USER_ERROR
    traceback.print_exception(error)
    return FAILED


def _print(sentence: str) -> None:
    rank = os.environ.get("RANK", "0")
    sentence = sentence.encode(errors="backslashreplace").decode()  # names of files need not be Unicode
    print(
        f"race-dist{f' (rank {rank})' if rank.isdecimal() and rank != '0' else ''}: "
        + _LONG_WORD.sub(lambda word: f"{word[0][:100]}...", " ".join(sentence.split())),
        file=sys.stderr,
    )


def _sentence(error: Exception) -> str:
    """Of the system's errors the file and what is wrong with it, without a number. Files of ours are named by whoever writes
    them, so that what fails without a name for want of room is standard output."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None and len(error.args) > 1:
        return f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, OSError) and error.strerror and len(error.args) > 1:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return f"standard output could not be written: {reason}" if error.errno in _NO_ROOM else reason
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    return str(error) or type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's on a GPU, and its allocator's on the CPU, which has no type of its own."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _code_of(error: Exception) -> int:
    """Of a run that failed: 2 where starting it again cannot help, which launchers then do not try."""
    checkpoint = sys.modules.get("race_dist.training.checkpoint")
    return USER_ERROR if checkpoint is not None and isinstance(error, checkpoint.OtherRunError) else FAILED


def _failures() -> tuple[type[Exception], ...]:
    """How a run fails. They are not looked for where nothing that could raise them was imported."""
    found: list[type[Exception]] = [FloatingPointError]
    for module, name in (("race_dist.parallel", "RankFailure"), ("race_dist.training.checkpoint", "CheckpointError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


@contextmanager
def work() -> Iterator[None]:
    """Around work that began after all that a user can mend was checked: an unexpected error there keeps its traceback and
    ends with 1, after which a launcher starts the run again."""
    try:
        yield
    except OSError as error:
        _print(_sentence(error))
        raise typer.Exit(_code_of(error)) from None
    except Exception as error:
        if isinstance(error, (*_failures(), MemoryError, RuntimeError)):  # typer.Exit is a RuntimeError
            raise
        traceback.print_exc()
        raise typer.Exit(FAILED) from None


@contextmanager
def cleaned_up() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception does, so that unfinished files are removed: by themselves they end
    the process where it stands."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no handlers
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_standard_streams() -> None:
    """Put the null device where the process was started without standard input, output or error: the next file that is
    opened would else take that number, and what a library prints would go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one


def replace_unknown_characters() -> None:
    """Print ``?`` for characters that standard output and error cannot encode (an ASCII terminal): text that a model writes
    must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def end_failed_rank(code: object) -> None:
    """End this process at once if it is one of several ranks that failed: they leave at different times, and gloo's threads
    would abort about one in three as the interpreter ends, which hides the exit code."""
    distributed = sys.modules.get("torch.distributed")
    if code not in (FAILED, USER_ERROR) or distributed is None or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, full, or none at all
                stream.flush()
        os._exit(int(str(code)))


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
