"""Cross-entropy of a linear head, chunked so that only a few rows of logits exist at a time."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from race_dist import checks
from race_dist.models.backbone import check_ids

IGNORE_INDEX = -100
HAS_LIGER = find_spec("liger_kernel") is not None
_LARGE_VOCABULARY = 8192  # below it plain kernels are as fast as the fused one
_ELEMENTS = {"cpu": 2**21}  # logits that exist at a time; 2**26 on other devices


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None, fused: bool | None = None
) -> Tensor:
    """The sum of ``-log softmax(h @ weight.T)[label]`` over rows whose label is not -100.

    Gradients are computed together with the loss, so that the logits of each ``chunk`` rows are computed only once.

    Args:
        h: ``[N, D]`` hidden states.
        weight: ``[V, D]``.
        labels: ``[N]`` int64, from 0 to V - 1, or -100.
        chunk: rows of logits that exist at a time; None: chosen by the size of the vocabulary.
        fused: whether liger-kernel's Triton kernel computes the loss and gradient of a chunk in one pass over its logits; it
            chooses the chunk. None: on CUDA, for vocabularies of at least 8192, where liger-kernel is installed.

    Returns:
        The sum, float32 (float64 for float64 hidden states); 0 if no label counts.

    Raises:
        ImportError: ``fused`` without liger-kernel.
        TypeError, ValueError: a class, shape, dtype or label does not fit.
    """
    _check(h, weight, labels, chunk, fused)
    device = h.device.type
    narrow = torch.is_autocast_enabled(device) and h.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if narrow else torch.promote_types(h.dtype, weight.dtype)
    if fused is None:
        fused = HAS_LIGER and chunk is None and h.is_cuda and dtype != torch.float64 and weight.shape[0] >= _LARGE_VOCABULARY
    chunk = 0 if fused else chunk or max(16, _ELEMENTS.get(device, 2**26) // weight.shape[0])
    grad = torch.is_grad_enabled()
    return _linear_cross_entropy(h, weight, labels, dtype, chunk, grad and h.requires_grad, grad and weight.requires_grad)[0]


def _check(h: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, fused: bool | None) -> None:
    checks.tensor("h", h, dtypes=checks.DTYPES, dim=2)
    checks.tensor("weight", weight, dtypes=checks.DTYPES, dim=2)
    checks.tensor("labels", labels, dtypes=(torch.int64,), dim=1)
    if weight.shape[1] != h.shape[1] or weight.shape[0] == 0 or labels.shape != h.shape[:1]:
        raise ValueError(
            f"h, weight and labels must be [N, D], [V, D] and [N]; got {list(h.shape)}, {list(weight.shape)} and "
            f"{list(labels.shape)}"
        )
    for name, x in (("weight", weight), ("labels", labels)):
        if x.device != h.device:
            raise ValueError(f"{name} is on {x.device} but h is on {h.device}: move one of them")
    if chunk is not None:
        checks.integer("chunk", chunk, minimum=1, maximum=2**62)
    if fused is not None:
        checks.flag("fused", fused)
    check_ids("labels (other than -100)", labels.masked_fill(labels == IGNORE_INDEX, 0), weight.shape[0])


@torch.library.custom_op("race_dist::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int, need_h: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and its gradients: matrix products in ``dtype``, logits and sums in at least float32. ``chunk`` 0: fused."""
    if not chunk:
        return _fused_cross_entropy(h, weight, labels, dtype, need_h, need_weight)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    dh = torch.empty_like(h) if need_h else h.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_weight else weight.new_empty(0)
    w = weight.to(dtype)
    for start in range(0, h.shape[0], chunk):
        rows, target = h[start : start + chunk].to(dtype), labels[start : start + chunk, None]
        counts = target != IGNORE_INDEX
        target = target.clamp(min=0)
        logits = (rows @ w.mT).to(wide)
        log_sum = logits.logsumexp(-1, keepdim=True)
        total += torch.where(counts, log_sum - logits.gather(1, target), 0).sum(dtype=torch.float64)
        if not (need_h or need_weight):
            continue
        dlogits = logits.sub_(log_sum).exp_()
        dlogits.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
        dlogits = (dlogits * counts).to(dtype)
        if need_h:
            dh[start : start + chunk] = dlogits @ w
        if need_weight:
            dweight += dlogits.mT @ rows
    return total.to(wide), dh, dweight.to(weight.dtype)


def _fused_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, need_h: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by liger-kernel; the gradient of the weight is accumulated in float32."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
    except ImportError as error:
        raise ImportError(f'the fused loss needs liger-kernel ({error}): pip install "race-dist[liger]"') from error
    with torch.autocast(h.device.type, dtype, enabled=dtype != h.dtype):
        total, *_, dh, dweight, _ = fused_linear_cross_entropy_forward(
            h,
            weight,
            labels,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            accum_dtype=torch.float32,
            compute_gradients=need_h or need_weight,
            weight_requires_grad=need_weight,
        )
    return (total.float(), dh if need_h else h.new_empty(0), dweight.to(weight.dtype) if need_weight else weight.new_empty(0))


@_linear_cross_entropy.register_fake
def _(
    h: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int, need_h: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return (
        h.new_empty((), dtype=wide),
        torch.empty_like(h) if need_h else h.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.needed = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = [(dloss * g).to(g.dtype) if needed else None for g, needed in zip(ctx.saved_tensors, ctx.needed)]
    return *gradients, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
