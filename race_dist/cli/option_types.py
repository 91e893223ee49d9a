"""The kinds of values that options take. Each is checked before any work begins, and refused by the option's name."""

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
MOST_RANKS = 1024  # of one machine
LONGEST_TIME = 1e9  # seconds, 32 years
COUNT_WORDS = "K, M and B are thousands, millions and billions: 4K is 4,000"


class Counts(tuple[int, ...]):
    """Numbers with commas between them."""


def _option(parse: Callable[[str], T], names: tuple[str, ...], metavar: str, words: str) -> Any:
    """An option of typer whose text goes through ``parse``; a default, which is no text, does not."""

    def parser(value: Any) -> Any:
        return parse(value) if isinstance(value, str) else value

    return typer.Option(*names, parser=parser, metavar=metavar, help=words)


def whole(*names: str, metavar: str, help: str, low: int = 1, high: int = SIZE_LIMIT) -> Any:
    """An option that takes a whole number from ``low`` to ``high``."""

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
    """The option that chooses one of a run's checkpoints."""
    return whole(metavar="N", help="Of this checkpoint. Left out: the run as it is.", low=0, high=COUNT_LIMIT)


def number(*names: str, metavar: str, help: str, low: float, high: float, zero: bool = False) -> Any:
    """An option that takes a finite number from ``low`` to ``high``, or 0 where ``zero``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or "_" in text or not text.isascii():  # digits of other scripts are none here, as in whole()
            raise typer.BadParameter(f"{short_repr(text)} is not a number")
        too_small = value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0])  # 1e-400: it is not meant as 0
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


def count(*names: str, metavar: str, help: str, low: int = 1) -> Any:
    """An option that takes a number of tokens: ``131072``, ``128K``, ``75M``."""
    return _option(lambda text: _tokens(text, low), names, metavar, help)


def counts(*names: str, metavar: str, help: str, low: int = 1) -> Any:
    """An option that takes several numbers of tokens: ``1024,4096,16K``."""
    return _option(lambda text: Counts(_tokens(part, low) for part in text.split(",")), names, metavar, help)


def text(*names: str, metavar: str, help: str) -> Any:
    """An option that takes UTF-8 text, whatever the locale has made of its bytes."""

    def parse(value: str) -> str:
        try:
            return value.encode("utf-8", "surrogateescape").decode()
        except UnicodeError:
            raise typer.BadParameter(f"{value!a} is not UTF-8 text") from None

    return _option(parse, names, metavar, help)


def device(*names: str, help: str = "cpu, cuda or cuda:N. Left out: cuda where there is a GPU.") -> Any:
    """An option that takes a device that is there."""
    return _option(parse_device, names, "DEVICE", help)


def parse_device(name: str) -> str:
    """A device's name, once it is clear that it is there. Raises typer.BadParameter."""
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
    """An option that takes a file that is there."""

    def parse(name: str) -> Path:
        path = Path(name)
        if not _ask(path, Path.is_file):
            raise typer.BadParameter(f"there is no file {short_repr(name)}")
        return path

    return _option(parse, names, metavar, help)


def output_file(*names: str, metavar: str, help: str, make_folder: bool = False) -> Any:
    """An option that takes a file to write; with ``make_folder`` its folder is made where it is not there."""

    def parse(name: str) -> Path:
        return _writable(name, lambda path: check_output_file(path, "", make_folder=make_folder))

    return _option(parse, names, metavar, help)


def output_folder(*names: str, metavar: str, help: str, follow: bool = False) -> Any:
    """An option that takes a folder to write into, which is made where it is not there; ``follow``: or a link to one."""

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
    """The answer, or a sentence where the system cannot look: a name that is too long, a link that leads to itself."""
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
    """An option that takes the name or the address of a host."""

    def parse(name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*", name):
            raise typer.BadParameter(f"{short_repr(name)} is not the name or the address of a host")
        return name

    return _option(parse, names, metavar, help)
