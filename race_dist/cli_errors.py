"""What every verb shares: mistakes and failures told in one sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType

import typer

FAILED, USER_ERROR = 1, 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Say what a user can mend in one sentence; a traceback is for our own mistakes."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"race-dist{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None


@contextmanager
def failures() -> Iterator[None]:
    """Say in one sentence how a run has failed: a rank that died, a loss that is no number."""
    from race_dist.parallel import RankFailure
    from race_dist.training.checkpoint import CheckpointError

    try:
        yield
    except (RankFailure, FloatingPointError, CheckpointError) as error:
        print(f"race-dist: {error}", file=sys.stderr)
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


def replace_unknown_characters() -> None:
    """Print ``?`` for characters that standard output and error cannot encode (an ASCII terminal): text that a model writes
    must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def argument_text(option: str, value: str) -> str:
    """The UTF-8 text of an argument, whatever the locale has made of its bytes. ValueError where it is not UTF-8."""
    try:
        return value.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError:
        raise ValueError(f"{option} is not UTF-8 text; got {value.encode('utf-8', 'surrogateescape')!r}") from None


def end_failed_rank(code: object) -> None:
    """End this process at once if it is one of several ranks that failed: they leave at different times, and gloo's threads
    would abort about one in three as the interpreter ends, which hides the exit code."""
    distributed = sys.modules.get("torch.distributed")
    if code not in (FAILED, USER_ERROR) or distributed is None or not distributed.is_initialized():
        return
    if distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(str(code)))


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
