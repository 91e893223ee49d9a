"""Which kernels run for a call of the attention, without running them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from race_dist.ops.backends import HAS_TRITON, BackendName, check_backend, select_backend
from race_dist.ops.explain import KernelPlan
from race_dist.ops.inputs import Normalization
from race_dist.ops.validation import AttentionArguments, validate
from race_dist.sketch import SketchState


def explain_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor | float = 1.0,
    *,
    causal: bool = True,
    normalization: Normalization = "global",
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: SketchState | None = None,
    group: dist.ProcessGroup | None = None,
    backend: BackendName = "auto",
) -> KernelPlan:
    """Which kernels ``race_attention`` runs for these tensors on this rank, and why no faster ones. Nothing is computed.

    The arguments are those of the same call to :func:`race_dist.race_attention`; shapes, strides, dtypes, devices and whether
    the planes require a gradient decide.

    Returns:
        A :class:`~race_dist.ops.explain.KernelPlan`; ``print`` it.

    Raises:
        TypeError, ValueError: as the call itself would.
    """
    arguments = AttentionArguments(q, k, v, planes, beta, causal, normalization, cu_seqlens, key_mask, log_decay, initial_state)
    inputs = validate(arguments, sharded=group is not None)
    check_backend(backend)
    selected = select_backend(inputs, backend)
    if selected.name == "reference":
        return KernelPlan("reference", "all pairs", (), "it computes all pairs of tokens, for checking")
    if selected.name == "triton":
        from race_dist.ops.triton import explain

        return explain(inputs)
    if backend == "chunked":
        reason = 'backend="chunked" was asked for; "auto" takes GPU kernels where it can'
    elif not q.is_cuda:
        reason = f"q is on {q.device}: GPU kernels need a CUDA device"
    elif not HAS_TRITON:
        reason = 'triton is not installed: pip install "race-dist[triton]"'
    else:
        reason = f'the GPU kernels do not fit: backend="triton" {selected.reason}'
    return KernelPlan("chunked", "PyTorch chunks", (), reason)
