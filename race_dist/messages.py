"""How error messages show values: on one line, and not longer than a line."""

from __future__ import annotations

import math


def short_repr(value: object, limit: int = 80) -> str:
    """A value on one line of at most ``limit`` characters, whatever its ``repr`` does."""
    if isinstance(value, int) and value.bit_length() > 130:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the class is not ours, or a container holds integers too long to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
