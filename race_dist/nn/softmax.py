"""Softmax attention through PyTorch's own kernels: projections, positions, convolutions and gate of its layers."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from race_dist import checks
from race_dist.nn.config import SoftmaxConfig
from race_dist.nn.initialization import Linear, initialize
from race_dist.nn.mixing_layer import MixingLayer
from race_dist.nn.norm import compute_dtype
from race_dist.nn.output_gate import apply_output_gate
from race_dist.nn.registry import ModelShape
from race_dist.nn.rope import rotate
from race_dist.nn.sequence import Sequence
from race_dist.nn.short_conv import ConvolvedCarry, ShortConv, apply_short_convs
from race_dist.nn.tail_carry import TailCarry

MAX_WIDTH = 2**31 - 1


class SoftmaxOptions(TypedDict, total=False):
    """Keyword options of :class:`SoftmaxAttention`."""

    head_dim: int | None
    rope_base: float | None
    config: SoftmaxConfig
    output_gain: float
    init_weights: bool
    seed: int
    device: torch.device | str | None
    dtype: torch.dtype | None


class SoftmaxAttention(MixingLayer):
    """The base class of :class:`WindowAttention` and :class:`FullAttention`, which define the tokens that a token sees.

    Args:
        dim: width of input and output.
        num_heads, num_kv_heads: query heads, and key/value heads that divide them.
        head_dim: width ``D`` of a head; None: ``dim // num_heads``.
        rope_base: base of the rotary positions, or None.
        config: convolution and gate.
        output_gain: of the initial weight of the output projection.
        init_weights: whether to fill the weights now, from ``seed``; False leaves that to the caller.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        config: SoftmaxConfig | None = None,
        output_gain: float = 1.0,
        init_weights: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, num_heads = (
            checks.integer("dim", dim, minimum=1, maximum=MAX_WIDTH),
            checks.integer("num_heads", num_heads, minimum=1),
        )
        num_kv_heads = checks.integer("num_kv_heads", num_kv_heads, minimum=1)
        head_dim = None if head_dim is None else checks.integer("head_dim", head_dim, minimum=1, maximum=MAX_WIDTH)
        rope_base = None if rope_base is None else checks.number("rope_base", rope_base, above=1)
        checks.number("output_gain", output_gain, minimum=0)
        checks.flag("init_weights", init_weights)
        checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
        checks.factory_kwargs(device, dtype)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim = {dim} is no multiple of num_heads = {num_heads}: change one or set head_dim")
        if rope_base is not None and (head_dim or dim // num_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head_dim; got {head_dim or dim // num_heads}: change it or set rope_base=None"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.rope_base = rope_base
        self.config = (
            SoftmaxConfig()
            if config is None
            else checks.instance("config", config, SoftmaxConfig, "make it with SoftmaxConfig(...)")
        )
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = Linear(dim, width, device=device, dtype=dtype)
        self.k_proj = Linear(dim, kv_width, device=device, dtype=dtype)
        self.v_proj = Linear(dim, kv_width, device=device, dtype=dtype)
        self.o_proj = Linear(width, dim, gain=output_gain, device=device, dtype=dtype)
        taps = self.config.short_conv
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_proj = Linear(dim, width, **where) if self.config.output_gate else None
        self.q_conv, self.k_conv = (ShortConv(n, taps, **where) if taps else None for n in (width, kv_width))
        self.v_conv = ShortConv(kv_width, taps, **where) if self.config.conv_values else None
        if init_weights:
            initialize(self, seed, type(self).__name__)

    def heads(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, Hq, D]``, keys and values ``[B, T, Hkv, D]``, convolution and positions applied."""
        return self._heads(sequence.mask_padding(x), None, sequence)[0]

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """``[B, T, dim]`` of the heads' outputs ``[B, T, Hq, D]`` and the layer's input."""
        y = out.flatten(2)
        if self.gate_proj is not None:
            y = apply_output_gate(y, self.gate_proj(x), self.config.gate_activation)
        return self.o_proj(y)

    def _split_carry(self, carry: Any) -> tuple[Any, TailCarry | None]:
        """A carry as the attention's own carry and the convolutions' tail."""
        return (carry, None) if carry is None or not self.config.short_conv else (carry.inner, carry.tail)

    def _join_carry(self, inner: Any, tail: TailCarry | None) -> Any:
        """The inverse of :meth:`_split_carry`."""
        return inner if inner is None or tail is None else ConvolvedCarry(inner, tail)

    def _zero_tail(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> TailCarry | None:
        """The convolutions' tail of no tokens; None without convolutions."""
        if not self.config.short_conv:
            return None
        convolved = (self.num_heads, self.num_kv_heads, *([self.num_kv_heads] if self.config.conv_values else []))
        inputs = tuple(torch.zeros(batch, 0, heads * self.head_dim, device=device, dtype=dtype) for heads in convolved)
        return TailCarry.empty(inputs, self.config.short_conv - 1)

    def _heads(
        self, x: Tensor, tail: TailCarry | None, sequence: Sequence
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TailCarry | None]:
        """:meth:`heads` of a piece that continues ``tail``, and the outgoing tail."""
        flat, tail = apply_short_convs(
            (self.q_proj(x), self.k_proj(x), self.v_proj(x)), (self.q_conv, self.k_conv, self.v_conv), tail, sequence
        )
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in flat)
        if self.rope_base is not None:
            cos, sin = sequence.rotation(self.head_dim, self.rope_base, compute_dtype(x))
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return (q, k, v), tail


def softmax_options(model: ModelShape) -> SoftmaxOptions:
    """The options of a model's softmax layers."""
    return {"head_dim": model.head_dim, "rope_base": model.rope_base, "config": model.softmax}
