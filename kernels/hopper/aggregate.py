"""Types of values with field names, which kernels pass to their partitions."""

from __future__ import annotations

from typing import get_type_hints

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate


@gluon.constexpr_function
def _assign_fields(self, *values, **named):
    """The constructor of every aggregate: its fields, in order or by name."""
    fields = type(self).fields
    for name, value in (dict(zip(fields, values)) | named).items():
        setattr(self, name, value if hasattr(value, "_flatten_ir") else gl.constexpr(value))


def aggregate(cls):
    """Make an annotated class a type of kernel values, as Gluon's tutorials do, with a constructor that takes its fields.

    A field may be a compile-time constant whatever its annotation says (None where a call has no such thing)."""
    hints = get_type_hints(cls)
    cls.__annotations__ = {name: (hint, gl.constexpr) for name, hint in hints.items()}
    cls.__init__ = _assign_fields
    made = _aggregate(cls)
    made.fields = tuple(hints)
    return made
