"""The gate on a layer's output: how its logits become factors."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateActivation = Literal["silu", "sigmoid"]


def apply_output_gate(y: Tensor, logits: Tensor, activation: GateActivation) -> Tensor:
    """``y`` times the activation of ``logits``, which have its shape."""
    return y * (F.silu(logits) if activation == "silu" else torch.sigmoid(logits))
