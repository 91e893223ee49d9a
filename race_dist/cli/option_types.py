"""Typer options by the type of their value. Values are validated before any work starts; an error names the option."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from race_dist.messages import short_repr
from race_dist.output_paths import check_output_file, check_output_folder
from race_dist.strict_config import COUNT_LIMIT, SIZE_LIMIT

T = TypeVar("T")
MAX_LOCAL_RANKS = 1024  # ranks that --nproc starts on one machine
MAX_SECONDS = 1e9  # seconds, 32 years
COUNT_SUFFIXES = "K, M and B are thousands, millions and billions: 4K is 4,000"


class TokenCounts(tuple[int, ...]):
    """Several numbers of tokens, separated by commas."""


def _option(parse: Callable[[str], T], names: tuple[str, ...], metavar: str, words: str) -> Any:
    """A typer option whose text is parsed by ``parse``. Its default is not parsed."""

    def parser(value: Any) -> Any:
        return parse(value) if isinstance(value, str) else value

    return typer.Option(*names, parser=parser, metavar=metavar, help=words)


def integer(*names: str, metavar: str, help: str, low: int = 1, high: int = SIZE_LIMIT) -> Any:
    """An option that takes an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        digits = text.strip()
        if not re.fullmatch(r"[+-]?[0-9]+", digits):
            raise typer.BadParameter(f"{short_repr(text)} is not a whole number")
        number = int(digits) if len(digits) < 40 else high + 1
        if not low <= number <= high:
            raise typer.BadParameter(f"it must be from {low:,} to {high:,}; got {short_repr(text)}")
        return number

    return _option(parse, names, metavar, help)


def step() -> Any:
    """The option that selects one checkpoint of a run."""
    return integer(metavar="N", help="Step of the checkpoint to use. Default: the newest weights.", low=0, high=COUNT_LIMIT)


def number(*names: str, metavar: str, help: str, low: float, high: float, zero: bool = False) -> Any:
    """An option that takes a finite number from ``low`` to ``high``, or 0 if ``zero``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or "_" in text or not text.isascii():  # only ASCII digits, as in integer()
            raise typer.BadParameter(f"{short_repr(text)} is not a number")
        too_small = value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0])  # 1e-400 is not meant as 0
        if too_small or not (low <= value <= high or (zero and value == 0)):
            raise typer.BadParameter(f"it must be {'0 or ' if zero else ''}from {low:g} to {high:g}; got {short_repr(text)}")
        return value

    return _option(parse, names, metavar, help)


def _tokens(text: str, low: int) -> int:
    from race_dist.planning import parse_count

    try:
        return parse_count(text, low)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def token_count(*names: str, metavar: str, help: str, low: int = 1) -> Any:
    """An option that takes a number of tokens: ``131072``, ``128K``, ``75M``."""
    return _option(lambda text: _tokens(text, low), names, metavar, help)


def token_counts(*names: str, metavar: str, help: str, low: int = 1) -> Any:
    """An option that takes several numbers of tokens: ``1024,4096,16K``."""
    return _option(lambda text: TokenCounts(_tokens(part, low) for part in text.split(",")), names, metavar, help)


def text(*names: str, metavar: str, help: str) -> Any:
    """An option that takes UTF-8 text, in whatever way the locale decoded its bytes."""

    def parse(value: str) -> str:
        try:
            return value.encode("utf-8", "surrogateescape").decode()
        except UnicodeError:
            raise typer.BadParameter(f"{value!a} is not UTF-8 text") from None

    return _option(parse, names, metavar, help)


def device(*names: str, help: str = "cpu, cuda or cuda:N. Default: cuda if there is a GPU.") -> Any:
    """An option that takes an existing device."""
    return _option(parse_device, names, "DEVICE", help)


def parse_device(name: str) -> str:
    """The name of an existing device. Raises typer.BadParameter."""
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if not match:
        raise typer.BadParameter(f"{short_repr(name)} is no device: give cpu, cuda or cuda:N")
    if name != "cpu":
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(match[1] or 0) >= there:
            raise typer.BadParameter(
                f"{name} is not there: this machine has {there or 'no'} CUDA device{'s' * (there != 1)}"
                + ("" if there else "; give cpu")
            )
    return name


def input_file(*names: str, metavar: str, help: str) -> Any:
    """An option that takes an existing file."""

    def parse(name: str) -> Path:
        path = Path(name)
        if not _ask(path, Path.is_file):
            raise typer.BadParameter(f"there is no file {short_repr(name)}")
        return path

    return _option(parse, names, metavar, help)


def output_file(*names: str, metavar: str, help: str, make_folder: bool = False) -> Any:
    """An option that takes a file to write; with ``make_folder`` a missing folder is created."""

    def parse(name: str) -> Path:
        return _writable(name, lambda path: check_output_file(path, "", make_folder=make_folder))

    return _option(parse, names, metavar, help)


def output_folder(*names: str, metavar: str, help: str, follow: bool = False) -> Any:
    """An option that takes a folder to write into, which is created if missing; with ``follow`` also a link to a folder."""

    def parse(name: str) -> Path:
        return _writable(name, lambda path: check_output_folder(path, "", follow=follow))

    return _option(parse, names, metavar, help)


def _writable(name: str, check: Callable[[Path], None]) -> Path:
    try:
        check(Path(name))
    except OSError as error:
        raise typer.BadParameter(str(error)) from None
    return Path(name)


def _ask(path: Path, question: Callable[[Path], bool]) -> bool:
    """The answer, or BadParameter where the path cannot be examined: the name is too long, or a link points to itself."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if not isinstance(error, NotADirectoryError):
            raise typer.BadParameter(f"{short_repr(str(path))}: {getattr(error, 'strerror', None) or error}") from None
    return question(path)


def endpoint(*names: str, metavar: str, help: str) -> Any:
    """An option that takes ``HOST:PORT``."""

    def parse(name: str) -> str:
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?):([0-9]{1,5})", name)
        if not match or not 1 <= int(match[3]) <= 65535:
            raise typer.BadParameter(f"{short_repr(name)} is not of the form HOST:PORT, for example node1:29500")
        return name

    return _option(parse, names, metavar, help)


def host(*names: str, metavar: str, help: str) -> Any:
    """An option that takes a host name or address."""

    def parse(name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*", name):
            raise typer.BadParameter(f"{short_repr(name)} is not the name or the address of a host")
        return name

    return _option(parse, names, metavar, help)
