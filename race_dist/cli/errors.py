"""What every verb shares: user errors and failures are printed as one sentence."""

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

_LONG_WORD = re.compile(r"\S{301,}")  # usually a path; only its beginning is shown
_PATHLIB_ERRORS = ("Symlink loop", "Could not determine home")  # first words of its RuntimeErrors about a path
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer bundles click or imports it, by version
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RecursionError)  # the user can correct these


class CommandGroup(TyperGroup):
    """The command with all its verbs: the only place that turns an error into a sentence and an exit code.

    USER_ERROR: the user can correct it. FAILED: a run failed, or there is a bug in this package, which keeps its traceback.
    """

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **extra: Any) -> Any:
        """Run a verb and end the process with its exit code."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            _refuse_empty(words)
            code = super().main(words, prog_name, *more, **{**extra, "standalone_mode": False})
        except Exception as error:
            code = _report(error)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty value, which usually comes from a shell variable that is not set: it does not mean "not given"."""
    for before, word in zip(("", *words), words):
        name, equals, value = word.partition("=")
        option = name if word.startswith("--") and equals and not value.strip() else before if not word.strip() else None
        if option is not None:
            where = f"the value of {option}" if option.strip("-") and option.startswith("-") else "an argument"
            raise ValueError(f"{where} is empty: give one" + (", or leave the option out" if where != "an argument" else ""))


def _report(error: Exception) -> int:
    """Print the error to standard error; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a group of verbs without a verb: the message is its help
        print(error, file=sys.stderr)
        return USER_ERROR
    if isinstance(error, _UsageError):
        _print_error(error.format_message().replace("Value error, ", ""))  # type: ignore[attr-defined]
        return USER_ERROR
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, _run_failures()):
        _print_error(str(error))
        return _code_of(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
        _print_error(f"there is not enough memory: {str(error).splitlines()[0] if str(error) else 'make something smaller'}")
        return FAILED
    if isinstance(error, _USER_ERRORS) or (isinstance(error, RuntimeError) and str(error).startswith(_PATHLIB_ERRORS)):
        _print_error(_error_text(error))
        return USER_ERROR
    traceback.print_exception(error)
    return FAILED


def _print_error(sentence: str) -> None:
    rank = os.environ.get("RANK", "0")
    sentence = sentence.encode(errors="backslashreplace").decode()  # names of files need not be Unicode
    print(
        f"race-dist{f' (rank {rank})' if rank.isdecimal() and rank != '0' else ''}: "
        + _LONG_WORD.sub(lambda word: f"{word[0][:100]}...", " ".join(sentence.split())),
        file=sys.stderr,
    )


def _error_text(error: Exception) -> str:
    """The error's text; for an error of the operating system the file and the reason, without the number.

    Our own writers name their file, so a full disk without a file name means standard output.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None and len(error.args) > 1:
        return f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, OSError) and error.strerror and len(error.args) > 1:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return f"standard output could not be written: {reason}" if error.errno in _DISK_FULL else reason
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    return str(error) or type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is torch's OutOfMemoryError, or the error of its CPU allocator, which has no type of its own."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _code_of(error: Exception) -> int:
    """Of a run that failed: 2 where starting it again cannot help, which launchers then do not try."""
    checkpoint = sys.modules.get("race_dist.training.checkpoint")
    return USER_ERROR if checkpoint is not None and isinstance(error, checkpoint.OtherRunError) else FAILED


def _run_failures() -> tuple[type[Exception], ...]:
    """Errors that mean a failed run. A module that was not imported cannot have raised its error."""
    failures: list[type[Exception]] = [FloatingPointError]
    for module, name in (("race_dist.parallel", "RankFailure"), ("race_dist.training.checkpoint", "CheckpointError")):
        if module in sys.modules:
            failures.append(getattr(sys.modules[module], name))
    return tuple(failures)


@contextmanager
def work() -> Iterator[None]:
    """Context of work that starts after the user's input was checked: an unexpected error keeps its traceback and exits with
    FAILED, after which a launcher starts the run again."""
    try:
        yield
    except OSError as error:
        _print_error(_error_text(error))
        raise typer.Exit(_code_of(error)) from None
    except Exception as error:
        if isinstance(error, (*_run_failures(), MemoryError, RuntimeError)):  # typer.Exit is a RuntimeError
            raise
        traceback.print_exc()
        raise typer.Exit(FAILED) from None


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP raise SystemExit, so that unfinished files are removed. By default they end the
    process at once."""

    def exit_on_signal(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # other threads cannot install handlers
        yield
        return
    previous = {number: signal.signal(number, exit_on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def open_standard_streams() -> None:
    """Open the null device as standard input, output or error where the process was started without it. Otherwise the next
    file to be opened gets that descriptor, and the output of a library is written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one


def replace_unknown_characters() -> None:
    """Print ``?`` for characters that standard output and error cannot encode (an ASCII terminal), so that text generated by a
    model cannot end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def end_failed_rank(code: object) -> None:
    """End this process at once if it is one of several ranks and failed. The ranks end at different times, and gloo's threads
    abort about one of three while the interpreter shuts down, which hides the exit code."""
    distributed = sys.modules.get("torch.distributed")
    if code not in (FAILED, USER_ERROR) or distributed is None or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, full, or missing
                stream.flush()
        os._exit(int(str(code)))


def default_device() -> str:
    """``"cuda"`` if there is a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
