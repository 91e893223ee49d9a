"""Kernel launches: the arguments that every kernel of a call takes, and a cache of plans and compiled kernels per signature."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from race_dist.kernels import materialized, recurrent_bwd, recurrent_fwd, scan, tile_sums
from race_dist.kernels.arguments import (
    Inputs,
    KeyMask,
    Planes,
    SequenceTiles,
    Sketch,
    TileStates,
    Tiling,
    rows,
    scalars,
)
from race_dist.kernels.tiles import Tiles, packed_tiles
from race_dist.ops import device
from race_dist.ops.explain import warn_slow
from race_dist.ops.inputs import AttentionInputs, total_log_decay
from race_dist.ops.triton.plan import cached_plan, is_decoding, num_tiles, plan_call, states_shape
from race_dist.sketch import SketchState

SketchT = TypeVar("SketchT", SketchState, SketchState | None)
SCAN_WIDTH = 256
RECURRENT = {
    "fwd": recurrent_fwd.race_recurrent_fwd_kernel,
    "bwd_dq": recurrent_bwd.race_recurrent_bwd_dq_kernel,
    "bwd_dkv": recurrent_bwd.race_recurrent_bwd_dkv_kernel,
}
MATERIALIZED = {
    "fwd": materialized.race_materialized_fwd_kernel,
    "bwd_dq": materialized.race_materialized_bwd_dq_kernel,
    "bwd_dkv": materialized.race_materialized_bwd_dkv_kernel,
}
ACCEPTS_ALL_ARGUMENTS = device.VERSION >= (3, 6)  # whether a compiled kernel takes every argument, as the JIT function does
MAX_SIGNATURES = 512


@lru_cache
def hopper_kernels() -> dict[str, object]:
    """The warp-specialized pipelines; Gluon is imported only where they run."""
    from race_dist.kernels.hopper import bwd_dkv, bwd_dq, fwd

    return {
        "fwd": fwd.race_hopper_fwd_kernel,
        "bwd_dq": bwd_dq.race_hopper_bwd_dq_kernel,
        "bwd_dkv": bwd_dkv.race_hopper_bwd_dkv_kernel,
    }


# --- compilation and scratch memory ------------------------------------------------------------------------------------


class _WithoutLLVMOptimizer:
    """Compile new kernels without LLVM's optimizer; those of Triton and ptxas stay.

    LLVM hoists a hundred operand addresses out of each loop, which then do not fit in registers: 700 bytes of spills per thread
    were measured with it, 260 without.
    """

    NAME = "DISABLE_LLVM_OPT"

    def __enter__(self) -> None:
        self.before = os.environ.get(self.NAME)
        os.environ[self.NAME] = self.before or "1"

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            del os.environ[self.NAME]


_WITHOUT_LLVM, _DEFAULT = _WithoutLLVMOptimizer(), nullcontext()
_scratch_memory: dict[tuple[int, int | None], Tensor] = {}


def _allocate_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the TMA descriptors that a kernel creates at its start: one buffer per stream, because the kernels of a
    stream run one after the other. A CUDA graph gets its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.int8, device="cuda")
    key = torch.cuda.current_device(), stream
    scratch = _scratch_memory.get(key)
    if scratch is None or scratch.numel() < size:
        scratch = _scratch_memory[key] = torch.empty(size, dtype=torch.int8, device="cuda")
    return scratch


# --- signatures --------------------------------------------------------------------------------------------------------


class Signature:
    """Plan and compiled kernels of all calls whose tensors have the same shapes, strides, dtypes and alignment.

    They are computed once, because short sequences are launch-bound. Nothing that Triton compiles a kernel for differs between
    these calls, so that a compiled kernel is launched without looking at each argument again, which takes half of a launch.
    """

    def __init__(self, inputs: AttentionInputs, need_planes: bool, moved: tuple[Tensor, ...]) -> None:
        self.tma = device.supports_tma(inputs.q, inputs.k, inputs.v, *moved)
        self.plan = plan_call(inputs, need_planes, tma=self.tma)
        if self.plan.obstacle is not None and not is_decoding(inputs):
            warn_slow(f"race_attention does not run in its fastest kernels: {self.plan.obstacle}")
        self.num_tiles = num_tiles(inputs, self.plan)
        self.states_shape = states_shape(inputs)
        self.compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def run(
        self,
        label: tuple[object, ...],
        kernel: object,
        programs: int,
        *args: object,
        llvm_optimizer: bool = True,
        **options: int,
    ) -> None:
        """Launch ``kernel``; launches of one signature with the same ``label`` have arguments of the same layout."""
        compiled = self.compiled.get(label)
        if compiled is not None:
            compiled[programs, 1, 1](*args)
            return
        with _DEFAULT if llvm_optimizer else _WITHOUT_LLVM:
            compiled = kernel[(programs,)](*args, **options)  # type: ignore[index]
        if ACCEPTS_ALL_ARGUMENTS and isinstance(compiled, CompiledKernel):
            self.compiled[label] = compiled


_signatures: dict[tuple[object, ...], Signature] = {}


def find_signature(
    inputs: AttentionInputs, need_planes: bool, moved: tuple[Tensor, ...], read: tuple[Tensor, ...]
) -> Signature:
    """The cached signature of a call."""
    tensors = (
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.planes,
        inputs.beta,
        inputs.log_decay,
        inputs.key_mask,
        inputs.cu_seqlens,
        *moved,
        *read,
    )
    key = (
        inputs.q.device,
        inputs.causal,
        inputs.normalization,
        need_planes,
        len(moved),
        inputs.state_dtype,
        *[None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors],
    )
    signature = _signatures.get(key)
    if signature is None:
        if len(_signatures) == MAX_SIGNATURES:
            _signatures.clear()
        signature = _signatures[key] = Signature(inputs, need_planes, moved)
    return signature


def clear_plan_cache() -> None:
    """Plan every call anew (tests force other plans)."""
    cached_plan.cache_clear()
    _signatures.clear()


# --- one call ----------------------------------------------------------------------------------------------------------


class KernelCall:
    """One pass of one attention call: its plan, its tiles and the arguments that every kernel takes."""

    def __init__(
        self,
        inputs: AttentionInputs,
        need_planes: bool = False,
        moved: tuple[Tensor, ...] = (),
        read: tuple[Tensor, ...] = (),
    ) -> None:
        """``moved``: tensors besides q, k and v whose rows the kernels load or store; ``read``: saved tensors."""
        self.inputs = inputs
        self.signature = find_signature(inputs, need_planes, moved, read)
        if self.signature.tma:
            triton.set_allocator(_allocate_scratch)
        self.plan, self.num_tiles = self.signature.plan, self.signature.num_tiles
        self.heads = inputs.k.shape[2]
        self.tiles = Tiles(None, None)
        if inputs.cu_seqlens is not None:
            self.tiles = packed_tiles(inputs.cu_seqlens, self.plan.tile, self.num_tiles)
        mask = None if inputs.key_mask is None else inputs.key_mask.view(torch.uint8)
        self.kernel_inputs = Inputs(
            rows(inputs.q),
            rows(inputs.k),
            rows(inputs.v),
            Planes(inputs.planes, *inputs.planes.stride()),
            inputs.beta,
            scalars(inputs.log_decay),
            None if mask is None else KeyMask(mask, *mask.stride()),
        )
        self.tiling = Tiling(self.tiles.table, inputs.q.shape[1], self.plan.tile, self.heads)
        self.decays: Tensor | None = None
        if inputs.log_decay is not None:
            self.decays = inputs.q.new_empty(self.num_tiles, self.heads, dtype=torch.float64)

    def kernel(self, name: str) -> object:
        """The kernel "fwd", "bwd_dq" or "bwd_dkv" of the planned family."""
        if self.plan.pipelined:
            return hopper_kernels()[name]
        return (RECURRENT if self.plan.recurrent else MATERIALIZED)[name]

    def launch(self, name: str, kernel: object, *args: object, programs: int = 1, of: str = "") -> None:
        """Launch a kernel with ``programs`` programs per tile and key/value head. ``of`` tells launches of the same name
        apart."""
        choice = self.plan[name]
        count = self.num_tiles * self.heads * programs
        if not count:
            return
        self.signature.run(
            (name, of),
            kernel,
            count,
            *args,
            self.tiling,
            choice.constants,
            llvm_optimizer=bool(choice.spec.fp32 or choice.maxnreg),
            num_warps=choice.num_warps,
            num_stages=choice.spec.stages,
            **choice.options,
        )

    def key_sums(self) -> Tensor:
        """``[tiles, H, S (Dv + 1)]``: the sums of each tile's keys and values."""
        sums = self.new_states(self.num_tiles)
        self.launch(
            "tile_sums_fwd",
            tile_sums.race_tile_sums_fwd_kernel,
            self.kernel_inputs,
            TileStates(sums, self.decays),
            programs=self.plan["tile_sums_fwd"].spec.NSB,
        )
        return sums

    def prefix_states(self, sums: Tensor | None = None) -> tuple[Tensor, SketchState]:
        """The states before each tile (not causal: the totals) and the final state."""
        sums = self.key_sums() if sums is None else sums
        states, final = self.scan(sums, self.inputs.initial, True, reverse=False)
        assert final is not None
        return states, with_log_decay(final, self.inputs)

    def total(self, sums: Tensor, initial: SketchState | None, *, reverse: bool) -> SketchState:
        """The state after the last tile; ``sums`` are not overwritten."""
        final = self._scan(sums, initial, self.new_sketch(), None, reverse=reverse, write=False)
        return with_log_decay(final, self.inputs)

    def scan(
        self, sums: Tensor, initial: SketchState | None, output_final: bool, *, reverse: bool
    ) -> tuple[Tensor, SketchState | None]:
        """Scan tile sums, in place, from the state ``initial``: the states before each tile (``reverse``: after it; not causal:
        the totals), and the final state if asked for."""
        totals = None if self.inputs.causal else self.new_states(self.inputs.num_states)
        final = self.new_sketch() if output_final else None
        self._scan(sums, initial, final, totals, reverse=reverse, write=True)
        return (sums if totals is None else totals), final

    def _scan(
        self,
        sums: Tensor,
        initial: SketchState | None,
        final: SketchT,
        totals: Tensor | None,
        *,
        reverse: bool,
        write: bool,
    ) -> SketchT:
        inputs = self.inputs
        initial_sketch: Sketch | None = contiguous_sketch(initial)
        per_row = 0 if inputs.cu_seqlens is not None else self.num_tiles // max(1, inputs.num_states)
        programs = inputs.num_states * self.heads * -(-sums.shape[-1] // SCAN_WIDTH)
        if programs:
            self.signature.run(
                ("scan", reverse, final is not None, write, *map(layout_key, initial_sketch or ())),
                scan.race_scan_kernel,
                programs,
                TileStates(sums, self.decays),
                initial_sketch,
                None if final is None else Sketch(final.values, final.mass),
                totals,
                SequenceTiles(self.tiles.row_tiles, per_row),
                self.heads,
                self.plan["tile_sums_fwd"].constants,
                SCAN_WIDTH,
                reverse,
                write,
                num_warps=2,
            )
        return final

    def new_sketch(self) -> SketchState:
        inputs = self.inputs
        shape = (inputs.num_states, self.heads, inputs.features)
        mass = inputs.q.new_empty(shape, dtype=inputs.state_dtype)
        return SketchState.unchecked(mass, inputs.q.new_empty(*shape, inputs.v.shape[3], dtype=inputs.state_dtype))

    def new_states(self, count: int) -> Tensor:
        """``[count, H, S (Dv + 1)]``: values, then mass."""
        size = self.inputs.features * (self.inputs.v.shape[3] + 1)
        return self.inputs.q.new_empty(count, self.heads, size, dtype=torch.float32)


def with_log_decay(state: SketchState, inputs: AttentionInputs) -> SketchState:
    """The state with the total log decay of each row."""
    return state if inputs.log_decay is None else replace(state, log_decay=total_log_decay(inputs))


def contiguous_sketch(state: SketchState | None) -> Sketch | None:
    """A state as kernels take it."""
    return None if state is None else Sketch(state.values.contiguous(), state.mass.contiguous())


def layout_key(x: Tensor) -> tuple[torch.dtype, int]:
    """What a compiled kernel depends on of a contiguous tensor."""
    return x.dtype, x.data_ptr() & 15
