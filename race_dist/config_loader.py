"""The one loader of configurations: a TOML file, overrides ``a.b=value`` from the command line, and the check of the result.

Training runs, job descriptions and benchmark protocols are all read here, so that every command reports the same mistake in
the same words. The classes that check the result are subclasses of :class:`race_dist.strict_config.StrictConfig`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from race_dist.strict_config import StrictConfig

Config = TypeVar("Config", bound=StrictConfig)


@dataclass(frozen=True)
class ConfigLoader(Generic[Config]):
    """How one kind of configuration is read.

    Attributes:
        config_class: checks the result.
        option: the command-line option that gives an override, for error messages.
        example: what an override looks like, for error messages.
    """

    config_class: type[Config]
    option: str
    example: str

    def load(self, path: Path | None, overrides: Iterable[str] = (), *, source: str | None = None) -> Config:
        """Read a file, apply the overrides and check the result.

        Args:
            path: the TOML file; None: the defaults.
            overrides: ``"a.b=value"``; the values are TOML, and a bare word is a string.
            source: what error messages begin with; None: the path.

        Raises:
            ValueError: the file is not TOML, an override has no ``=``, a key is unknown (the message names the nearest known
                key) or a value is out of its range.
            FileNotFoundError: the file does not exist.
        """
        tree = {} if path is None else read_toml(path)
        for override in overrides:
            self._apply(tree, override)
        return self.config_class.check(tree, source=str(path) if source is None else source)

    def _apply(self, tree: dict[str, Any], override: str) -> None:
        """Set the key that one override names."""
        key, equals, text = override.partition("=")
        keys = [part.strip() for part in key.split(".")]
        if not equals or not all(keys):
            raise ValueError(f"{self.option} {override!r} is not of the form {self.example}")
        for depth, part in enumerate(keys[:-1], 1):
            tree = tree.setdefault(part, {})
            if not isinstance(tree, dict):
                raise ValueError(f"{self.option} {override!r}: {'.'.join(keys[:depth])} is a value, not a table")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            parsed = {"value": text.strip()}
        tree[keys[-1]] = parsed["value"] if len(parsed) == 1 else text


@dataclass(frozen=True)
class NamedFiles:
    """Configuration files that come with the package and are addressed by name: the presets, the job templates.

    Attributes:
        folder: where they are.
        suffix: of their file names.
        hidden: names in the folder that are not configurations of their own.
    """

    folder: Path
    suffix: str = ".toml"
    hidden: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(file.stem for file in self.folder.glob(f"*{self.suffix}") if file.stem not in self.hidden)

    def find(self, name: str) -> Path | None:
        """The file of that name; None if there is none."""
        return self.folder / f"{name}{self.suffix}" if name in self.names() else None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file. A byte-order mark, as editors on Windows write it, is skipped.

    Raises:
        ValueError: the file is not TOML or not UTF-8; the message names the file.
        FileNotFoundError: the file does not exist.
    """
    path = Path(path)
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data[:64]:
        raise ValueError(f"{path} is UTF-16 text, but TOML is UTF-8: save it as UTF-8")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}), but TOML is: save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid TOML: it is nested too deeply") from None
