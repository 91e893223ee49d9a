"""Checks of arguments: each raises an error of one sentence that names the argument, its value and what is expected.

Public functions check the arguments of users; internal calls are not checked again. No check synchronizes with a device: the
values of a tensor are read only where it is :func:`readable`.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from race_dist import messages

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of RACE Attention
INTEGERS = (torch.int64, torch.int32)  # dtypes of token ids and document boundaries
MAX_SECONDS = 2_000_000  # three weeks: libraries store timeouts as 32-bit milliseconds
MAX_BYTES = 2**47  # address space of a process
FAR = 2**40

_Instance = TypeVar("_Instance")
_Option = TypeVar("_Option", bound=str)


def short_repr(value: object, limit: int = 80) -> str:
    """A value on one line of at most ``limit`` characters, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {list(value.shape)}"
    return messages.short_repr(value, limit)


def typed_repr(value: object) -> str:
    """The type and the value, for errors about a wrong type."""
    text = short_repr(value)
    plain = value is None or text.startswith(("a tensor", "an array", "an integer"))
    return text if plain else f"{type(value).__name__} {text}"


def integer(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None, words: str | None = None) -> int:
    """Check an integer and its range: an int, a NumPy integer or another type with ``__index__``, but no bool and no tensor.

    ``words``: the expectation, in place of "an integer from ... to ...".

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]
        if isinstance(value, (bool, np.bool_, Tensor, np.ndarray)) or not hasattr(type(value), "__index__"):
            raise TypeError(f"{name} must be {words or f'an integer{_range(minimum, maximum)}'}; got {typed_repr(value)}")
        value = operator.index(value)
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        far = f", above {short_repr(maximum)}" if maximum is not None and value > maximum >= FAR else ""
        raise ValueError(f"{name} must be {words or f'an integer{_range(minimum, maximum)}'}; got {short_repr(value)}{far}")
    return int(value)


def is_number(value: object) -> bool:
    """Whether it is an int, a float or a NumPy number, but not a bool."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, (np.integer, np.floating))


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    words: str | None = None,
) -> float:
    """Check a finite number and its range: an int, a float, or a NumPy number, but no bool and no tensor. ``words``: as above.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range, infinite or NaN.
    """
    words = words or f"a finite number{_range(minimum, maximum, above)}"
    if not is_number(value):
        raise TypeError(f"{name} must be {words}; got {typed_repr(value)}")
    try:
        found = float(value)
    except OverflowError:  # an integer too large for a float
        found = math.inf if value > 0 else -math.inf
    in_range = (
        math.isfinite(found)
        and (above is None or found > above)
        and (minimum is None or found >= minimum)
        and (maximum is None or found <= maximum)
    )
    if not in_range:
        raise ValueError(f"{name} must be {words}; got {short_repr(value)}")
    return found


def seconds(name: str, value: Any) -> float:
    """Check a duration: a positive number of seconds. Raises TypeError or ValueError."""
    if not is_number(value):
        raise TypeError(f"{name} must be a positive number of seconds; got {typed_repr(value)}")
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"{name} must be a positive number of seconds, at most {MAX_SECONDS:,}; got {short_repr(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Check a bool; 0, 1 and strings are refused. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {short_repr(value)}")
    return value


def choice(name: str, value: Any, options: Iterable[_Option]) -> _Option:
    """Check one of several strings.

    Raises:
        TypeError: it is not a string.
        ValueError: there is no such option.
    """
    if isinstance(value, str):
        for option in options:
            if value == option:
                return option
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {', '.join(map(repr, options))}; got {short_repr(value)}")


def instance(name: str, value: Any, kind: type[_Instance], fix: str = "") -> _Instance:
    """Check an instance of a class; ``fix``: what to do instead, as the end of the sentence. Raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {typed_repr(value)}{fix and ': '}{fix}")
    return value


def callback(name: str, value: Any) -> Any:
    """Check a callable, or None. Raises TypeError."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None; got {typed_repr(value)}")
    return value


def tensor(name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] | None = None, dim: int | None = None) -> Tensor:
    """Check a dense tensor with storage: its class, layout, device, dtype and dimensions, not its values.

    Raises:
        TypeError: it is not a tensor, or of another dtype.
        ValueError: it is sparse or nested, it is on the meta device, or it has another number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {typed_repr(value)}")
    if value.layout is not torch.strided or value.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor, but is {'nested' if value.is_nested else value.layout}: convert it "
            f"with {'.to_padded_tensor(0)' if value.is_nested else '.to_dense()'}"
        )
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values: make it on the device that computes")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}; it must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension{'s' * (dim != 1)}; got a tensor of shape {list(value.shape)}")
    return value


def readable(x: Tensor) -> bool:
    """Whether a tensor's values can be read for free: reading synchronizes with a device and breaks a compiled graph, and the
    tensors of a tracer have no values."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and not is_in_torch_dispatch_mode()
    )


def cu_seqlens(value: Tensor | None, length: int | None = None, *, batch: int = 1) -> None:
    """Check the boundaries of packed documents: ``[N + 1]`` integers that start at 0, never fall and end at ``length``.

    None means no packed documents; ``batch``: rows of the call. Values are read only where they are :func:`readable`.

    Raises:
        TypeError: they are not a tensor.
        ValueError: their dtype, shape or values do not fit.
    """
    if value is None:
        return
    tensor("cu_seqlens", value)
    if value.dim() != 1 or value.numel() < 2 or value.dtype not in INTEGERS:
        raise ValueError(f"cu_seqlens must be int32 or int64 [N + 1] with N >= 1; got {value.dtype} {list(value.shape)}")
    if batch != 1:
        raise ValueError(f"packed documents (cu_seqlens) need a batch of 1; got B = {batch}: pack them into one row")
    if not readable(value):
        return
    first, last = int(value[0]), int(value[-1])
    if first != 0 or bool((value.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never fall; got {value[:20].tolist()}")
    if length is not None and last != length:
        raise ValueError(f"cu_seqlens must end at the sequence's length, {length}; it ends at {last}")


def rows(name: str, value: Any, count: int) -> slice | Tensor:
    """Check an index of rows that keeps their dimension: a slice, ``[n]`` integers, or ``[count]`` bool.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such row.
    """
    words = f"{name} must be a slice, or a tensor of row indices or of bool"
    if isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            if part is not None:
                integer(f"{name}: a slice's part", part)
        if value.step is not None and value.step < 1:
            raise ValueError(f"{words}; got {short_repr(value)}, which steps backwards: use .flip(0) on the tensors")
        return value
    if not isinstance(value, Tensor):
        fix = f": [{value}:{value + 1}] keeps the dimension" if type(value) is int and 0 <= value < count else ""
        raise TypeError(f"{words}; got {typed_repr(value)}{fix}")
    tensor(name, value, dtypes=(torch.bool, *INTEGERS), dim=1)
    if value.dtype == torch.bool and len(value) != count:
        raise ValueError(f"{words} [{count}]; got {len(value)} of them")
    if value.dtype != torch.bool and readable(value) and not bool(((value < count) & (value >= -count)).all()):
        raise ValueError(f"{words} from 0 to {count - 1}; got {short_repr(value.tolist())}")
    return value


def device(name: str, value: Any) -> torch.device | None:
    """Check a device of this machine, or None.

    Raises:
        TypeError: it is neither a device nor the name of one.
        ValueError: the name is not valid, or this machine has no such device.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name} must be a torch.device or its name, such as 'cpu' or 'cuda:0'; got {typed_repr(value)}")
    if isinstance(value, torch.device) and _exists(value):
        return value
    try:
        found = torch.device(value)
        if found.type == "cpu" and found.index not in (None, 0):
            raise ValueError("there is one 'cpu'")
        if found.type not in ("cpu", "meta"):
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, OverflowError, ImportError) as error:
        here = "'cpu'" + (f", 'cuda:0' to 'cuda:{torch.cuda.device_count() - 1}'" if torch.cuda.is_available() else "")
        reason = (str(error).splitlines() or [""])[0].split(": ")[-1]
        raise ValueError(f"{name} must be a device of this machine ({here}); got {short_repr(value)}: {reason}") from None
    return found


def _exists(device: torch.device) -> bool:
    """Whether the device is known to exist without using it."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index is None or device.index < torch.cuda.device_count())
    return device.type in ("cpu", "meta") and device.index is None


def dtype(name: str, value: Any, options: tuple[torch.dtype, ...] = DTYPES) -> torch.dtype:
    """Check one of several dtypes. Raises TypeError."""
    if not isinstance(value, torch.dtype) or value not in options:
        raise TypeError(f"{name} must be {' or '.join(map(str, options))}; got {typed_repr(value)}")
    return value


def factory_kwargs(device_: Any, dtype_: Any) -> dict[str, Any]:
    """Check ``device`` and ``dtype`` of a module's parameters, which may be None. Raises TypeError or ValueError."""
    device("device", device_)
    if dtype_ is not None:
        dtype("dtype", dtype_)
    return {"device": device_, "dtype": dtype_}


def size(item_bytes: int, **sizes: int) -> None:
    """Refuse a tensor that no machine can hold: the product of ``sizes``, by argument name, times ``item_bytes``.

    Raises:
        ValueError: it is more than a process can address.
    """
    wanted = math.prod(sizes.values()) * item_bytes
    if wanted > MAX_BYTES:
        named = ", ".join(f"{name} = {short_repr(value)}" for name, value in sizes.items())
        raise ValueError(f"{named} are together more than the 128 TiB that a process can address: make them smaller")


def folder(name: str, value: Any) -> Path:
    """Check the path of a folder, which need not exist yet.

    Raises:
        TypeError: it is not a path.
        ValueError: it is empty, too long, or the path of a file.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be the path of a folder; got {typed_repr(value)}")
    text = os.fspath(value)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{name} must be the path of a folder; got {short_repr(value)}")
    path = Path(text)
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError(
            f"{name} must be the path of a folder, and file systems hold no name over 255 bytes; got {short_repr(value)}"
        )
    for parent in (path, *path.parents):
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(
                    f"{name} must be the path of a folder; got {short_repr(value)}, but {short_repr(str(parent))} is a file"
                )
            break
    return path


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """Check a dictionary, or another mapping. Raises TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary; got {typed_repr(value)}")
    return value


def _range(minimum: float | None, maximum: float | None, above: float | None = None) -> str:
    if maximum is not None and maximum >= FAR:  # a bound that is only exceeded by mistake is not mentioned
        maximum = None
    if minimum is not None and maximum is not None:
        return f" from {_bound(minimum)} to {_bound(maximum)}"
    parts = ([f"above {_bound(above)}"] if above is not None else []) + (
        [f"of at least {_bound(minimum)}"] if minimum is not None else []
    )
    parts += [f"at most {_bound(maximum)}"] if maximum is not None else []
    return " " + " and ".join(parts) if parts else ""


def _bound(value: float) -> str:
    if isinstance(value, int) and value == 2**31 - 1:
        return "2**31 - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)
