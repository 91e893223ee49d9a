"""Invalid values by the type of the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from tests.inputs.table import Value

INF, NAN = math.inf, math.nan


class Unprintable:
    """An object of an unknown class that cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def value(label: str, what: Any) -> Value:
    return Value(label, lambda: what)


def wrong(*pairs: tuple[str, Callable[[], Any]]) -> list[Value]:
    """Values given as pairs of a label and a function that creates the value."""
    return [Value(label, make) for label, make in pairs]


COMMON: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "'x'": lambda: "x",
    "''": lambda: "",
    "b'x'": lambda: b"x",
    "1.5": lambda: 1.5,
    "True": lambda: True,
    "np.True_": lambda: np.True_,
    "[]": list,
    "[1]": lambda: [1],
    "{}": dict,
    "()": tuple,
    "object": object,
    "Unprintable": Unprintable,
    "3": lambda: 3,
    "0": lambda: 0,
    "1j": lambda: 1j,
    "int": lambda: int,
    "array": lambda: np.arange(2),
    "nan": lambda: NAN,
    "tensor": lambda: torch.ones(2),
    "'💥'": lambda: "💥",
    "10**400": lambda: 10**400,
}


def common(*labels: str, but: Iterable[str] = (), optional: bool = False) -> list[Value]:
    """Values of all types (or those named) except ``but``; None is valid if the argument is optional."""
    left = {*but, *(["None"] if optional else [])}
    return [Value(label, make) for label, make in COMMON.items() if label not in left and (not labels or label in labels)]


def integers(
    least: int | None = None, most: int | None = None, *, optional: bool = False, right: int | None = None, huge: bool = True
) -> list[Value]:
    """No integers, and integers out of range. ``right``: a NumPy integer of this value has to be accepted. ``huge``: whether
    2**70 and 10**400 are out of range."""
    made = common(but=("3", "0", *(() if huge else ("10**400",))), optional=optional)
    made += [value("'3'", "3"), value("2.0", 2.0), value("inf", INF), value("np.float32(2)", np.float32(2))]
    made += [value("2**70", 2**70)] if huge else []
    made += [] if least is None else [value(str(least - 1), least - 1), value("-10**30", -(10**30))]
    made += [] if most is None else [value("most + 1", most + 1)]
    made += [] if right is None else [Value(f"np.int64({right})", lambda: np.int64(right), right=True)]
    return made


def numbers(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
    right: float | None = None,
) -> list[Value]:
    """No numbers, numbers out of range, infinite ones and NaN."""
    made = common(but=("1.5", "3", "0"), optional=optional)
    made += [value("'1'", "1"), value("inf", INF), value("-inf", -INF), value("-10**400", -(10**400))]
    low = least if above is None else above
    made += [] if low is None else [value(f"{low - 1:g}", low - 1)]
    made += [value(f"{above:g}", above)] if above is not None else []
    made += [] if most is None else [value("beyond the most", most * 2 + 1)]
    made += (
        []
        if right is None
        else [
            Value("np.float32", lambda: np.float32(right), right=True),
            Value("np.float64", lambda: np.float64(right), right=True),
        ]
    )
    return made


def flags() -> list[Value]:
    """What is neither True nor False."""
    return [*common(but=("True",)), value("1", 1), value("'yes'", "yes"), value("1.0", 1.0), value("'true'", "true")]


def choices(*, optional: bool = False) -> list[Value]:
    """No such word."""
    return [
        *common(optional=optional),
        value("array of words", np.array(["global", "none"])),
        value("['global']", ["global"]),
        value("padded", " auto "),
    ]


def tensors(
    right: Callable[[], torch.Tensor],
    *,
    dtypes: Sequence[torch.dtype] = (),
    optional: bool = False,
    shape: bool = True,
    arrays: bool = True,
) -> list[Value]:
    """No tensor, one without values, of other dtypes (those given), and of other shapes than the right one.

    ``arrays``: whether a NumPy array is wrong.
    """
    made = common(optional=optional, but=("tensor", *(() if arrays else ("array",))))
    made += wrong(
        ("meta", lambda: right().to("meta")),
        ("sparse", lambda: right().to_sparse()),
        ("list of it", lambda: right().tolist()),
        ("(it,)", lambda: (right(),)),
    )
    made += wrong(("numpy", lambda: right().numpy())) if arrays else []
    made += [Value(str(dtype), lambda dtype=dtype: right().to(dtype)) for dtype in dtypes]
    if shape:
        made += wrong(("one more dimension", lambda: right()[None]), ("no dimension", lambda: right().flatten()[0]))
    return made


def groups() -> list[Value]:
    """No group of ranks (None is one rank)."""
    return [*common(optional=True), value("[0]", [0]), value("-1", -1)]


def devices(*, optional: bool = True) -> list[Value]:
    """No device, or none of this machine."""
    names = ("foo", "", "-1", "1.5", "²", "1e3", "tpu", "cpu:9", "cuda:99")
    made = common(
        "1.5",
        "True",
        "[]",
        "[1]",
        "{}",
        "()",
        "object",
        "Unprintable",
        "1j",
        "int",
        "array",
        "tensor",
        "b'x'",
        "10**400",
        "np.True_",
        "None",
        "nan",
        optional=optional,
    )
    made += [value(repr(name), name) for name in names]
    return (
        made
        if torch.cuda.is_available()
        else [*made, value("'cuda'", "cuda"), value("7", 7), value("torch.device", torch.device("cuda", 0))]
    )


def dtypes(*, optional: bool = False) -> list[Value]:
    """No dtype that is computed with."""
    made = common(optional=optional)
    made += [value("'float32'", "float32"), value("float", float), value("np.float32", np.float32)]
    return made + [value(str(d), d) for d in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)]


def instances(*others: tuple[str, Callable[[], Any]], optional: bool = False) -> list[Value]:
    """Objects of other classes."""
    return [*common(optional=optional), *wrong(*others)]


def callbacks() -> list[Value]:
    """What cannot be called."""
    return common(optional=True, but=("int",))


def paths() -> list[Value]:
    """No path of a folder."""
    return [
        *common("None", "''", "b'x'", "1.5", "True", "[]", "[1]", "{}", "()", "object", "Unprintable", "3", "nan", "tensor"),
        value("' '", " "),
        value("NUL", "a\0b"),
        value("5000 characters", "x" * 5000),
        value("of a file", __file__),
        value("in a file", __file__ + "/x"),
        value("long parts", "/".join(["x" * 200] * 40)),
    ]
