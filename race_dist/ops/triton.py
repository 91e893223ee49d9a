"""The attention in Triton kernels: a AttentionInputs's tensors bound to the kernels of ``race_dist.kernels``.

Causal: tile sums of the keys, a scan over the tiles, the read-out. Backward: a pass over the queries (with the prefix
states) that also sums the tiles' suffix parts, the scan in reverse, a pass over the keys (with the suffix states).
Without ``causal`` the scans give totals and both passes read those. Nothing here waits for the device.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from race_dist.kernels import decode, materialized, partial_gradients, recurrent_bwd, recurrent_fwd, scan, tile_sums
from race_dist.kernels.arguments import (
    Inputs,
    KeyGradients,
    KeyMask,
    Planes,
    QueryGradients,
    Residuals,
    SequenceTiles,
    Sketch,
    TileStates,
    Tiling,
    rows,
    scalars,
)
from race_dist.kernels.interpreter import INTERPRET
from race_dist.kernels.plan import Plan, Spec, make_plan, work_bucket
from race_dist.kernels.tiles import Tiles, fitted_tile, packed_tiles
from race_dist.ops.device import VERSION
from race_dist.ops.device import has_pipelines as _has_pipes
from race_dist.ops.device import num_sms as _processors
from race_dist.ops.device import shared_memory_limit as _shared_limit
from race_dist.ops.device import supports_tma as _bulk
from race_dist.ops.explain import KernelPlan, warn_slow
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Gradients, Into, Started, total_log_decay
from race_dist.sketch import SketchState

SketchT = TypeVar("SketchT", SketchState, SketchState | None)
SCAN_WIDTH = 256
DECODE_WIDTH = 32  # value columns a program
MAX_DIM = 256
MAX_FEATURES = 1024
PIPE_BLOCK = 64  # features up to which a plan's tile does not depend on how rows can be moved; value columns beyond
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


def forward(p: AttentionInputs, out: Tensor | None = None, begun: Started | None = None) -> ForwardResult:
    """Output (into ``out`` if given), denominators, the states before each tile (causal) or the totals (not causal), and
    the final state. What was ``begun`` differs in the initial state alone."""
    if out is None:
        out = p.q.new_empty(*p.q.shape[:3], p.v.shape[3])
    call, parts = (_Call(p, moved=(out,)), None) if begun is None else begun.rest
    call.p = p
    if _is_decoding(p):
        return call.decode(out)
    states, final = call.prefix_states(parts)
    den = p.q.new_empty(p.q.shape[:3] if p.normalization == "global" else (0,), dtype=torch.float32)
    call.launch(
        "fwd",
        call.kernel("fwd"),
        call.inputs,
        rows(out),
        scalars(den),
        states,
        programs=call.plan["fwd"].spec.NVB,
    )
    if states.shape != call.kind.announced:  # these rows cannot take the plan that was announced: backward makes its own
        states = states.new_empty(call.kind.announced)
    return ForwardResult(out, den, states, final)


def start_forward(p: AttentionInputs, out: Tensor | None = None) -> Started:
    """The final state, and the tiles' sums."""
    call = _Call(p, moved=() if out is None else (out,))
    parts = call.key_sums()
    return Started(call.total(parts, p.initial, reverse=False), (call, parts))


def backward(
    p: AttentionInputs,
    saved: ForwardResult,
    dout: Tensor,
    dfinal: SketchState | None,
    *,
    need_planes: bool,
    need_beta: bool = True,
    into: Into | None = None,
    begun: Started | None = None,
) -> Gradients:
    """Gradients of every input (of q, k and v in ``into`` if given), from those of the output and of the final state."""
    call, saved, into, h, row, parts = _query_side(p, saved, dout, need_planes, into) if begun is None else begun.rest
    suffixes, dinitial = call.scan(parts, dfinal, p.initial is not None, reverse=True)
    blocks = call.plan["bwd_dkv"].spec.NVB
    dlog_decay = (
        None
        if p.log_decay is None
        else torch.empty(*p.k.shape[:2], blocks * call.heads, dtype=torch.float32, device=p.q.device)
    )
    target = call.gradient_target(into.k)
    call.launch(
        "bwd_dkv",
        call.kernel("bwd_dkv"),
        call.inputs,
        rows(dout),
        _residuals(saved),
        scalars(h),
        scalars(row),
        suffixes,
        KeyGradients(rows(target), rows(into.v), scalars(dlog_decay), call.dbeta[1], call.kernel_dplanes(1)),
        programs=blocks,
    )
    call.finish_gradient(target, into.k, p.k, 1)
    dlog_decay = call.summed(dlog_decay)
    dbeta = call.dbeta.sum((0, 1, 3)) if need_beta else None
    if dlog_decay is not None and p.log_decay is not None:
        dlog_decay = dlog_decay.to(p.log_decay.dtype)
    return Gradients(into.q, into.k, into.v, call.planes_gradient() if need_planes else None, dbeta, dlog_decay, dinitial)


def start_backward(
    p: AttentionInputs, saved: ForwardResult, dout: Tensor, *, need_planes: bool, into: Into | None = None
) -> Started:
    """The gradient of the initial state when that of the final state is 0, and all that the queries give."""
    rest = _query_side(p, saved, dout, need_planes, into)
    return Started(rest.call.total(rest.parts, None, reverse=True), rest)


class _QuerySide(NamedTuple):
    """The first half of a backward pass; ``parts``: the tiles' sums of the suffix state."""

    call: _Call
    saved: ForwardResult
    into: Into
    h: Tensor | None
    row: Tensor | None
    parts: Tensor


def _query_side(p: AttentionInputs, saved: ForwardResult, dout: Tensor, need_planes: bool, into: Into | None) -> _QuerySide:
    if into is None:
        into = Into(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p.q, p.k, p.v)))
    call = _Call(p, need_planes, (dout, *into), (saved.den, saved.states, saved.final.values, saved.final.mass))
    saved = call.with_states(saved)
    return _QuerySide(call, saved, into, *call.query_pass(saved, dout, into.q))


def states_shape(p: AttentionInputs) -> tuple[int, ...]:
    """Of ``Forward.states``: values, then mass, of each tile (causal) or row."""
    size = p.features * (p.v.shape[3] + 1)
    if _is_decoding(p):
        return 0, p.k.shape[2], size
    if not p.causal:
        return p.num_states, p.k.shape[2], size
    return _num_tiles(p, _plan(p, False, tma=True)), p.k.shape[2], size


def unsupported(p: AttentionInputs) -> str | None:
    """Why these kernels cannot compute ``p``, as a sentence's end; None when they can."""
    if p.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32; got {p.q.dtype}"
    if not (p.q.dtype == p.k.dtype == p.v.dtype):
        return f"takes q, k and v of one dtype; got {p.q.dtype}, {p.k.dtype} and {p.v.dtype}"
    for name, size in (("head_dim", p.q.shape[3]), ("value_dim", p.v.shape[3])):
        if size > MAX_DIM:
            return f"takes {name} up to {MAX_DIM}; got {size}"
    if p.features > MAX_FEATURES:
        return f"takes up to {MAX_FEATURES} features (num_tables * 2**num_planes); got {p.features}"
    if not (p.q.is_cuda or INTERPRET):
        return f"needs a CUDA device (or TRITON_INTERPRET=1, set before triton is imported); q is on {p.q.device}"
    return None


def explain(p: AttentionInputs) -> KernelPlan:
    """Which kernels run for ``p`` and its gradients, and why no faster ones."""
    plan = _plan(p, p.planes.requires_grad, _bulk(p.q, p.k, p.v))
    if _is_decoding(p):
        return KernelPlan("triton", "decode", ("decode",), None)
    if plan.pipelined:
        return KernelPlan("triton", plan.family, plan.kernels, None)
    return KernelPlan(
        "triton",
        plan.family,
        plan.kernels,
        plan.obstacle or f"the pipelines need compute capability 9.0 and Triton 3.6; this is {p.q.device}",
    )


def _plan(p: AttentionInputs, need_planes: bool, tma: bool = False) -> Plan:
    """The call's plan, made once for each kind of call: host time decides short sequences. A compiler that traces with
    symbolic sizes specializes here: states are as many as the plan's tiles."""
    _, tables, number, dim = map(int, p.planes.shape)
    batch, length, heads = map(int, p.k.shape[:3])
    value_dim, device, tile = int(p.v.shape[3]), p.q.device, None
    hopper = _has_pipes(device)
    if p.q.dtype == torch.bfloat16 and hopper:  # also where other kernels run: one's states are another's
        blocks = 1 if tables * 2**number <= PIPE_BLOCK else -(-value_dim // PIPE_BLOCK)
        tile = fitted_tile(length, batch * heads * blocks, _processors(device))
    return _make_plan(
        (dim, value_dim, tables, number, int(p.q.shape[2]) // heads),
        p.causal,
        p.normalization,
        (p.log_decay is not None, p.key_mask is not None, p.cu_seqlens is not None),
        p.q.dtype,
        p.planes.dtype != p.q.dtype,
        tma,
        need_planes,
        work_bucket(batch * heads * length),
        _shared_limit(device),
        hopper,
        tile,
    )


@lru_cache(maxsize=256)
def _make_plan(
    sizes: tuple[int, int, int, int, int],
    causal: bool,
    normalization: str,
    extras: tuple[bool, bool, bool],
    dtype: torch.dtype,
    split_planes: bool,
    tma: bool,
    need_planes: bool,
    work: int,
    shared_limit: int,
    hopper: bool,
    tile: int | None,
) -> Plan:
    """``tile``: on a GPU that has the pipelines, and for a dtype that they take, tokens per tile."""
    dim, value_dim, tables, number, group = sizes
    decay, masked, packed = extras
    spec = Spec(
        D=dim,
        Dv=value_dim,
        L=tables,
        P=number,
        G=group,
        C=0,
        SB=0,
        stages=0,
        causal=causal,
        is_global=normalization == "global",
        is_bucket=normalization == "bucket",
        decay=decay,
        masked=masked,
        packed=packed,
        fp32=dtype == torch.float32,
        fp16=dtype == torch.float16,
        split_planes=split_planes,
        tma=tma,
        need_planes=need_planes,
    )
    return make_plan(spec, work, shared_limit=shared_limit, hopper=hopper, tile=tile)


_scratches: dict[tuple[int, int | None], Tensor] = {}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the copy engine's descriptors, which a kernel makes as it begins: one a stream, whose kernels run one
    after another. A graph that is captured gets its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.int8, device="cuda")
    key = torch.cuda.current_device(), stream
    scratch = _scratches.get(key)
    if scratch is None or scratch.numel() < size:
        scratch = _scratches[key] = torch.empty(size, dtype=torch.int8, device="cuda")
    return scratch


@lru_cache
def _pipes() -> dict[str, object]:
    """Hopper's pipelines; Gluon is imported where they run."""
    from race_dist.kernels.hopper import bwd_dkv, bwd_dq, fwd

    return {
        "fwd": fwd.race_hopper_fwd_kernel,
        "bwd_dq": bwd_dq.race_hopper_bwd_dq_kernel,
        "bwd_dkv": bwd_dkv.race_hopper_bwd_dkv_kernel,
    }


def _is_decoding(p: AttentionInputs) -> bool:
    """One token a row: one launch does it, and a backward pass makes the states it wants."""
    return p.causal and p.cu_seqlens is None and p.q.shape[1] == 1


def _num_tiles(p: AttentionInputs, plan: Plan) -> int:
    """Tiles of all rows; for packed documents a bound that needs no look at their lengths."""
    batch, length = p.q.shape[:2]
    if p.cu_seqlens is None:
        return batch * -(-length // plan.tile)
    return length // plan.tile + p.num_states


class _Plain:
    """Compile, where a kernel is new, without LLVM's own optimizer (Triton's and ptxas's stay): it moves a hundred operand
    addresses out of each loop, which then do not fit in registers. Found: 700 bytes of spills a thread against 260."""

    NAME = "DISABLE_LLVM_OPT"

    def __enter__(self) -> None:
        self.before = os.environ.get(self.NAME)
        os.environ[self.NAME] = self.before or "1"

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            del os.environ[self.NAME]


_PLAIN, _USUAL = _Plain(), nullcontext()


class _Kind:
    """What calls have in common whose tensors lie alike, worked out once: host time decides short sequences. ``compiled``: the
    kernels that such a call runs. Nothing that Triton compiles a kernel for (types, strides, what 16 divides) differs between
    them, so that it need not look at each argument again, which takes half of a launch."""

    def __init__(self, p: AttentionInputs, need_planes: bool, moved: tuple[Tensor, ...]) -> None:
        reason = unsupported(p)
        if reason is not None:
            raise ValueError(f'backend="triton" {reason}; use backend="chunked"')
        self.tma = _bulk(p.q, p.k, p.v, *moved)
        self.plan = _plan(p, need_planes, self.tma)
        if self.plan.obstacle is not None and not _is_decoding(p):
            warn_slow(f"race_attention does not run in its fastest kernels: {self.plan.obstacle}")
        self.num_tiles = _num_tiles(p, self.plan)
        self.announced = states_shape(p)
        self.compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def run(
        self, label: tuple[object, ...], kernel: object, programs: int, *args: object, plain: bool = False, **options: int
    ) -> None:
        """Run ``kernel``; calls of one kind that say the same ``label`` give it arguments that lie alike."""
        compiled = self.compiled.get(label)
        if compiled is not None:
            compiled[programs, 1, 1](*args)
            return
        with _PLAIN if plain else _USUAL:
            made = kernel[(programs,)](*args, **options)  # type: ignore[index]
        if RUNS_COMPILED and isinstance(made, CompiledKernel):
            self.compiled[label] = made


RUNS_COMPILED = VERSION >= (3, 6)  # that a compiled kernel takes every argument, as the kernel does
MOST_KINDS = 512
_kinds: dict[tuple[object, ...], _Kind] = {}


def clear_plan_cache() -> None:
    """Decide anew how each call runs (tests force other plans)."""
    _make_plan.cache_clear()
    _kinds.clear()


def _kind(p: AttentionInputs, need_planes: bool, moved: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> _Kind:
    given = (p.q, p.k, p.v, p.planes, p.beta, p.log_decay, p.key_mask, p.cu_seqlens, *moved, *read)
    key = (
        p.q.device,
        p.causal,
        p.normalization,
        need_planes,
        len(moved),
        p.state_dtype,
        *[None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in given],
    )
    kind = _kinds.get(key)
    if kind is None:
        if len(_kinds) == MOST_KINDS:
            _kinds.clear()
        kind = _kinds[key] = _Kind(p, need_planes, moved)
    return kind


class _Call:
    """One call: its plan, its tiles and the arguments that every kernel takes."""

    def __init__(
        self, p: AttentionInputs, need_planes: bool = False, moved: tuple[Tensor, ...] = (), read: tuple[Tensor, ...] = ()
    ) -> None:
        """``moved``: tensors that the kernels read or write by rows, besides q, k and v; ``read``: others that were saved."""
        self.p = p
        self.kind = _kind(p, need_planes, moved, read)
        if self.kind.tma:
            triton.set_allocator(_scratch)
        self.plan, self.num_tiles = self.kind.plan, self.kind.num_tiles
        self.heads = p.k.shape[2]
        self.tiles = Tiles(None, None) if p.cu_seqlens is None else packed_tiles(p.cu_seqlens, self.plan.tile, self.num_tiles)
        mask = None if p.key_mask is None else p.key_mask.view(torch.uint8)
        self.inputs = Inputs(
            rows(p.q),
            rows(p.k),
            rows(p.v),
            Planes(p.planes, *p.planes.stride()),
            p.beta,
            scalars(p.log_decay),
            None if mask is None else KeyMask(mask, *mask.stride()),
        )
        self.tiling = Tiling(self.tiles.table, p.q.shape[1], self.plan.tile, self.heads)
        self.decays = p.q.new_empty(self.num_tiles, self.heads, dtype=torch.float64) if p.log_decay is not None else None
        self.dplanes: list[Tensor | None] = [None, None]
        if need_planes:
            spec = self.plan["bwd_dkv"].spec
            blocks = (spec.G, 1) if spec.pipelined else (spec.NSB, spec.NSB)  # of the pass over the queries, and over the keys
            self.dplanes = [
                p.q.new_empty(self.num_tiles, self.heads, n, spec.LPB, spec.BD, dtype=torch.float32) for n in blocks
            ]

    @cached_property
    def dbeta(self) -> Tensor:
        """Each program's part of the gradient of beta, of the pass over the queries and over the keys."""
        return self.p.q.new_empty(2, self.num_tiles, self.heads, self.plan["bwd_dkv"].spec.NVB, dtype=torch.float32)

    def kernel(self, name: str) -> object:
        """The family's kernel of that name."""
        if self.plan.pipelined:
            return _pipes()[name]
        return (RECURRENT if self.plan.recurrent else MATERIALIZED)[name]

    def gradient_target(self, dx: Tensor) -> Tensor:
        """Where a backward kernel writes the gradient dx of its rows: there; or the gradient of the projections
        ``[B, T, NVB * heads, LPB]``, of which :meth:`finish_gradient` makes dx."""
        spec = self.plan["bwd_dkv"].spec
        if not spec.PARTIAL_GRADIENTS:
            return dx
        return dx.new_empty(*dx.shape[:2], spec.NVB * dx.shape[2], spec.LPB, dtype=torch.float32)

    def finish_gradient(self, target: Tensor, dx: Tensor, x: Tensor, half: int) -> None:
        """Write the gradient dx of the rows x, where it is not written yet, and with it the planes' (``half``: 0 of queries, 1
        of keys)."""
        if target is dx:
            return
        group = x.shape[2] // self.heads
        self.launch(
            "bwd_dkv",
            partial_gradients.race_unproject_kernel,
            rows(target),
            rows(dx),
            rows(x),
            self.inputs.planes,
            self.dplanes[half],
            group,
            programs=group,
            of="qk"[half],
        )

    def summed(self, x: Tensor | None) -> Tensor | None:
        """One number a token and head, of the shares ``[B, T, NVB H]`` of blocks of value columns."""
        blocks = self.plan["bwd_dkv"].spec.NVB
        return x if x is None or blocks == 1 else x.unflatten(2, (blocks, -1)).sum(2)

    def kernel_dplanes(self, half: int) -> Tensor | None:
        """Where a backward kernel writes its part of the gradient of the planes; None for a pipeline, which writes none."""
        return None if self.plan.pipelined else self.dplanes[half]

    def with_states(self, saved: ForwardResult) -> ForwardResult:
        """With the states before this call's tiles, made anew where the forward pass had other tiles (or none)."""
        p = self.p
        if _is_decoding(p):
            return saved._replace(states=self.prefix_states()[0])
        if not p.causal or p.features <= PIPE_BLOCK:  # one tile for every family
            return saved
        made, announced = (_plan(p, False, tma).tile for tma in (_bulk(p.q, p.k, p.v, saved.out), True))
        return saved if self.plan.tile == made == announced else saved._replace(states=self.prefix_states()[0])

    def launch(self, name: str, kernel: object, *args: object, programs: int = 1, of: str = "") -> None:
        """Run a kernel with one program (or ``programs``) for each tile and key/value head. ``of``: what for, where a call does
        so more than once."""
        choice = self.plan[name]
        count = self.num_tiles * self.heads * programs
        if not count:
            return
        self.kind.run(
            (name, of),
            kernel,
            count,
            *args,
            self.tiling,
            choice.constants,
            plain=not (choice.spec.fp32 or choice.maxnreg),
            num_warps=choice.num_warps,
            num_stages=choice.spec.stages,
            **choice.options,
        )

    def decode(self, out: Tensor) -> ForwardResult:
        """The forward pass of one token a row."""
        p = self.p
        batch, value_dim = p.q.shape[0], p.v.shape[3]
        den = p.q.new_empty(p.q.shape[:3] if p.normalization == "global" else (0,), dtype=torch.float32)
        final = self._new_sketch()
        initial = None if p.initial is None else Sketch(p.initial.values.contiguous(), p.initial.mass.contiguous())
        self.kind.run(
            ("decode", *map(_placed, initial or ())),
            decode.race_decode_kernel,
            batch * self.heads * -(-value_dim // DECODE_WIDTH),
            self.inputs,
            rows(out),
            scalars(den),
            initial,
            Sketch(final.values, final.mass),
            self.heads,
            self.plan["tile_sums_fwd"].constants,
            DECODE_WIDTH,
            num_warps=4,
        )
        states = p.q.new_empty(states_shape(p), dtype=torch.float32)
        return ForwardResult(out, den, states, _with_decay(final, p))

    def key_sums(self) -> Tensor:
        """What each tile's keys and values add to the state."""
        parts = self._new_states(self.num_tiles)
        self.launch(
            "tile_sums_fwd",
            tile_sums.race_tile_sums_fwd_kernel,
            self.inputs,
            TileStates(parts, self.decays),
            programs=self.plan["tile_sums_fwd"].spec.NSB,
        )
        return parts

    def prefix_states(self, parts: Tensor | None = None) -> tuple[Tensor, SketchState]:
        """The states before each tile (not causal: the totals) and the final state."""
        states, final = self.scan(self.key_sums() if parts is None else parts, self.p.initial, True, reverse=False)
        assert final is not None
        return states, _with_decay(final, self.p)

    def total(self, parts: Tensor, entering: SketchState | None, *, reverse: bool) -> SketchState:
        """The state that leaves the last tile; ``parts`` stay as they are."""
        leaving = self._scan(parts, entering, self._new_sketch(), None, reverse=reverse, write=False)
        return _with_decay(leaving, self.p)

    def query_pass(self, saved: ForwardResult, dout: Tensor, dq: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Writes dq; h, the queries' part of dG, and the tiles' sums of the suffix state."""
        p, blocks = self.p, self.plan["bwd_dq"].spec.NVB
        h = None
        if p.normalization == "global":  # tokens adjacent: the pass over the keys reads h along a row of pairs
            h = p.q.new_empty(p.q.shape[0], p.q.shape[2] * blocks, p.q.shape[1], dtype=torch.float32).transpose(1, 2)
        needs_row = p.log_decay is not None and p.normalization != "global"
        row = p.q.new_empty(*p.q.shape[:2], self.heads * blocks, dtype=torch.float32) if needs_row else None
        parts = self._new_states(self.num_tiles)
        target = self.gradient_target(dq)
        suffix = TileStates(parts, self.decays)
        self.launch(
            "bwd_dq",
            self.kernel("bwd_dq"),
            self.inputs,
            rows(dout),
            _residuals(saved),
            QueryGradients(rows(target), scalars(h), scalars(row), suffix, self.dbeta[0], self.kernel_dplanes(0)),
            programs=blocks,
        )
        self.finish_gradient(target, dq, p.q, 0)
        blocks = self.plan["tile_sums_bwd"].spec.NSB
        if self.plan.recurrent and (blocks > 1 or not self.plan.pipelined):
            self.launch(
                "tile_sums_bwd",
                tile_sums.race_tile_sums_bwd_kernel,
                self.inputs,
                rows(dout),
                scalars(saved.den),
                scalars(self.summed(h)),
                suffix,
                programs=blocks,
            )
        return h, row, parts

    def scan(
        self, parts: Tensor, entering: SketchState | None, wanted: bool, *, reverse: bool
    ) -> tuple[Tensor, SketchState | None]:
        """Scan tile sums, in place, from the state ``entering``: the states before each tile (``reverse``: behind it; not
        causal: the totals), and the state that leaves if ``wanted``."""
        totals = None if self.p.causal else self._new_states(self.p.num_states)
        leaving = self._new_sketch() if wanted else None
        self._scan(parts, entering, leaving, totals, reverse=reverse, write=True)
        return (parts if totals is None else totals), leaving

    def _scan(
        self,
        parts: Tensor,
        entering: SketchState | None,
        leaving: SketchT,
        totals: Tensor | None,
        *,
        reverse: bool,
        write: bool,
    ) -> SketchT:
        p = self.p
        initial = None if entering is None else Sketch(entering.values.contiguous(), entering.mass.contiguous())
        per_row = 0 if p.cu_seqlens is not None else self.num_tiles // max(1, p.num_states)
        programs = p.num_states * self.heads * -(-parts.shape[-1] // SCAN_WIDTH)
        if programs:
            self.kind.run(
                ("scan", reverse, leaving is not None, write, *map(_placed, initial or ())),
                scan.race_scan_kernel,
                programs,
                TileStates(parts, self.decays),
                initial,
                None if leaving is None else Sketch(leaving.values, leaving.mass),
                totals,
                SequenceTiles(self.tiles.row_tiles, per_row),
                self.heads,
                self.plan["tile_sums_fwd"].constants,
                SCAN_WIDTH,
                reverse,
                write,
                num_warps=2,
            )
        return leaving

    def planes_gradient(self) -> Tensor:
        """Sum of the programs' parts ``[tile, H, block, slot, D]`` as ``[Hkv, L, P, D]``."""
        p, spec = self.p, self.plan["bwd_dkv"].spec
        _, tables, number, dim = p.planes.shape
        halves = [part.sum(0, dtype=torch.float64) for part in self.dplanes if part is not None]
        if spec.pipelined:  # all planes in one block; a block for each query head of the group
            both = halves[0].sum(1) + halves[1].sum(1)
            return both[:, : tables * number, :dim].unflatten(1, (tables, number)).to(p.planes.dtype)
        parts = torch.stack(halves).sum(0)
        # [H, block, LPB, BD] -> [H, block, tables of a block, P, D]
        parts = parts[:, :, : min(spec.TABLES_PER_BLOCK, tables) * number, :dim].unflatten(2, (-1, number))
        if spec.R > spec.SB:  # several blocks share a table
            parts = parts.unflatten(1, (tables, -1)).sum(2)
        return parts.flatten(1, 2)[:, :tables].to(p.planes.dtype)

    def _new_sketch(self) -> SketchState:
        p = self.p
        shape = (p.num_states, self.heads, p.features)
        return SketchState.unchecked(
            p.q.new_empty(shape, dtype=p.state_dtype), p.q.new_empty(*shape, p.v.shape[3], dtype=p.state_dtype)
        )

    def _new_states(self, count: int) -> Tensor:
        return self.p.q.new_empty(count, self.heads, self.p.features * (self.p.v.shape[3] + 1), dtype=torch.float32)


def _with_decay(state: SketchState, p: AttentionInputs) -> SketchState:
    """A row's state with the sum of the row's log decays."""
    return state if p.log_decay is None else replace(state, log_decay=total_log_decay(p))


def _placed(x: Tensor) -> tuple[torch.dtype, int]:
    """What a compiled kernel depends on of a contiguous tensor."""
    return x.dtype, x.data_ptr() & 15


def _residuals(saved: ForwardResult) -> Residuals:
    """What a forward pass saved, as kernels take it."""
    return Residuals(scalars(saved.den), saved.states, Sketch(saved.final.values, saved.final.mass))
