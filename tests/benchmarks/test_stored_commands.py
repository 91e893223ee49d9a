"""Commands stored with figures and shown on pages name modules, options and files that exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main

from race_dist.cli import app

ROOT = Path(__file__).parents[2]
COMMAND_LINE = ("race_dist.cli", "race_dist.cli.__main__")


def commands(tree: Any) -> Iterator[str]:
    """Values of the keys "command" in a JSON tree."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from [value] if key == "command" else commands(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from commands(value)


def stored() -> list[tuple[str, str]]:
    files = sorted((ROOT / "docs/benchmarks").glob("*.json"))
    return [(f.name, c) for f in files for c in dict.fromkeys(commands(json.loads(f.read_text(encoding="utf-8"))))]


def check_options(words: list[str]) -> None:
    """Parse the arguments of ``race-dist`` as typer does, without running anything."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command)
    while hasattr(command, "commands"):
        command, name = command.commands[words[0]], words[0]
        context, words = command.context_class(command, parent=context, info_name=name), words[1:]
    command.make_parser(context).parse_args(args=list(words))


@pytest.mark.parametrize(("file", "command"), stored())
def test_a_stored_command_names_what_exists(file: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
    if words[0] == "race-dist" and words[1] in ("bytes", "step"):  # benchmarks.megatron stored its arguments without the module
        words = ["python", "-m", "race_dist.benchmarks.megatron", *words[1:]]
    module = words[words.index("-m") + 1] if "-m" in words else ""
    if words[0] == "race-dist" or module in COMMAND_LINE:
        monkeypatch.chdir(ROOT)
        # the first of these files have variant names with spaces but without quotes
        known = "--variant" not in words or "'" in command
        check_options(words[words.index(module) + 1 if module else 1 :]) if known else None
        return
    if module:
        found = find_spec(module)
        assert found is not None, f"{file}: there is no module {module}"
        assert found.origin is not None
        place = Path(found.origin)
        sources = list(place.parent.glob("*.py")) if place.name == "__init__.py" else [place]
        options = words[words.index(module) + 1 :]
    else:
        sources, options = [ROOT / words[1]], words[2:]
        assert sources[0].is_file()
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for option in (word for word in options if word.startswith("--")):
        assert f'"{option}"' in text, f"{file}: {sources[0]} has no option {option}"


def shown_commands() -> list[tuple[str, str]]:
    """Commands of the pages that begin with race-dist, continuation lines joined; synopses with brackets are left out."""
    line = re.compile(r"^(?: {4})?(?:\w+=\S+ )*(?:taskset -c 0 )?(race-dist .*?)(?:  +#.*)?$", re.MULTILINE)
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for command in line.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            if not any(part in command for part in ("[--", "|", "...", "`", "<")):
                found[page.name, command.strip()] = None
    return list(found)


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_a_shown_command_has_options_that_exist(page: str, command: str) -> None:
    check_options(shlex.split(command, comments=True)[1:])


def test_the_check_of_options_refuses_an_unknown_one() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        check_options(["bench", "attention", "--no-such-option"])
