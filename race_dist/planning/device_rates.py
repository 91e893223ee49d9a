"""Achieved rates of hardware: the constants of the cost model that only a measurement can give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from race_dist.files import read_json_object

MEASURED_ATTENTION = {8: (1.03, 1.32), 64: (1.18, 1.29), 256: (0.54, 1.66)}  # see Rates.attention


@dataclass(frozen=True)
class Rates:
    """Achieved rates. Each default has its origin; ``--rates FILE`` replaces any of them.

    Attributes:
        source: where the numbers come from, as text.
        matmul: fraction of the peak that large matrix products reach. Default: 0.65, what cuBLAS reaches in bfloat16 on
            an H100 at sizes of 2048 and more, power limit included (estimate).
        bandwidth: fraction of the rated memory bandwidth that element-wise kernels reach. Default: 0.87, a device copy
            on an H100 (2.92 of 3.35 TB/s, measured).
        attention: time of the attention as a multiple of the roofline of :func:`race_dist.planning.race_costs.attention_cost`
            (forward, backward), by the number of features S; the nearest S counts. Defaults: 2**20 tokens and 8 heads of 128
            on an H100 (measured, docs/benchmarks/attention-h100.json): 4.6 and 9.8 ms at S = 8, 5.3 and 9.6 ms at 64 (decay
            per token), 15.1 and 51.5 ms at 256, where fewer states are written forward than the roofline counts.
        elementwise_forward, elementwise_backward: bytes that element-wise kernels move in a pass, as a multiple of the
            bytes that autograd saves of it. Every saved tensor is written once and read by the next operation (2); in
            the backward pass it is read, and a gradient of its size written and read (3); PyTorch without a compiler
            moves its temporaries too: about half as much again (estimate).
        compiled_forward, compiled_backward: where blocks are compiled, the bytes that their kernels move as a multiple of
            what :mod:`race_dist.planning.elementwise_traffic` counts. Default: 1; the count gave 136 ms where a profile on an
            H100 had 143 ms (measured, docs/benchmarks/streaming-h100-2m.json).
        host_forward: seconds in which the host launches the kernels of one block's forward pass: about 120 launches of 5
            microseconds (estimate). A backward pass takes twice this. Small chunks are launch-bound.
        overlap: fraction of hidable communication that computation hides. Default: 0.9 (estimate).
    """

    source: str = "measurements on one H100, and estimates"
    matmul: float = 0.65
    bandwidth: float = 0.87
    attention: dict[int, tuple[float, float]] = field(default_factory=lambda: dict(MEASURED_ATTENTION))
    elementwise_forward: float = 3.0
    elementwise_backward: float = 4.5
    compiled_forward: float = 1.0
    compiled_backward: float = 1.0
    host_forward: float = 600e-6
    overlap: float = 0.9

    def __post_init__(self) -> None:
        for name in ("matmul", "bandwidth", "overlap"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 < value <= 1):
                raise ValueError(f"rate {name} must be above 0 and at most 1; got {value!r}")
        for name in ("elementwise_forward", "elementwise_backward", "compiled_forward", "compiled_backward", "host_forward"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"rate {name} must be a finite number of at least 0; got {value!r}")
        if not self.attention or not all(s > 0 and f > 0 and b > 0 for s, (f, b) in self.attention.items()):
            raise ValueError(
                "rate attention maps a number of features to two positive numbers (forward, backward), for "
                f'example {{"64": [2.1, 2.1]}}; got {self.attention!r}'
            )

    def attention_slowdown(self, features: int) -> tuple[float, float]:
        """``attention`` of the nearest number of features, by ratio."""
        nearest = min(self.attention, key=lambda s: abs(math.log(s / features)))
        return self.attention[nearest]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load_rates(path: str | Path) -> Rates:
    """Measured rates from a JSON file: an object with any of the fields of :class:`Rates`, or one that has such an object
    under ``"rates"`` beside other things (how it was measured, on what). What it leaves out keeps its default.

    Raises:
        ValueError: not JSON, an unknown field or a value out of range; names the file.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no rates file {path}")
    tree: Any = read_json_object(path)
    tree = tree.get("rates", tree)
    known = [f.name for f in fields(Rates)]
    if not isinstance(tree, dict) or not set(tree) <= set(known):
        extra = sorted(set(tree) - set(known)) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path}: rates are an object with the fields {', '.join(known)}; got {extra}")
    values = {"source": str(path), **tree}
    try:
        if "attention" in values:
            values["attention"] = {int(s): (float(f), float(b)) for s, (f, b) in values["attention"].items()}
        return replace(Rates(), **values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
