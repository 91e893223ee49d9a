"""The output gate of a layer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateActivation = Literal["silu", "sigmoid"]


def apply_output_gate(y: Tensor, logits: Tensor, activation: GateActivation) -> Tensor:
    """``y`` times the activation of ``logits``; both have one shape."""
    return y * (F.silu(logits) if activation == "silu" else torch.sigmoid(logits))
