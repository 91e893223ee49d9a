"""Modules and public names that were renamed before version 0.2: the old names work for one release, with a warning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

RENAMED = {
    "race_dist.launch.place": "race_dist.launch.rank_env",
    "race_dist.launch.records": "race_dist.launch.job_store",
    "race_dist.training.corpus": "race_dist.training.data.corpus",
    "race_dist.training.metrics": "race_dist.training.logging.metrics",
    "race_dist.training.packed": "race_dist.training.data.packed",
    "race_dist.training.ranks": "race_dist.training.rank_mesh",
    "race_dist.training.report": "race_dist.training.logging.report",
    "race_dist.training.rundir": "race_dist.training.run_directory",
    "race_dist.training.text_files": "race_dist.training.data.text_files",
    "race_dist.training.tokenizing": "race_dist.training.data.tokenizer",
    "race_dist.training.weights": "race_dist.training.weights_file",
}


class RenamedModules(MetaPathFinder, Loader):
    """Imports the new module where an old name is asked for."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in RENAMED else None

    def exec_module(self, module: ModuleType) -> None:
        new = RENAMED[module.__name__]
        message = f"the module {module.__name__} is now {new}; the old name stops working with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)


def install() -> None:
    """Make the old names importable, once per process."""
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.append(RenamedModules())


def renamed_attribute(module: str, renamed: dict[str, str], name: str) -> object:
    """The ``__getattr__`` of a module whose public names were renamed: the value under the new name, with a warning.

    Raises:
        AttributeError: ``name`` is no old name.
    """
    if name not in renamed:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = renamed[name]
    message = f"{module}.{name} is now {module}.{new}; the old name stops working with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return getattr(sys.modules[module], new)
