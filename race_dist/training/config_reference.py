"""The reference of all configuration keys, with defaults and descriptions, generated from the configuration classes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from race_dist.training.config import TrainConfig
from race_dist.training.presets import preset_names

HEAD = """# Configuration

A run is a TOML file, of which `model.dim`, `model.num_layers` and `model.num_heads` are the only keys without a default.
`race-dist config` prints this list, `race-dist config data optim.lr` a part of it. `--override KEY=VALUE` of `train`, `plan`
and `bench streaming` changes one key. An unknown key is an error that names the nearest one.

This page is made by `race-dist config --markdown > docs/configuration.md`.
"""


@dataclass(frozen=True)
class Key:
    """One key of a run's TOML.

    Attributes:
        name: ``"optim.lr"``.
        kind: the type of its value, in words.
        default: as TOML, or ``"required"``.
        meaning: the description, from the class's docstring.
    """

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """The keys of one table, ``[name]``, and the description of its class."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def tables() -> list[Table]:
    """All tables of a run's TOML; the keys outside a table come first."""
    return list(_tables(TrainConfig, ""))


def _tables(model: type[BaseModel], name: str) -> Iterator[Table]:
    described, inner, keys = _attributes(model), [], []
    for field, info in model.model_fields.items():
        full = f"{name}.{field}" if name else field
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner.append((info.annotation, full))
            continue
        meaning = info.description or described.get(field)
        assert meaning, f"{model.__name__}.{field} has no description"
        keys.append(Key(full, _kind(info.annotation), _default(name, field, info), _plain(meaning)))
    yield Table(name, _plain(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0]), tuple(keys))
    for annotation, full in inner:
        yield from _tables(annotation, full)


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The entries of the "Attributes:" section of a class's docstring."""
    _, _, section = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + section.split("\n\n")[0]):
        names, colon, text = entry.strip().partition(": ")
        if colon:
            found |= {name.strip(): text for name in names.split(",")}
    return found


def _plain(text: str) -> str:
    """On one line, with Markdown's form of code."""
    text = " ".join(text.replace("``", "`").replace("None:", "left out:").split())
    return text[:1].upper() + text[1:]


def _kind(annotation: Any) -> str:
    if annotation is NoneType:
        return "left out"
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "a list of numbers"
    if get_origin(annotation) is dict:
        return "a table"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if annotation in names:
        return names[annotation]
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kind(arguments[0])
    return " or ".join(_kind(a) for a in arguments if a is not NoneType)


def _default(table: str, field: str, info: FieldInfo) -> str:
    if (table, field) == ("model", "vocab_size"):
        return "256"  # TrainConfig fills in bytes
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "left out"
    return "{}" if value == {} else json.dumps(value)


def to_text(wanted: list[str]) -> str:
    """Lines for a terminal.

    Args:
        wanted: names of keys and tables; empty: all.

    Raises:
        ValueError: there is no such key or table; the message names the nearest.
    """
    keys = [key for table in tables() for key in table.keys]
    for name in wanted:
        if not any(_in(key.name, name) for key in keys):
            import difflib

            near = difflib.get_close_matches(name, [*(key.name for key in keys), *(t.name for t in tables() if t.name)], n=1)
            hint = f"did you mean {near[0]}?" if near else "race-dist config lists all"
            raise ValueError(f"there is no key {name!r}; {hint}")
    chosen = [key for key in keys if not wanted or any(_in(key.name, name) for name in wanted)]
    return "\n".join(f"{key.name} = {key.default}\n    {key.kind}. {key.meaning}" for key in chosen)


def _in(key: str, name: str) -> bool:
    return key == name or key.startswith(name + ".")


def to_markdown() -> str:
    """The page docs/configuration.md."""
    parts = [HEAD, f"Presets, by name or as files in `configs/`: {', '.join(f'`{n}`' for n in preset_names())}.\n"]
    for table in tables():
        parts.append(f"## {f'[{table.name}]' if table.name else 'Keys outside a table'}\n\n{table.meaning}\n")
        rows = [f"| `{key.name}` | `{key.default}` | {_cell(key.kind)} | {_cell(key.meaning)} |" for key in table.keys]
        parts.append("\n".join(["| key | default | value | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
