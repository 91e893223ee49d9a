"""The RACE layer: projections, short convolution, rates of decay, the core, gate and output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.calls import check_layer_call, check_zero_carry
from race_dist.nn.config import RaceConfig
from race_dist.nn.conv import ShortConv
from race_dist.nn.convolve import apply_short_convs
from race_dist.nn.core import ENDLESS_MEMORY, RaceCore, decay_time_constants
from race_dist.nn.gate import apply_output_gate
from race_dist.nn.init import Linear, initialize
from race_dist.nn.norm import compute_dtype
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail import TailCarry
from race_dist.sketch import SketchState


@dataclass(frozen=True)
class RaceCarry:
    """What a RACE layer carries: the sketch, and the tail of its short convolution (None without one)."""

    sketch: SketchState
    tail: TailCarry | None = None

    def zero(self) -> Self:
        """The carry of no tokens, shaped like this one."""
        return type(self)(self.sketch.zero(), None if self.tail is None else self.tail.zero())

    def combine(self, later: Self) -> Self:
        """The carry of this piece followed by ``later``."""
        checks.instance("later", later, RaceCarry)
        tail = None if self.tail is None or later.tail is None else self.tail.combine(later.tail)
        return type(self)(self.sketch.combine(later.sketch), tail)

    def tensors(self) -> tuple[Tensor, ...]:
        """The sketch's tensors, then the tail's."""
        return (*self.sketch.tensors(), *(() if self.tail is None else self.tail.tensors()))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        """A carry made of ``tensors``, in the order of :meth:`tensors`."""
        split = len(self.sketch.tensors())
        tail = None if self.tail is None else self.tail.with_tensors(tuple(tensors[split:]))
        return type(self)(self.sketch.with_tensors(tuple(tensors[:split])), tail)


pytree.register_pytree_node(
    RaceCarry,
    lambda c: ([c.sketch, c.tail], None),
    lambda leaves, _: RaceCarry(*leaves),
    serialized_type_name="race_dist.RaceCarry",
)


class RaceAttention(RaceCore):
    """RACE Attention as a layer: ``y, carry = layer(x, carry, sequence)``.

    Args:
        config: with dim and num_heads set.
        layer: index of the layer: layers draw different hyperplanes.
        output_gain: of the initial weight of the output projection.
        init_weights: whether to fill the weights now, from ``config.seed`` and the layer's index; False leaves that to the
            caller.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim or num_heads are not set.
    """

    def __init__(
        self,
        config: RaceConfig,
        layer: int = 0,
        *,
        output_gain: float = 1.0,
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.instance("config", config, RaceConfig)
        checks.number("output_gain", output_gain, minimum=0)
        checks.flag("init_weights", init_weights)
        if config.dim is None or config.num_heads is None:
            raise ValueError("RaceAttention needs RaceConfig.dim and num_heads: give both (a ModelConfig fills them in)")
        super().__init__(config, layer, init_weights=False, device=device, dtype=dtype)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_projections(config.dim, output_gain, where)
        width, kv_width, taps = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.short_conv
        self.gate_proj = Linear(config.dim, width, **where) if config.output_gate else None
        self.q_conv, self.k_conv = (ShortConv(n, taps, **where) if taps else None for n in (width, kv_width))
        self.v_conv = ShortConv(kv_width, taps, **where) if config.conv_values else None
        self.decay_proj = Linear(config.dim, self.num_kv_heads, **where) if config.decay == "token" else None
        self.decay_bias = nn.Parameter(torch.empty(self.num_kv_heads, **where)) if config.decay == "token" else None
        if init_weights:
            initialize(self, config.seed, f"race.{layer}")

    def _build_projections(self, dim: int, output_gain: float, where: dict[str, Any]) -> None:
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj, self.k_proj = Linear(dim, width, **where), Linear(dim, kv_width, **where)
        self.v_proj = Linear(dim, kv_width, **where)
        self.o_proj = Linear(width, dim, gain=output_gain, **where)

    def initial(self) -> dict[str, float | Tensor]:
        values = super().initial()
        if self.config.decay == "token":
            memory = torch.tensor(decay_time_constants(self.num_kv_heads, ENDLESS_MEMORY), dtype=torch.float64)
            values["decay_bias"] = (1 / memory).expm1().log()  # softplus of it is the rate of forgetting
        return values

    def zero_carry(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
    ) -> RaceCarry:
        """The carry of no tokens.

        Args:
            batch: rows.
            device: of the carry.
            dtype: of the convolution's tail.
            state_dtype: of the sketch; None: float32, or float64 if ``dtype`` is. Token-by-token decoding wants
                float64: a float32 mass that is fed single tokens stops growing at 2**24.
        """
        batch = check_zero_carry(batch, device, dtype, state_dtype)
        state_dtype = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        sketch = self.zero_sketch(batch, device=device, state_dtype=state_dtype)
        if not self.config.short_conv:
            return RaceCarry(sketch)
        convolved = (self.num_heads, self.num_kv_heads, *([self.num_kv_heads] if self.config.conv_values else []))
        inputs = tuple(torch.zeros(batch, 0, heads * self.head_dim, device=device, dtype=dtype) for heads in convolved)
        return RaceCarry(sketch, TailCarry.empty(inputs, self.config.short_conv - 1))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        carry: RaceCarry | None = None,
        sequence: Sequence | None = None,
    ) -> tuple[Tensor, RaceCarry | None]:
        """One piece of a sequence.

        Args:
            x: ``[B, T, dim]``: this rank's rows.
            carry: what came before, or None at a beginning.
            sequence: where the rows stand; None: one document on one rank, at positions 0 to T - 1.

        Returns:
            ``y [B, T, dim]`` and the outgoing carry (None unless ``sequence.return_carry``).
        """
        check_layer_call(self, x, carry, sequence, dim=self.config.dim or 0, like=self._like, kind=RaceCarry)
        sequence = sequence or Sequence.alone(x, carry, self.rope_base)
        x = sequence.real(x)
        (q, k, v), tail = apply_short_convs(
            self.project(x), (self.q_conv, self.k_conv, self.v_conv), None if carry is None else carry.tail, sequence
        )
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        out, sketch = super().forward(q, k, v, None if carry is None else carry.sketch, sequence, log_decay=self._decay(x))
        y = out.flatten(2)
        if self.gate_proj is not None:
            y = apply_output_gate(y, self.gate_proj(x), self.config.gate_activation)
        return self.output(y), None if sketch is None else RaceCarry(sketch, tail)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, Hq * D]``, keys and values ``[B, T, Hkv * D]`` of ``x [B, T, dim]``."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def output(self, y: Tensor) -> Tensor:
        """``[B, T, dim]`` of the heads' outputs ``[B, T, Hq * D]``."""
        return self.o_proj(y)

    def _decay(self, x: Tensor) -> Tensor | None:
        """``[B, T, Hkv]``, or None where the input does not set the rates."""
        if self.decay_proj is None or self.decay_bias is None:
            return None
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):  # a bfloat16 rate is off by half a percent, every token
            return -F.softplus(F.linear(x.to(dtype), self.decay_proj.weight.to(dtype), self.decay_bias.to(dtype)))
