"""The presets: training configurations that come with the package. ``race-dist train demo`` reads configs/demo.toml."""

from __future__ import annotations

from pathlib import Path

import race_dist
from race_dist.config_loader import NamedFiles


def _presets(suffix: str) -> NamedFiles:
    """In the installed package, or beside it in a checkout."""
    package = Path(race_dist.__file__).parent
    installed = package / "configs"
    return NamedFiles(installed if installed.is_dir() else package.parent / "configs", suffix)


def preset_names(suffix: str = ".toml") -> list[str]:
    """The names of all presets, sorted."""
    return _presets(suffix).names()


def find_config(path: str | Path, suffix: str = ".toml") -> Path:
    """The path of a configuration file: ``path`` itself if it is a file, otherwise the preset of that name.

    Args:
        path: a file, or the name of a preset (``demo``, ``demo.toml``).
        suffix: which presets to look at: ``.toml`` (training) or ``.json`` (DeepSpeed).

    Raises:
        FileNotFoundError: there is neither a file nor a preset.
    """
    path = Path(path)
    if path.is_file():
        return path
    preset = _presets(suffix).find(path.name.removesuffix(suffix)) if path.parent == Path() else None
    if preset is None:
        raise FileNotFoundError(
            f"there is no configuration file {path}; give a path, or the name of a preset: {', '.join(preset_names(suffix))}"
        )
    return preset
