"""Whether kernels run under Triton's interpreter, on CPU tensors, and what that needs.

Triton reads ``TRITON_INTERPRET`` when it is imported: set it before.
"""

from __future__ import annotations

import os

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _repair_index() -> None:
    """Let a loop's bound be a loaded number: Triton up to 3.6 takes ``int`` of a one-element array, which numpy
    refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRET:
    _repair_index()
