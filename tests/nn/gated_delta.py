"""A gated delta rule in plain PyTorch: all that a new kind of mixing layer needs, in one file.

``S <- a S (I - b k k') + b v k'`` and ``o = S q``, per head. A piece of tokens takes the state S before it to ``S A + B``: its
carry is the pair of matrices ``(A, B)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from race_dist.models import ModelConfig
from race_dist.nn import (
    LayerCarry,
    LayerKind,
    Linear,
    MixingLayer,
    ModelShape,
    RMSNorm,
    Sequence,
    TokenSpan,
    initialize,
    run_recurrence,
)
from race_dist.nn.layer_checks import check_layer_call, check_zero_carry
from race_dist.nn.registry import BuildOptions
from race_dist.planning import Job
from race_dist.planning.layer_costs import LayerCost, norm_activations
from race_dist.planning.quantities import ActivationBytes, ChunkShape, Cost, LinearShape
from race_dist.strict_config import StrictConfig


@dataclass(frozen=True)
class DeltaCarry(LayerCarry):
    """``transition, state [B, H, D, D]``: a piece takes the state S before it to ``S @ transition + state``."""

    transition: Tensor
    state: Tensor

    def zero(self) -> Self:
        eye = torch.eye(self.state.shape[-1], dtype=self.state.dtype, device=self.state.device)
        return type(self)(eye.expand_as(self.state).clone(), torch.zeros_like(self.state))

    def combine(self, later: Self) -> Self:
        return type(self)(self.transition @ later.transition, self.state @ later.transition + later.state)

    def with_reset(self) -> Self:
        return type(self)(torch.zeros_like(self.transition), self.state)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.transition, self.state

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        return type(self)(*tensors)


class GatedDeltaRule(MixingLayer):
    """Projections, the recurrence, a norm per head and the output projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: GatedDeltaConfig | None = None,
        *,
        output_gain: float = 1.0,
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.config = num_heads, dim // num_heads, config or GatedDeltaConfig()
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, **where) for _ in range(3))
        self.decay_proj, self.write_proj = (Linear(dim, num_heads, **where) for _ in range(2))
        self.out_norm = RMSNorm(num_heads, self.head_dim, **where)
        self.o_proj = Linear(dim, dim, gain=output_gain, **where)
        if init_weights:
            initialize(self, 0, "gated_delta")

    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> DeltaCarry:
        batch = check_zero_carry(batch, device, dtype, state_dtype)
        shape = (batch, self.num_heads, self.head_dim, self.head_dim)
        state = torch.zeros(shape, device=device, dtype=state_dtype or torch.promote_types(dtype, torch.float32))
        return DeltaCarry(state, state).zero()

    def forward(
        self, x: Tensor, carry: DeltaCarry | None = None, sequence: Sequence | None = None
    ) -> tuple[Tensor, DeltaCarry | None]:
        weight = self.q_proj.weight
        check_layer_call(self, x, carry, sequence, dim=weight.shape[1], weight=weight, carry_type=DeltaCarry)
        sequence = sequence or Sequence.of_one_document(x, carry, self.rope_base)
        x = sequence.mask_padding(x)
        carry = carry or self.zero_carry(x.shape[0], device=x.device, dtype=x.dtype)
        out, carry = run_recurrence(self.inputs(x), carry, sequence, recurrence)
        return self.o_proj(self.out_norm(out.to(x.dtype)).flatten(2)), carry

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, T, H, D]``, and per head and token how much stays and how much is written."""
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        stay, write = torch.sigmoid(self.decay_proj(x) + self.config.initial_stay), torch.sigmoid(self.write_proj(x))
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, stay, write


def recurrence(span: TokenSpan, carry: DeltaCarry) -> tuple[Tensor, DeltaCarry]:
    """Token by token: outputs ``[B, n, H, D]`` and the carry after the span."""
    q, k, v, stay, write = (t.to(carry.state.dtype) for t in span.tensors)
    if span.mask is not None:  # padding changes nothing
        stay, write = torch.where(span.mask[..., None], stay, 1), torch.where(span.mask[..., None], write, 0)
    if span.starts is not None:  # a document forgets what came before it
        stay = torch.where(span.starts[:, None], 0, stay)
    transition, state, outputs = carry.transition, carry.state, [q[:, :0]]
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for t in range(q.shape[1]):
        scale = write[:, t, :, None, None]
        step = stay[:, t, :, None, None] * (eye - scale * k[:, t, :, :, None] * k[:, t, :, None, :])
        transition = transition @ step
        state = state @ step + scale * v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ q[:, t, :, :, None])[..., 0][:, None])
    out = torch.cat(outputs, 1)
    if span.mask is not None:
        out = torch.where(span.mask[..., None, None], out, 0)
    return out, DeltaCarry(transition, state)


class GatedDeltaConfig(StrictConfig):
    """The options of the layer."""

    initial_stay: float = Field(default=3.0, description="Added to the logits of how much of the state stays.")


class GatedDeltaCost(LayerCost):
    """The cost of a layer for the planner: its products with matrices, and per token and head three products with the state."""

    def linear_layers(self, m: ModelConfig) -> list[LinearShape]:
        return [LinearShape(m.dim, m.dim)] * 4 + [LinearShape(m.dim, m.num_heads)] * 2

    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        per_step = 4 * job.model.dim * job.model.resolved_head_dim  # transition and state, before and after each token
        return ActivationBytes(norm_activations(job) + (4 * job.model.dim + per_step) * job.param_bytes)

    def compiled_activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        return self.activations(job, chunk) + ActivationBytes(-norm_activations(job))

    def elementwise_traffic(self, job: Job) -> tuple[float, float]:
        return 3.0 * job.model.dim * job.compute_bytes, 6.0 * job.model.dim * job.compute_bytes

    def head_cost(self, job: Job, chunk: ChunkShape) -> tuple[Cost, Cost]:
        flops = self.definition_flops(job.model)
        moved = 4 * job.model.resolved_head_dim * job.compute_bytes
        return Cost(flops, moved), Cost(2 * flops, 2 * moved)

    def definition_flops(self, m: ModelConfig) -> float:
        return 3 * 2 * m.resolved_head_dim**2

    def rope_base(self, m: ModelConfig) -> float | None:
        return None

    def state_numbers(self, m: ModelConfig) -> int:
        return 2 * m.dim * m.resolved_head_dim


class GatedDeltaKind(LayerKind):
    """G: the gated delta rule, with options of its own."""

    letter = "G"
    name = "gated delta rule"
    cost = GatedDeltaCost("G")

    def __init__(self, config: GatedDeltaConfig | None = None) -> None:
        self.config = config or GatedDeltaConfig()

    def options(self, model: ModelShape) -> GatedDeltaConfig:
        return self.config

    def build(self, model: ModelShape, layer: int, *, causal: bool, **options: Unpack[BuildOptions]) -> GatedDeltaRule:
        return GatedDeltaRule(model.dim, model.num_heads, self.config, **options)
