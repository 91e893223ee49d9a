"""Which kernels run for a call, with which tiles, and which calls are supported."""

from __future__ import annotations

from functools import lru_cache

import torch

from race_dist.kernels.interpreter import INTERPRET
from race_dist.kernels.plan import Plan, Spec, make_plan, work_bucket
from race_dist.kernels.tiles import fitted_tile
from race_dist.ops import device
from race_dist.ops.explain import KernelPlan
from race_dist.ops.inputs import AttentionInputs

MAX_DIM = 256
MAX_FEATURES = 1024
PIPELINE_BLOCK = 64  # features up to which a plan's tile does not depend on TMA; also value columns of a block beyond that


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why these kernels cannot compute ``inputs``, as the end of a sentence; None when they can."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32; got {q.dtype}"
    if not (q.dtype == k.dtype == v.dtype):
        return f"takes q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}"
    for name, size in (("head_dim", q.shape[3]), ("value_dim", v.shape[3])):
        if size > MAX_DIM:
            return f"takes {name} up to {MAX_DIM}; got {size}"
    if inputs.features > MAX_FEATURES:
        return f"takes up to {MAX_FEATURES} features (num_tables * 2**num_planes); got {inputs.features}"
    if not (q.is_cuda or INTERPRET):
        return f"needs a CUDA device (or TRITON_INTERPRET=1, set before triton is imported); q is on {q.device}"
    return None


def explain(inputs: AttentionInputs) -> KernelPlan:
    """Which kernels run for ``inputs`` and their gradients, and why no faster ones."""
    tma = device.supports_tma(inputs.q, inputs.k, inputs.v)
    plan = plan_call(inputs, inputs.planes.requires_grad, tma=tma)
    if is_decoding(inputs):
        return KernelPlan("triton", "decode", ("race_decode_kernel",), None)
    if plan.pipelined:
        return KernelPlan("triton", plan.family, plan.kernels, None)
    reason = plan.obstacle or f"the pipelines need compute capability 9.0 and Triton 3.6; this is {inputs.q.device}"
    return KernelPlan("triton", plan.family, plan.kernels, reason)


def plan_call(inputs: AttentionInputs, need_planes: bool, *, tma: bool) -> Plan:
    """The plan of a call. A compiler that traces with symbolic sizes specializes here, because the number of saved states is
    that of the plan's tiles."""
    _, tables, planes, dim = map(int, inputs.planes.shape)
    batch, length, heads = map(int, inputs.k.shape[:3])
    q, value_dim, tile = inputs.q, int(inputs.v.shape[3]), None
    hopper = device.has_pipelines(q.device)
    if q.dtype == torch.bfloat16 and hopper:  # also where other kernels run, because they share saved states
        blocks = 1 if tables * 2**planes <= PIPELINE_BLOCK else -(-value_dim // PIPELINE_BLOCK)
        tile = fitted_tile(length, batch * heads * blocks, device.num_sms(q.device))
    return cached_plan(
        (dim, value_dim, tables, planes, int(q.shape[2]) // heads),
        inputs.causal,
        inputs.normalization,
        (inputs.log_decay is not None, inputs.key_mask is not None, inputs.cu_seqlens is not None),
        q.dtype,
        inputs.planes.dtype != q.dtype,
        tma,
        need_planes,
        work_bucket(batch * heads * length),
        device.shared_memory_limit(q.device),
        hopper,
        tile,
    )


@lru_cache(maxsize=256)
def cached_plan(
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
    """Plans are cached, because the host time of a call decides short sequences. ``tile``: tokens per tile, on a GPU that has
    the pipelines and for a dtype that they take."""
    dim, value_dim, tables, planes, group = sizes
    decay, masked, packed = extras
    spec = Spec(
        D=dim,
        Dv=value_dim,
        L=tables,
        P=planes,
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


def states_shape(inputs: AttentionInputs) -> tuple[int, ...]:
    """Of ``ForwardResult.states``: values, then mass, of each tile (causal) or row."""
    heads, size = inputs.k.shape[2], inputs.features * (inputs.v.shape[3] + 1)
    if is_decoding(inputs):
        return 0, heads, size
    if not inputs.causal:
        return inputs.num_states, heads, size
    return num_tiles(inputs, plan_call(inputs, False, tma=True)), heads, size


def is_decoding(inputs: AttentionInputs) -> bool:
    """One token per row: a single kernel computes it, and the backward pass computes the states that it needs."""
    return inputs.causal and inputs.cu_seqlens is None and inputs.q.shape[1] == 1


def num_tiles(inputs: AttentionInputs, plan: Plan) -> int:
    """Tiles of all rows; for packed documents an upper bound from shapes alone."""
    batch, length = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        return batch * -(-length // plan.tile)
    return length // plan.tile + inputs.num_states
