"""Linear-attention baselines in plain PyTorch, in chunks: the gated delta rule, simple gated linear attention, and the delta
rule on RACE's buckets. For training on short sequences; not tuned for speed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from race_dist.hashing import soft_hash
from race_dist.nn import Linear, RaceAttention, RaceConfig, Sequence
from race_dist.nn.norm import compute_dtype
from race_dist.nn.output_gate import apply_output_gate
from race_dist.nn.race_core import apply_qk_norm
from race_dist.nn.short_conv import apply_short_convs

CHUNK = 64


class LinearBaseline(RaceAttention):
    """Another linear attention with the other parts of a RACE layer: projections, convolutions, a decay per token, a norm per
    head and the gate. Complete sequences on one rank only.

    Args:
        config: of the RACE layer that it replaces: its widths, convolutions and gate are used.
        layer: index of the layer.
    """

    def __init__(self, config: RaceConfig, layer: int = 0, **options: Any) -> None:
        super().__init__(self.baseline_config(config), layer, **options)

    def baseline_config(self, config: RaceConfig) -> RaceConfig:
        """The config without the options of the hash."""
        return config.model_copy(
            update={
                "qk_norm": False,
                "train_beta": False,
                "train_planes": False,
                "normalization": "none",
                "decay": "token",
                "rope_base": None,
                "num_tables": 1,
                "num_planes": 1,
            }
        )

    @property
    def state_numbers(self) -> int:
        """Numbers of one row's state: one matrix per head."""
        return self.num_kv_heads * self.head_dim * self.head_dim

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        carry: Any = None,
        sequence: Sequence | None = None,
    ) -> tuple[Tensor, None]:
        """``x [B, T, dim]`` to the same; there is no carry."""
        sequence = sequence or Sequence.of(x.shape[1], device=x.device)
        if carry is not None or sequence.group is not None or sequence.cu_seqlens is not None or sequence.key_mask is not None:
            raise ValueError(f"{type(self).__name__} is a benchmark baseline: whole unpadded sequences on one rank only")
        (q, k, v), _ = apply_short_convs(self.project(x), (self.q_conv, self.k_conv, self.v_conv), None, sequence)
        heads = [t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.activated(q, k, v)]
        log_decay = self._decay(x)
        assert log_decay is not None
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = (t.to(compute_dtype(x)) for t in heads)
            out = self.recurrence(q, k, v, log_decay.transpose(1, 2), x)
        assert self.out_norm is not None
        y = self.out_norm(out.transpose(1, 2)).flatten(2).to(heads[2].dtype)
        if self.gate_proj is not None:
            y = apply_output_gate(y, self.gate_proj(x), self.config.gate_activation)
        return self.output(y), None

    def activated(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values after their convolution."""
        return F.silu(q), F.silu(k), F.silu(v)

    def recurrence(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` of heads ``[B, H, T, D]``, log decays ``[B, H, T]`` and the layer's input."""
        raise NotImplementedError


class GatedLinear(LinearBaseline):
    """Simple gated linear attention: ``S <- a S + k v'``, ``o = S' q``, on SiLU(q), SiLU(k), SiLU(v)."""

    def recurrence(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, x: Tensor) -> Tensor:
        return gated_linear(q, k, v, log_decay)


class GatedDelta(LinearBaseline):
    """The gated delta rule: ``S <- a (I - b k k') S + b k v'``, ``o = S' q``, with keys and queries of unit length."""

    def __init__(self, config: RaceConfig, layer: int = 0, **options: Any) -> None:
        super().__init__(config, layer, **options)
        assert config.dim is not None
        where: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.write_proj = Linear(config.dim, self.num_kv_heads, **where)

    def recurrence(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, x: Tensor) -> Tensor:
        q, k = self.normalized(q, k)
        write = torch.sigmoid(F.linear(x.to(q.dtype), self.write_proj.weight.to(q.dtype))).transpose(1, 2)
        return gated_delta(q, k, v, log_decay, write)

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of unit length, which read and write the state."""
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class BucketDelta(GatedDelta):
    """The delta rule on RACE's buckets: the soft hash's features, of unit length, instead of keys and queries."""

    def baseline_config(self, config: RaceConfig) -> RaceConfig:
        return config.model_copy(update={"normalization": "none", "decay": "token", "rope_base": None})

    @property
    def state_numbers(self) -> int:
        return self.num_kv_heads * self.config.num_features * self.head_dim

    def activated(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        features = []
        for t, scale in ((q, self.q_scale), (k, self.k_scale)):
            if scale is not None:
                t = apply_qk_norm(t.transpose(1, 2), scale, self.config.norm_eps).transpose(1, 2)
            features.append(F.normalize(soft_hash(t, self.planes.to(t.dtype), self._beta(t).to(t.dtype)), dim=-1))
        return features[0], features[1]


BASELINE_MIXERS: dict[str, type[LinearBaseline]] = {
    "gated_linear": GatedLinear,
    "gated_delta": GatedDelta,
    "bucket_delta": BucketDelta,
}


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """``[B, H, T, ...]`` as ``[B, H, N, C, ...]``, the last chunk padded with zeros."""
    missing = -x.shape[2] % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2)
    return x.unflatten(2, (-1, chunk))


def _within(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative log decay in a chunk ``[..., C]``, and the factor from token j to token i ``[..., C, C]`` (0 for j > i)."""
    total = log_decay.cumsum(-1)
    size = total.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return total, (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()


def gated_linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """``o_i = sum_{j <= i} exp(G_i - G_j) <q_i, k_j> v_j``.

    Args:
        q, k: ``[B, H, T, K]``.
        v: ``[B, H, T, D]``.
        log_decay: ``[B, H, T]``, at most 0.
    """
    length = q.shape[2]
    q, k, v, log_decay = (_chunks(t, chunk) for t in (q, k, v, log_decay))
    total, factor = _within(log_decay)
    inside = ((q @ k.mT) * factor) @ v
    sums = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v  # [B, H, N, K, D]
    last, decayed_q = total[..., -1].exp(), q * total.exp()[..., None]
    state, out = torch.zeros_like(sums[:, :, 0]), []
    for n in range(q.shape[2]):
        out.append(inside[:, :, n] + decayed_q[:, :, n] @ state)
        state = last[:, :, n, None, None] * state + sums[:, :, n]
    return torch.stack(out, 2).flatten(2, 3)[:, :, :length]


def gated_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, write: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """``S_i = exp(g_i) (I - b_i k_i k_i') S_{i-1} + b_i k_i v_i'``, ``o_i = S_i' q_i``, in chunks (the WY form).

    Args:
        q, k: ``[B, H, T, K]``, keys of unit length.
        v: ``[B, H, T, D]``.
        log_decay: ``g [B, H, T]``, at most 0.
        write: ``b [B, H, T]``, 0 to 1.
    """
    length, width = q.shape[2], v.shape[-1]
    q, k, v, log_decay, write = (_chunks(t, chunk) for t in (q, k, v, log_decay, write))
    total, factor = _within(log_decay)
    written = k * write[..., None]
    # solve_triangular, because powers of the matrix overflow where keys are nearly parallel
    triangle = ((written @ k.mT) * factor).tril(-1) + torch.eye(chunk, dtype=q.dtype, device=q.device)
    right = torch.cat([v * write[..., None], written * total.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(triangle, right, upper=False, unitriangular=True)
    values, keys = solved[..., :width], solved[..., width:]
    inside, decayed_q = (q @ k.mT) * factor, q * total.exp()[..., None]
    decayed_k, last = k * (total[..., -1:] - total).exp()[..., None], total[..., -1].exp()
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], width), []
    for n in range(q.shape[2]):
        new = values[:, :, n] - keys[:, :, n] @ state
        out.append(decayed_q[:, :, n] @ state + inside[:, :, n] @ new)
        state = last[:, :, n, None, None] * state + decayed_k[:, :, n].mT @ new
    return torch.stack(out, 2).flatten(2, 3)[:, :, :length]


class NoFeedForward(nn.Module):
    """Replaces a block's feed-forward and returns zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
