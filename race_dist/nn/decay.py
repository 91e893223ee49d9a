"""Data-dependent decay and fixed decay per head: initial values, and log decays from a layer's input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.nn.norm import compute_dtype

MIN_TIME_CONSTANT, MAX_TIME_CONSTANT = 8.0, 1024.0  # tokens after which a decaying head has forgotten all but 1/e
LONG_TIME_CONSTANT = 2.0**14  # initial value, under decay="token", of the heads that should remember


def decay_time_constants(heads: int, longest: float = math.inf) -> list[float]:
    """Tokens after which each head has forgotten all but 1/e.

    They are spread geometrically over the heads; the last quarter of the heads (none of a single head) gets ``longest``.
    """
    if heads == 1:
        return [math.sqrt(MIN_TIME_CONSTANT * MAX_TIME_CONSTANT)]
    decaying = heads - max(1, heads // 4)
    ratio = (MAX_TIME_CONSTANT / MIN_TIME_CONSTANT) ** (1 / max(1, decaying - 1))
    return [MIN_TIME_CONSTANT * ratio**h for h in range(decaying)] + [longest] * (heads - decaying)


def fixed_log_decay(heads: int) -> Tensor:
    """``[Hkv]`` float64: the log decay per token of ``decay="multiscale"``."""
    return torch.tensor([-1 / n for n in decay_time_constants(heads)], dtype=torch.float64)


def initial_decay_bias(heads: int) -> Tensor:
    """``[Hkv]`` float64: the bias of :func:`token_log_decay` at which the heads have their initial time constants."""
    constants = torch.tensor(decay_time_constants(heads, LONG_TIME_CONSTANT), dtype=torch.float64)
    return (1 / constants).expm1().log()  # the inverse of softplus


def token_log_decay(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The log decay per token of ``decay="token"``: ``-softplus(x @ weight.T + bias)``, in the compute dtype.

    Args:
        x: ``[..., dim]``, the layer's input.
        weight: ``[Hkv, dim]``.
        bias: ``[Hkv]``.

    Returns:
        ``[..., Hkv]``, at most 0.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # a bfloat16 decay is off by half a percent at every token
        return -F.softplus(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
