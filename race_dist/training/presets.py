"""The configurations that come with the package: ``race-dist train demo`` finds configs/demo.toml."""

from __future__ import annotations

from pathlib import Path

import race_dist


def preset_folder() -> Path:
    """Where they are: in the installed package, or beside it in a checkout."""
    package = Path(race_dist.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_names(suffix: str = ".toml") -> list[str]:
    """Their names, in order."""
    return sorted(file.stem for file in preset_folder().glob(f"*{suffix}"))


def find_config(path: str | Path, suffix: str = ".toml") -> Path:
    """A file, or the preset of that name where there is no such file.

    Args:
        path: of a file, or a preset's name (``demo``, ``demo.toml``).
        suffix: of the presets that are meant: ``.toml`` (training) or ``.json`` (DeepSpeed).

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    preset = preset_folder() / f"{path.name.removesuffix(suffix)}{suffix}"
    if path.parent == Path() and preset.is_file():
        return preset
    raise FileNotFoundError(
        f"there is no configuration file {path}; give a path, or the name of a preset: {', '.join(preset_names(suffix))}"
    )
