"""RACE Attention: exact, linear in the sequence length, sequence-parallel.

The public names are imported on first use, so that ``import race_dist`` and the command's ``--help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from race_dist import renamed_modules

if TYPE_CHECKING:
    from race_dist.attention import race_attention as race_attention
    from race_dist.explain import explain_plan as explain_plan
    from race_dist.hashing import sample_planes as sample_planes
    from race_dist.nn import RaceAttention as RaceAttention
    from race_dist.nn import RaceConfig as RaceConfig
    from race_dist.sketch import SketchState as SketchState

__version__ = "0.1.0"

renamed_modules.install()

_HOMES = {
    "RaceAttention": "race_dist.nn",
    "RaceConfig": "race_dist.nn",
    "SketchState": "race_dist.sketch",
    "explain_plan": "race_dist.explain",
    "race_attention": "race_dist.attention",
    "sample_planes": "race_dist.hashing",
}

__all__ = ["RaceAttention", "RaceConfig", "SketchState", "__version__", "explain_plan", "race_attention", "sample_planes"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'race_dist' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
