"""The RACE layer: projections, short convolutions, data-dependent decay, the core, output gate and output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from race_dist import checks
from race_dist.nn.config import RaceConfig
from race_dist.nn.decay import initial_decay_bias, token_log_decay
from race_dist.nn.initialization import InitialValue, Linear, initialize
from race_dist.nn.layer_checks import check_layer_call, check_zero_carry
from race_dist.nn.mixing_layer import LayerCarry, MixingLayer
from race_dist.nn.output_gate import apply_output_gate
from race_dist.nn.race_core import RaceCore
from race_dist.nn.registry import BuildOptions, LayerKind, ModelShape
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail_carry import TailCarry
from race_dist.sketch import SketchState


@dataclass(frozen=True)
class RaceCarry(LayerCarry):
    """The carry of a RACE layer: the sketch, and the tail of its short convolutions (None without them)."""

    sketch: SketchState
    tail: TailCarry | None = None

    def zero(self) -> Self:
        return type(self)(self.sketch.zero(), None if self.tail is None else self.tail.zero())

    def combine(self, later: Self) -> Self:
        checks.instance("later", later, RaceCarry)
        tail = None if self.tail is None or later.tail is None else self.tail.combine(later.tail)
        return type(self)(self.sketch.combine(later.sketch), tail)

    def with_reset(self) -> Self:
        hidden = torch.full_like(self.sketch.mass[..., 0], -torch.inf)
        sketch = SketchState.unchecked(self.sketch.mass, self.sketch.values, hidden)
        return type(self)(sketch, None if self.tail is None else self.tail.with_reset())

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the sketch, then those of the tail."""
        return (*self.sketch.tensors(), *(() if self.tail is None else self.tail.tensors()))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Self:
        split = len(self.sketch.tensors())
        tail = None if self.tail is None else self.tail.with_tensors(tuple(tensors[split:]))
        return type(self)(self.sketch.with_tensors(tuple(tensors[:split])), tail)

    def row_shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Without the sketch's log decay, which packed documents add."""
        mass, values = (tuple(t.shape[1:]) for t in (self.sketch.mass, self.sketch.values))
        return (mass, values, *(() if self.tail is None else self.tail.row_shapes()))

    def additive(self) -> tuple[bool, ...]:
        sketch = (self.sketch.log_decay is None,) * len(self.sketch.tensors())
        return (*sketch, *(() if self.tail is None else self.tail.additive()))


pytree.register_pytree_node(
    RaceCarry,
    lambda c: ([c.sketch, c.tail], None),
    lambda leaves, _: RaceCarry(*leaves),
    serialized_type_name="race_dist.RaceCarry",
)


class RaceAttention(RaceCore, MixingLayer):
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
        self.gate_proj = Linear(config.dim, self.num_heads * self.head_dim, **where) if config.output_gate else None
        self._build_short_convs(where)
        self.decay_proj = Linear(config.dim, self.num_kv_heads, **where) if config.decay == "token" else None
        self.decay_bias = nn.Parameter(torch.empty(self.num_kv_heads, **where)) if config.decay == "token" else None
        if init_weights:
            initialize(self, config.seed, f"race.{layer}")

    def _build_projections(self, dim: int, output_gain: float, where: dict[str, Any]) -> None:
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj, self.k_proj = Linear(dim, width, **where), Linear(dim, kv_width, **where)
        self.v_proj = Linear(dim, kv_width, **where)
        self.o_proj = Linear(width, dim, gain=output_gain, **where)

    def initial_values(self) -> dict[str, InitialValue]:
        values = super().initial_values()
        if self.config.decay == "token":
            values["decay_bias"] = initial_decay_bias(self.num_kv_heads)
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
            state_dtype: of the sketch; None: float32, or float64 if ``dtype`` is float64. Token-by-token decoding needs
                float64: a float32 mass stops growing at 2**24 tokens.
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
            carry: of the tokens before, or None at the beginning of a sequence.
            sequence: the position of the rows; None: one document on one rank, at positions 0 to T - 1.

        Returns:
            ``y [B, T, dim]`` and the outgoing carry (None unless ``sequence.return_carry``).
        """
        check_layer_call(self, x, carry, sequence, dim=self.config.dim or 0, weight=self._like, carry_type=RaceCarry)
        sequence = sequence or Sequence.of_one_document(x, carry, self.rope_base)
        x = sequence.mask_padding(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.project(x))
        (q, k, v), tail = self.convolve(q, k, v, None if carry is None else carry.tail, sequence)
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
        """The log decays ``[B, T, Hkv]``, or None where they do not depend on the input."""
        if self.decay_proj is None or self.decay_bias is None:
            return None
        return token_log_decay(x, self.decay_proj.weight, self.decay_bias)


class RaceKind(LayerKind):
    """R: RACE Attention, with ``ModelConfig.race``."""

    letter = "R"
    name = "RACE"
    options_name = "race"
    direction = "config"

    def options(self, model: ModelShape) -> RaceConfig:
        return model.race

    def why_not_subtracted(self, model: ModelShape, prefix: str = "") -> str | None:
        decay = model.race.decay
        if decay == "none":
            return None
        shown = f'"{decay}"' if prefix else repr(decay)  # as in a config file, or as in Python
        return f'needs {prefix}race.decay = "none", but it is {shown}: a decayed state cannot be recovered by subtraction'

    def build(self, model: ModelShape, layer: int, *, causal: bool, **options: Unpack[BuildOptions]) -> RaceAttention:
        return RaceAttention(model.race, layer, **options)
