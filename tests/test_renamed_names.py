"""Public names that were renamed work for one release, with a warning."""

from __future__ import annotations

from types import ModuleType

import pytest

from race_dist import models, nn, parallel


@pytest.mark.parametrize("module", [models, nn, parallel])
def test_old_names_are_the_new_ones(module: ModuleType) -> None:
    for old, new in module.RENAMED.items():
        with pytest.warns(DeprecationWarning, match=f"{module.__name__}.{old} is now {module.__name__}.{new}"):
            assert getattr(module, old) is getattr(module, new)
        assert old not in module.__all__


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match=r"module 'race_dist\.models' has no attribute 'prefil'"):
        models.__getattr__("prefil")
