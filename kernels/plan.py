"""Which family of kernels, tile, chunk, warps and pipeline stages a call gets, from shapes and flags alone.

A sequence is divided into *tiles* (one stored state each), and a tile into *chunks* (what one matrix product covers). There are
three families of kernels:

- *chunk recurrence* (``recurrent_fwd``, ``recurrent_bwd``): all features fit in one block; a program goes through its tile
  chunk by chunk, with the running state in registers.
- *pipeline* (``kernels/hopper``): the chunk recurrence for bfloat16 on Hopper, warp-specialized.
- *materialized states* (``materialized``): any number of features, in blocks; a tile is one chunk and reads its stored state.
  Also the "bucket" normalization, whose backward pass needs the prefix and the suffix state of the same chunk.

To add a device: its shared memory is read from the driver, and stages, then chunks, shrink until a kernel fits
(:func:`shared_bytes`). Try other ``STAGES``, chunks and ``MIN_PROGRAMS`` there, time them with
``python -m race_dist.benchmarks.targets``, and keep the fastest. The choice depends on T only through ``tile``, a run-time
number, so a new length compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import triton.language as tl

from race_dist.kernels.interpreter import INTERPRET

MIN_PROGRAMS = 512  # tiles times heads that a call should have, so that every SM has several
MAX_TILE = 4096
SIZES = ("R", "S", "NSB", "TABLES_PER_BLOCK", "BLOCK_PLANES", "BLOCKS_PER_TABLE", "LPB", "BD", "BV", "NVB", "PARTIAL_GRADIENTS")
STAGES = {"tile_sums_fwd": 3, "fwd": 1, "bwd_dq": 1, "tile_sums_bwd": 2, "bwd_dkv": 2}  # chunks in flight
KERNELS = tuple(STAGES)
PIPELINED = ("fwd", "bwd_dq", "bwd_dkv")  # the kernels that have a pipeline
PIPELINE_SHARED_MEMORY = 227 * 1024  # bytes that a pipeline takes at most: all of an SM
PIPELINE_REGISTERS = 128  # per thread of 16 warps, before the partitions redistribute them


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    D and Dv columns (padded: BD, BV); L tables of P planes; G query heads per key/value head; C tokens per chunk; SB features
    per block, of which there are NSB; LPB plane slots per block. Padded sizes are powers of two of at least 16. ``stages``:
    chunks in flight. ``fp32``: float32 products (three tf32 terms); ``fp16``: float16 inputs; ``split_planes``: the planes'
    dtype is wider than the inputs'; ``tma``: rows are moved by TMA; ``recurrent`` and ``pipelined``: the family.
    """

    D: int
    Dv: int
    L: int
    P: int
    G: int
    C: int
    SB: int
    stages: int
    causal: bool
    is_global: bool
    is_bucket: bool
    decay: bool
    masked: bool
    packed: bool
    fp32: bool
    fp16: bool
    split_planes: bool
    tma: bool
    recurrent: bool = True
    need_planes: bool = False
    pipelined: bool = False

    @cached_property
    def R(self) -> int:
        """Buckets per table."""
        return 2**self.P

    @cached_property
    def S(self) -> int:
        """Features."""
        return self.L * self.R

    @cached_property
    def NSB(self) -> int:
        """Blocks of features."""
        return -(-self.S // self.SB)

    @cached_property
    def TABLES_PER_BLOCK(self) -> int:
        """Whole tables in a block of features; 1 where a table has several blocks."""
        return max(1, self.SB // self.R)

    @cached_property
    def BLOCK_PLANES(self) -> int:
        """How many of a table's first planes choose the block, where the table has several: a feature is then a factor of its
        block, the product over these planes, times one that all blocks of the table share."""
        return max(0, self.P + 1 - self.SB.bit_length())

    @cached_property
    def BLOCKS_PER_TABLE(self) -> int:
        """Blocks of features per table; 1 where a block holds whole tables."""
        return 2**self.BLOCK_PLANES

    @cached_property
    def LPB(self) -> int:
        """Plane slots of a block of features; in a pipeline, of all features."""
        return padded((self.L if self.pipelined else min(self.TABLES_PER_BLOCK, self.L)) * self.P)

    @cached_property
    def PARTIAL_GRADIENTS(self) -> bool:
        """Whether a pipeline writes partial gradients of the projections, which ``race_unproject_kernel`` turns into those of
        the rows: where several programs contribute (blocks of value columns), or the planes' gradient needs them too."""
        return self.pipelined and (self.NSB > 1 or self.need_planes)

    @property
    def min_block(self) -> int:
        """The least size of feature and column blocks: a row of 128 bytes. Narrower wgmma operands read outside shared memory
        under Triton 3.6 (seen with compute-sanitizer), and gain nothing."""
        return 16 if INTERPRET else 32 if self.fp32 else 64

    @cached_property
    def BD(self) -> int:
        """Padded columns of q and k."""
        return padded(self.D, self.min_block)

    @cached_property
    def BV(self) -> int:
        """Value columns of a program. In a pipeline of several blocks of features 64: the running state of all blocks then
        stays in registers."""
        return 64 if self.pipelined and self.NSB > 1 else padded(self.Dv, self.min_block)

    @cached_property
    def NVB(self) -> int:
        """Blocks of value columns, one program each: the attention is linear in them, so their gradients of q and k add."""
        return -(-self.Dv // self.BV)


class Constants:
    """A Spec's fields and sizes as compile-time constants."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.text, self.key = repr(spec), hash(spec)  # needed at every launch
        for name in (*(f.name for f in fields(Spec)), *SIZES):
            value = getattr(spec, name)
            setattr(self, name, value if INTERPRET else tl.constexpr(value))

    def __hash__(self) -> int:
        return self.key

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Constants) and self.spec == other.spec)

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Launch:
    """One kernel's compile-time choices."""

    spec: Spec
    num_warps: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options besides the number of warps and stages."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}

    @cached_property
    def constants(self) -> Constants:
        """What the kernel takes as ``c``."""
        return Constants(self.spec)


@dataclass(frozen=True)
class Plan:
    """A call's choices. ``tile`` tokens share a stored state; ``recurrent`` and ``pipelined`` give the family; ``obstacle``: on
    a GPU that has the pipelines, why this call does not run in them."""

    tile: int
    recurrent: bool
    launches: dict[str, Launch]
    pipelined: bool = False
    obstacle: str | None = None

    def __getitem__(self, kernel: str) -> Launch:
        return self.launches[kernel]

    @property
    def family(self) -> str:
        """The family's name, as ``explain_plan`` gives it."""
        return "pipeline" if self.pipelined else "chunk recurrence" if self.recurrent else "materialized states"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the GPU kernels in launch order, forward then backward."""
        spec, name = self["bwd_dkv"].spec, "hopper" if self.pipelined else "recurrent" if self.recurrent else "materialized"
        sums = ("race_tile_sums_bwd_kernel",) if self.recurrent and (spec.NSB > 1 or not self.pipelined) else ()
        unproject = ("race_unproject_kernel",) if spec.PARTIAL_GRADIENTS else ()
        return (
            "race_tile_sums_fwd_kernel",
            "race_scan_kernel",
            f"race_{name}_fwd_kernel",
            f"race_{name}_bwd_dq_kernel",
            *sums,
            "race_scan_kernel",
            f"race_{name}_bwd_dkv_kernel",
            *unproject,
        )


def padded(n: int, minimum: int = 16) -> int:
    """The block size for n: a power of two, at least ``minimum``."""
    return max(minimum, 1 << (n - 1).bit_length())


def work_bucket(work: int) -> int:
    """``B * Hkv * T`` rounded down to a power of two: all that a plan depends on of a length."""
    return 1 << max(0, work.bit_length() - 1)


def make_plan(
    spec: Spec, work: int, *, shared_limit: int, hopper: bool = False, chunk: int | None = None, tile: int | None = None
) -> Plan:
    """The plan of one call.

    Args:
        spec: dimensions and flags; its C, SB and stages are overwritten.
        work: about ``B * Hkv * T``.
        shared_limit: bytes of shared memory that a program may use.
        hopper: whether the device has wgmma.
        chunk: force this chunk (tests).
        tile: tokens per stored state, where the family's chunk does not decide it.
    """
    block = padded(spec.S, spec.min_block)
    recurrent = not spec.is_bucket and block <= (32 if spec.fp32 and not INTERPRET else 64) and block * spec.BV <= 8192
    size = chunk or (32 if spec.fp32 else 64)
    spec = replace(spec, C=size, SB=min(block, 32 if spec.fp32 and not INTERPRET else 64))
    obstacle = pipeline_obstacle(replace(spec, pipelined=True), shared_limit) if hopper else None
    pipelined = hopper and obstacle is None
    if recurrent or pipelined:
        launches = {kernel: _launch(kernel, replace(spec, recurrent=True), shared_limit) for kernel in KERNELS}
        if pipelined:
            choice = Launch(replace(spec, stages=1, recurrent=True, pipelined=True), 4, PIPELINE_REGISTERS)
            launches |= dict.fromkeys(PIPELINED, choice)
        bucket = 1 << max(0, (work // MIN_PROGRAMS).bit_length() - 1)
        return Plan(tile or min(max(bucket, size), MAX_TILE), True, launches, pipelined, obstacle)
    spec = replace(spec, stages=1, recurrent=False, tma=False)
    while max(spec.C, spec.SB) > 16 and any(shared_bytes(kernel, spec) > shared_limit for kernel in KERNELS):
        # the same for all kernels: their chunk is the tile
        spec = replace(spec, C=spec.C // 2) if spec.C > 16 else replace(spec, SB=spec.SB // 2)
    return Plan(spec.C, False, dict.fromkeys(KERNELS, Launch(spec, 4)), obstacle=obstacle)


def pipeline_obstacle(spec: Spec, shared_limit: int) -> str | None:
    """Why Hopper's pipelines do not compute a call, and what to change; None where they do.

    They take bfloat16 rows that TMA moves, D and Dv up to 128; beyond 64 features (several blocks of them) causal calls with
    one query head per key/value head.
    """
    most = 64 * (3 if spec.decay and spec.is_global else 4)  # features that fit in PIPELINE_SHARED_MEMORY
    many = f"S = L * 2**P = {spec.S} features (beyond 64)"
    dtype = "float32" if spec.fp32 else "float16"
    limit, taken = shared_limit, PIPELINE_SHARED_MEMORY
    obstacles = [
        (spec.fp32 or spec.fp16, f"q, k and v are {dtype}: give bfloat16, or call under torch.autocast"),
        (spec.is_bucket, 'normalization is "bucket": "global" and "none" have pipelines'),
        (
            max(spec.D, spec.Dv) > 128,
            f"heads are wider than 128 (D = {spec.D}, Dv = {spec.Dv}): use more heads of at most 128",
        ),
        (
            not spec.tma,
            "TMA cannot move these rows: make D and Dv multiples of 8 and give tensors whose last dimension is contiguous and "
            "whose strides are multiples of 8 elements",
        ),
        (spec.LPB > 32, f"L * P = {spec.L * spec.P} planes: give at most 32"),
        (spec.NSB > 1 and not spec.causal, f"{many} have a pipeline for causal calls only: give at most 64"),
        (
            spec.NSB > 1 and spec.G > 1,
            f"{many} have no pipeline for grouped queries: give at most 64, or as many key/value heads as query heads",
        ),
        (spec.NSB > 1 and spec.LPB > 16, f"{many} with L * P = {spec.L * spec.P} planes: give at most 16 planes"),
        (most < spec.S, f"S = L * 2**P = {spec.S} features: give at most {most}"),
        (limit < taken, f"a program may use {limit} bytes of shared memory here, and a pipeline takes {taken}"),
        (spec.C != 64 or spec.SB != 64, f"chunks are of {spec.C} tokens and {spec.SB} features, not of 64"),
    ]
    return next((reason for holds, reason in obstacles if holds), None)


def _launch(kernel: str, spec: Spec, shared_limit: int) -> Launch:
    """The most chunks in flight, then the largest chunk, of a chunk recurrence that fit the device's shared memory."""
    choice = replace(spec, stages=1 if spec.fp32 else STAGES[kernel])
    while shared_bytes(kernel, choice) > shared_limit and (choice.stages > 1 or choice.C > 16):
        choice = replace(choice, stages=choice.stages - 1) if choice.stages > 1 else replace(choice, C=choice.C // 2)
    return Launch(choice, 4)


def shared_bytes(kernel: str, spec: Spec) -> int:
    """A bound on the shared memory of a kernel, from what it holds at a time: rows in flight, operands made of features, and a
    state. ``tests/kernels/test_compiled.py`` compares it with the compiler's figures."""
    size = 4 if spec.fp32 else 2
    rows = spec.C * (spec.BD + spec.BV) * size
    features = spec.C * spec.SB * size
    state = 2 * spec.SB * spec.BV * size
    planes = 2 * spec.BD * spec.LPB * size + 2 * spec.LPB * spec.SB * size
    flight = 1 if spec.stages == 1 else spec.G  # each query head's rows are separate loads in flight
    held = {
        "tile_sums_fwd": rows * spec.stages + features,
        "tile_sums_bwd": rows * flight * spec.stages + features,
        "fwd": (1 + flight) * rows * spec.stages + 2 * features + state // 2,
        "bwd_dq": (1 + flight) * rows * spec.stages + 2 * features + state,
        "bwd_dkv": (1 + flight) * rows * spec.stages + 3 * features + state,
    }
    spare = held[kernel] // 4 if spec.fp32 else 0  # to convert operands' layouts
    decay = 12288 if spec.decay and spec.stages > 1 else 0
    return held[kernel] + spare + planes + decay + 8192
