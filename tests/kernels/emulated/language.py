"""What kernels call: one function for each of Gluon's (and Triton's) that the pipelines use, and how a kernel is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.emulated.machine import Barrier, Clock, Machine, Shared, current, line_of_kernel
from tests.kernels.emulated.values import Hazard, Pointer, Value, combined, constant, torch_dtype


class Emulated:
    """A kernel, or a function that kernels call, that runs here. ``seed``: of the order in which partitions take turns."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self.function, self.seed = _translated(kernel.fn, {}), seed

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            waited: dict[str, bool] = {}
            for program in range(grid[0]):
                machine = Machine(program, self.seed + program)
                machine.run(self.function, tuple(map(_argument, arguments)))
                for barrier in machine.barriers:
                    if barrier.phase:
                        waited[barrier.name] = waited.get(barrier.name, False) or barrier.waits > 0
            for name in (name for name, somebody in waited.items() if not somebody):
                raise Hazard(f"nobody waits at {name}: the compiler drops it and gives its shared memory to others")

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to(x)
    if type(x) is int:
        return Value(torch.tensor(x, dtype=torch.int32 if abs(x) < 2**31 else torch.int64))
    if isinstance(x, tuple):
        values = map(_argument, x)
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    return x


def _translated(function: Any, modules: dict[int, dict[str, Any]]) -> Callable[..., Any]:
    """A kernel's Python function with this language for Triton's; ``modules``: those that are translated already."""
    found = function.__globals__
    if id(found) not in modules:
        names = modules[id(found)] = dict(found)
        for name, value in found.items():
            names[name] = _meaning(name, value, modules)
    return FunctionType(function.__code__, modules[id(found)], function.__name__, function.__defaults__)


KERNEL_FUNCTIONS = ("JITFunction", "GluonJITFunction", "InterpretedFunction")


def _record(aggregate: Any, modules: dict[int, dict[str, Any]]) -> type:
    """A class with an aggregate's fields and methods."""

    def assign(self: Any, *values: Any, **named: Any) -> None:
        self.__dict__.update(zip(aggregate.fields, values), **named)

    members = {name: getattr(aggregate, name) for name in dir(aggregate)}
    methods = {name: _translated(x.fn, modules) for name, x in members.items() if type(x).__name__ in KERNEL_FUNCTIONS}
    return type(aggregate.__name__, (), {"__init__": assign, **methods})


def _meaning(name: str, value: Any, modules: dict[int, dict[str, Any]]) -> Any:
    kind = type(value).__name__
    if kind in KERNEL_FUNCTIONS:
        return _translated(value.fn, modules)
    if getattr(value, "__triton_aggregate__", False):
        return _record(value, modules)
    if kind == "ConstexprFunction":  # layouts, which mean nothing here
        return lambda *arguments: None
    if isinstance(value, ModuleType) and "triton" in value.__name__:
        return LANGUAGE.get(value.__name__.rpartition(".")[2], value)
    return HOPPER.get(name, constant(value))


def _tensor(x: Any) -> Tensor:
    return x.read() if isinstance(x, Value) else torch.tensor(constant(x))


# --- blocks --------------------------------------------------------------------------------------------------------------


def arange(start: int, end: int, layout: Any = None) -> Value:
    return Value(torch.arange(start, end, dtype=torch.int32))


def full(shape: list[int], value: float, dtype: Any, layout: Any = None) -> Value:
    return Value(torch.full([int(n) for n in shape], value, dtype=torch_dtype(dtype)))


def zeros(shape: list[int], dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype)


def where(condition: Value, a: Any, b: Any) -> Value:
    if not isinstance(a, Value) and not isinstance(b, Value):
        a = Value(torch.tensor(float(a)))
    return combined(lambda x, y: torch.where(condition.read(), x, y), a, b)


def total(x: Value, axis: int) -> Value:
    return Value(x.read().sum(axis))


def associative_scan(x: Value, axis: int, add: Callable[[Any, Any], Any], reverse: bool = False) -> Value:
    elements = [Value(element) for element in x.read().unbind(axis)]
    if reverse:
        elements.reverse()
    sums = reduce(lambda done, element: [*done, add(done[-1], element)], elements[1:], elements[:1])
    if reverse:
        sums.reverse()
    return Value(torch.stack([element.read() for element in sums], axis))


def inline_asm_elementwise(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """``mov``; ``ex2`` and ``lg2``, of which ``ftz`` makes numbers below float32's normal ones 0."""
    flushed = lambda x: torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0, x)
    (x,) = args
    if asm.startswith("mov"):
        return x
    return Value(flushed({"ex2": torch.exp2, "lg2": torch.log2}[asm[:3]](flushed(x.read()))))


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Value:
    return pointer.load(mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    pointer.store(value, mask)


def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any, value: Value | None = None) -> Any:
    """Nothing is in it yet: NaN."""
    if layout is BARRIERS:
        return Barriers(shape, f"the mbarrier of {line_of_kernel()}")
    room = Shared(torch.full([int(n) for n in shape], torch.nan, dtype=torch_dtype(dtype)), line_of_kernel())
    if value is not None:
        room.store(value)
    return room


# --- Hopper --------------------------------------------------------------------------------------------------------------

BARRIERS = object()


class Barriers:
    """A ring's full or empty barriers."""

    def __init__(self, shape: list[int], name: str) -> None:
        self.shape = tuple(shape)
        self.barriers = [Barrier(f"{name}, number {n}") for n in range(int(shape[0]))]
        current().barriers.extend(self.barriers)

    def index(self, n: Any) -> Barrier:
        return self.barriers[int(n)]


def init(barrier: Barrier, count: int) -> None:
    barrier.init(count)


def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.arrive(current().partition.agent, count)


def expect(barrier: Barrier, size: int) -> None:
    barrier.arrive(current().partition.agent, expected=int(size))


def wait(barrier: Barrier, phase: Any) -> None:
    barrier.wait(int(phase))


@dataclass
class Descriptor:
    """A matrix in memory that TMA moves in boxes."""

    base: Pointer
    shape: list[int]
    strides: list[int]
    box: list[int]

    def places(self, coordinates: list[Any]) -> tuple[Value, Value]:
        """Where a box's elements lie, and which of them the matrix has."""
        row, column = (torch.arange(n) + int(first) for n, first in zip(self.box, coordinates))
        inside = (row < self.shape[0])[:, None] & (column < self.shape[1])[None, :]
        return Value(row[:, None] * self.strides[0] + column[None, :] * self.strides[1]), Value(inside)


def make_tensor_descriptor(
    base: Pointer, shape: list[Any], strides: list[Any], box: list[Any], layout: Any = None
) -> Descriptor:
    """Raises what the engine would: rows that do not begin at, or are not apart by, multiples of 16 bytes."""
    size = base.element_ty.itemsize
    *apart, unit = map(int, strides)
    first = int(base.offsets) * size + base.memory.data_ptr()
    if first % 16 or unit != 1 or any(n * size % 16 for n in apart):
        raise Hazard(f"TMA moves no rows at {first} that are {apart} elements of {size} bytes apart")
    return Descriptor(base, [int(n) for n in shape], [*apart, unit], [int(n) for n in box])


def async_copy_global_to_shared(rows: Descriptor, coordinates: list[Any], barrier: Barrier, room: Shared) -> None:
    agent = current().partition.start_tma_load()
    places, inside = rows.places(coordinates)
    room.buffer.write(agent, None)
    room.x.copy_((rows.base + places).load(inside, 0.0).read())
    barrier.bring(agent, room.x.numel() * room.x.element_size())


def async_copy_shared_to_global(rows: Descriptor, coordinates: list[Any], room: Shared) -> None:
    partition = current().partition
    agent = partition.begin(partition.tma_stores)
    partition.stored = agent.clock[agent.name]
    places, inside = rows.places(coordinates)
    room.buffer.read(agent, by_hardware=True)
    (rows.base + places).store(Value(room.x), inside)


def store_wait(pending: int) -> None:
    partition = current().partition
    partition.agent.learn(partition.tma_stores.clock)


def fence_async_shared() -> None:
    current().partition.fence()


def warpgroup_mma(a: Shared | Value, b: Shared, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    """``a @ b + acc``, operands bfloat16, in float32."""
    partition = current().partition
    agent = partition.begin(partition.products)
    for x in (a, b):
        if isinstance(x, Shared):
            x.buffer.read(agent, by_hardware=True)
    left, right = (x.x if isinstance(x, Shared) else x.read() for x in (a, b))
    assert left.dtype == right.dtype == torch.bfloat16, (left.dtype, right.dtype)
    (rows, inner), columns = left.shape, right.shape[1]
    assert (rows, inner % 16, columns % 8) == (64, 0, 0), f"no product of {left.shape} and {right.shape} on a warp group"
    found = left.float() @ right.float()
    assert acc.shape == found.shape, (acc.shape, found.shape)
    partition.issued.append(agent.clock[agent.name])
    found = found + acc.x if use_acc else found
    return Value(found, pending=len(partition.issued)) if is_async else warpgroup_mma_wait(0, (Value(found),))


def warpgroup_mma_wait(outstanding: int, products: tuple[Value, ...]) -> Any:
    """Until all products of the partition but the last ``outstanding`` are done."""
    partition = current().partition
    done = len(partition.issued) - int(outstanding)
    if done > 0:
        partition.agent.learn(Clock({partition.products.name: partition.issued[done - 1]}))
    for x in products:
        if x.pending > done:
            raise Hazard(f"a product is waited for with {outstanding} outstanding, and is one of these")
    waited = tuple(Value(x.x) for x in products)
    return waited[0] if len(waited) == 1 else waited


# --- names ---------------------------------------------------------------------------------------------------------------

_nothing = lambda *arguments, **options: None
_common = {
    "constexpr": None,
    **{name: name for name in ("int1", "int32", "int64")},
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "arange": arange,
    "full": full,
    "zeros": zeros,
    "where": where,
    "sum": total,
    "associative_scan": associative_scan,
    "load": load,
    "store": store,
    "static_range": range,
    "cdiv": lambda a, b: -(-a // b),
    "abs": lambda x: Value(x.read().abs()),
    "exp2": lambda x: Value(torch.exp2(x.read())),
    "minimum": lambda a, b: combined(torch.minimum, a, b),
    "maximum": lambda a, b: combined(torch.maximum, a, b),
    "program_id": lambda axis: Value(torch.tensor(current().program, dtype=torch.int32)),
    "trans": lambda x: x.permute((1, 0)),
    "range": lambda *bounds, num_stages=None: range(*map(int, bounds)),
}
_gluon = {
    **_common,
    "allocate_shared_memory": allocate_shared_memory,
    "inline_asm_elementwise": inline_asm_elementwise,
    "convert_layout": lambda x, layout: x,
    "warp_specialize": lambda jobs, warps, registers: current().specialize(jobs),
    "SliceLayout": _nothing,
    "BlockedLayout": _nothing,
}
LANGUAGE: dict[str, Any] = {
    "language": SimpleNamespace(**_gluon),
    "mbarrier": SimpleNamespace(MBarrierLayout=lambda: BARRIERS, init=init, arrive=arrive, expect=expect, wait=wait),
    "tma": SimpleNamespace(
        make_tensor_descriptor=make_tensor_descriptor,
        store_wait=store_wait,
        async_copy_global_to_shared=async_copy_global_to_shared,
        async_copy_shared_to_global=async_copy_shared_to_global,
    ),
}
HOPPER: dict[str, Any] = {
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": fence_async_shared,
}
