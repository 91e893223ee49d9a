"""Tables of invalid inputs (calls x arguments x values) and the check of how they are answered.

A :class:`Subject` is something a user calls: a function, a class, a command, a configuration. It has valid arguments, and for
each argument a list of invalid values (``tests/inputs/values.py`` has them by type). :func:`inputs` yields all its inputs: the
valid call with one argument replaced. :func:`check_input` checks that an input

- is refused by ValueError, TypeError or ImportError, in one line that names the argument; or
- is accepted, and ``docs/inputs.md`` lists it with the reason.

A command is a subject too: ``run`` calls it with the option and raises ValueError with its output if its exit code is 2.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
EXPECTED_ERRORS = (ValueError, TypeError, ImportError)


class Value(NamedTuple):
    """``label``: its name in the test. ``make``: creates it. ``right``: whether it must be accepted."""

    label: str
    make: Callable[[], Any]
    right: bool = False


@dataclass(frozen=True)
class Subject:
    """A callable under test.

    Attributes:
        call: its name, as a user writes it.
        run: called with keyword arguments; what it raises is judged.
        base: creates valid arguments. An input replaces one of them, or adds one.
        values: for each argument, invalid values (and some marked ``right``, which must be accepted).
        names: other words by which a message may name an argument.
        complete: whether the call with ``base`` is run and must succeed; False if it would take too long.
    """

    call: str
    run: Callable[..., object]
    base: Callable[[], dict[str, Any]]
    values: Mapping[str, Sequence[Value]]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    complete: bool = True


class Input(NamedTuple):
    """One argument of one subject with one value."""

    subject: Subject
    argument: str
    value: Value

    def __str__(self) -> str:
        return f"{self.subject.call}({self.argument}={self.value.label})"

    def run(self) -> object:
        return self.subject.run(**{**self.subject.base(), self.argument: self.value.make()})


class AcceptedInput(NamedTuple):
    """An input that is accepted although it looks invalid, listed in ``docs/inputs.md``; ``*`` matches any text."""

    call: str
    argument: str
    value: str

    def covers(self, one: Input) -> bool:
        found = (one.subject.call, one.argument, one.value.label)
        return all(fnmatch.fnmatchcase(word, pattern) for word, pattern in zip(found, self, strict=True))


def inputs(subject: Subject) -> Iterator[Input]:
    """All inputs of a subject."""
    for argument, values in subject.values.items():
        for value in values:
            yield Input(subject, argument, value)


def accepted_inputs(page: Path = PAGE) -> list[AcceptedInput]:
    """The rows of the page's table "Accepted": call, argument, value, and why."""
    section = page.read_text(encoding="utf-8").split("\n## Accepted", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip().strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    return [AcceptedInput(*row[:3]) for row in rows if row[0] != "call" and set(row[0]) != {"-"}]


def check_input(one: Input, accepted: Iterable[AcceptedInput] = ()) -> str | None:
    """What is wrong with the answer to an input; None if it is as required."""
    listed = any(entry.covers(one) for entry in accepted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.run()
    except EXPECTED_ERRORS as error:
        return f"{one}: refused though it is right: {error}" if one.value.right else _unclear(one, error)
    except Exception as error:
        return f"{one}: {type(error).__name__}: {_line(error)}"
    return None if listed or one.value.right else f"{one}: accepted silently"


def _unclear(one: Input, error: Exception) -> str | None:
    text = str(error)
    named = (one.argument, *one.subject.names.get(one.argument, ()))
    if "\n" in text.strip():
        return f"{one}: the message has several lines: {_line(error)}"
    if len(text) > 600:
        return f"{one}: the message has {len(text)} characters: {_line(error)}"
    if not any(re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text) for name in named):
        return f"{one}: the message does not name {' or '.join(named)}: {type(error).__name__}: {_line(error)}"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def report(subjects: Sequence[Subject]) -> str:
    """One line with the numbers of inputs, calls and arguments."""
    every = [one for subject in subjects for one in inputs(subject)]
    arguments = {(one.subject.call, one.argument) for one in every}
    return f"{len(every):,} inputs: {len(subjects)} calls, {len(arguments)} arguments"
