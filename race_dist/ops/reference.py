"""The attention by definition: every pair of tokens, in plain differentiable PyTorch. For small T and for tests.

Every other backend is tested against it, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from race_dist.hashing import soft_hash
from race_dist.ops.inputs import BUCKET_EPS, AttentionInputs, den_floor
from race_dist.sketch import SketchState


def attention(inputs: AttentionInputs) -> tuple[Tensor, SketchState]:
    """Output ``[B, T, Hq, Dv]`` in q's dtype and the final state, both differentiable in every float input."""
    if inputs.cu_seqlens is None:
        return _one_sequence(inputs, slice(0, inputs.q.shape[1]), inputs.initial)
    bounds = inputs.cu_seqlens.tolist()
    parts = [
        _one_sequence(inputs, slice(start, end), None if inputs.initial is None else inputs.initial[n : n + 1])
        for n, (start, end) in enumerate(zip(bounds, bounds[1:]))
    ]
    final = [torch.cat(field) for field in zip(*(state.tensors() for _, state in parts))]
    return torch.cat([out for out, _ in parts], 1), SketchState.unchecked(*final)


def _one_sequence(inputs: AttentionInputs, tokens: slice, initial: SketchState | None) -> tuple[Tensor, SketchState]:
    """The definition on the tokens of one document (or of all batch rows, when nothing is packed)."""
    dtype = inputs.compute_dtype
    q, k, v = (x[:, tokens].to(dtype).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, T, D]
    heads, length = k.shape[1:3]
    phi_q = soft_hash(
        q.unflatten(1, (heads, -1)), inputs.planes[:, None].to(dtype), inputs.beta.to(dtype)[:, None, None, None, None]
    )
    phi_k = soft_hash(k, inputs.planes.to(dtype), inputs.beta.to(dtype))  # [B, Hkv, T, S]; phi_q [B, Hkv, Hq / Hkv, T, S]
    if inputs.key_mask is not None:
        phi_k = phi_k * inputs.key_mask[:, None, tokens, None]
    weight, carried, total = _weights(inputs, tokens, length)  # [B, Hkv, T, T], [B, Hkv, T], [B, Hkv] or None
    mass = phi_k.new_zeros(()) if initial is None else initial.mass.to(dtype)[:, :, None] * carried[..., None]
    values = None if initial is None else initial.values.to(dtype)

    if inputs.normalization == "bucket":
        phi_q = phi_q / (mass + weight @ phi_k + BUCKET_EPS)[:, :, None]
    score = (phi_q @ phi_k[:, :, None].mT) * weight[:, :, None]
    num = score @ v[:, :, None]
    if values is not None:
        num = num + (phi_q @ values[:, :, None]) * carried[:, :, None, :, None]
    if inputs.normalization == "global":
        den = score.sum(-1)
        if initial is not None:
            den = den + (phi_q * mass[:, :, None]).sum(-1)
        empty = den < den_floor(dtype)
        num = torch.where(empty[..., None], 0.0, num / torch.where(empty, 1.0, den)[..., None])
    out = num.flatten(1, 2).transpose(1, 2).to(inputs.q.dtype)
    return out, _final_state(inputs, phi_k, v, weight, total, initial)


def _final_state(
    inputs: AttentionInputs, phi_k: Tensor, v: Tensor, weight: Tensor, total: Tensor | None, initial: SketchState | None
) -> SketchState:
    """``sum_j exp(G_last - G_j) phi(k_j) [1 | v_j] + exp(G_last) * initial``."""
    last = weight[:, :, -1, :, None] if weight.shape[2] else weight.new_zeros(*weight.shape[:2], 0, 1)
    phi_k = (phi_k * last).to(inputs.state_dtype)
    tokens = SketchState.unchecked(
        phi_k.sum(2), phi_k.mT @ v.to(inputs.state_dtype), None if total is None else total.to(inputs.state_dtype)
    )
    if initial is None:
        return tokens
    return SketchState.unchecked(*initial.tensors()[:2]).combine(tokens)


def _weights(inputs: AttentionInputs, tokens: slice, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight of token j in the output of token i, weight of the initial state in it, and the total log decay."""
    batch, heads, dtype, device = inputs.q.shape[0], inputs.k.shape[2], inputs.compute_dtype, inputs.q.device
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if not inputs.causal:
        return (
            visible.to(dtype).expand(batch, heads, -1, -1),
            torch.ones(batch, heads, length, dtype=dtype, device=device),
            None,
        )
    visible = visible.tril()
    if inputs.log_decay is None:
        return (
            visible.to(dtype).expand(batch, heads, -1, -1),
            torch.ones(batch, heads, length, dtype=dtype, device=device),
            None,
        )
    log_decay = inputs.log_decay[:, tokens].to(dtype).transpose(1, 2)  # [B, H, T]
    # G_i - G_j as the sum over j < t <= i: a difference of two sums would cancel
    after = torch.where(visible.tril(-1), log_decay[..., :, None], 0.0).cumsum(-2)
    return torch.where(visible, after, -torch.inf).exp(), log_decay.cumsum(-1).exp(), log_decay.sum(-1)
