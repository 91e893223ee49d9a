"""The RACE layer: projections, short convolution, positions, the attention, norm, gate and output projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree

from race_dist.attention import BackendName, race_attention
from race_dist.hashing import sample_planes
from race_dist.nn.config import RaceConfig
from race_dist.nn.conv import ShortConv
from race_dist.nn.init import Drawn, Linear, initialize
from race_dist.nn.norm import RMSNorm, compute_dtype, rms
from race_dist.nn.rope import rotate
from race_dist.nn.sequence import Sequence
from race_dist.nn.tail import Extended, TailCarry, through_tails
from race_dist.ops.problem import Normalization
from race_dist.parallel import Layout
from race_dist.sketch import SketchState

SHORTEST_MEMORY, LONGEST_MEMORY = 8.0, 1024.0  # tokens after which a decaying head has forgotten all but 1/e
ENDLESS_MEMORY = 2.0**14  # at the start, of the heads of decay="token" that should remember


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


pytree.register_pytree_node(RaceCarry, lambda c: ([c.sketch, c.tail], None), lambda leaves, _: RaceCarry(*leaves),
                            serialized_type_name="race_dist.RaceCarry")


def memory_lengths(heads: int, endless: float = math.inf) -> list[float]:
    """Tokens that each head remembers: spread geometrically, the last quarter of the heads (not an only one)
    ``endless``."""
    if heads == 1:
        return [math.sqrt(SHORTEST_MEMORY * LONGEST_MEMORY)]
    decaying = heads - max(1, heads // 4)
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (1 / max(1, decaying - 1))
    return [SHORTEST_MEMORY * ratio**h for h in range(decaying)] + [endless] * (heads - decaying)


class AttentionOptions(TypedDict):
    """Keyword arguments of :func:`race_attention` that the layer gives."""

    causal: bool
    normalization: Normalization
    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    log_decay: Tensor | None
    initial_state: SketchState | None
    group: ProcessGroup | None
    layout: Layout
    backend: BackendName


class RaceAttention(Drawn):
    """RACE Attention as a layer: ``y, carry = layer(x, carry, sequence)``.

    Args:
        config: with dim and num_heads set.
        layer: index of the layer: layers draw different hyperplanes.
        output_gain: of the initial weight of the output projection.
        draw: whether to fill the weights now, from ``config.seed`` and the layer's index; False leaves that to the
            caller.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim or num_heads are not set.
    """

    planes: Tensor
    beta: Tensor | None
    log_decay: Tensor | None

    def __init__(self, config: RaceConfig, layer: int = 0, *, output_gain: float = 1.0, draw: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if config.dim is None or config.num_heads is None:
            raise ValueError("RaceAttention needs RaceConfig.dim and num_heads: give both "
                             "(a ModelConfig fills them in)")
        self.config, self.layer = config, layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim, self.rope_base = config.width, config.resolved_rope_base()
        self._build_projections(config.dim, output_gain, {"device": device, "dtype": dtype})
        self._build_hash(device, dtype)
        if draw:
            initialize(self, config.seed, f"race.{layer}")

    def _build_projections(self, dim: int, output_gain: float, where: dict[str, Any]) -> None:
        config, width, kv_width = self.config, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj, self.k_proj = Linear(dim, width, **where), Linear(dim, kv_width, **where)
        self.v_proj = Linear(dim, kv_width, **where)
        self.o_proj = Linear(width, dim, gain=output_gain, **where)
        self.gate_proj = Linear(dim, width, **where) if config.output_gate else None
        self.q_conv = ShortConv(width, config.short_conv, **where) if config.short_conv else None
        self.k_conv = ShortConv(kv_width, config.short_conv, **where) if config.short_conv else None
        self.out_norm = (RMSNorm(self.num_heads, self.head_dim, eps=config.norm_eps, **where)
                         if config.normalization == "none" else None)
        self.decay_proj = Linear(dim, self.num_kv_heads, **where) if config.decay == "token" else None

    def _build_hash(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        config, kv_heads = self.config, self.num_kv_heads
        parameter = lambda *shape: nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.q_scale = parameter(self.num_heads, 1) if config.qk_norm else None
        self.k_scale = parameter(kv_heads, 1) if config.qk_norm else None
        self.log_beta = parameter(kv_heads) if config.train_beta else None
        self.decay_bias = parameter(kv_heads) if config.decay == "token" else None
        if config.train_planes:
            shape = (config.num_tables, config.num_planes, self.head_dim)
            self.planes = parameter(*shape) if config.share_planes else parameter(kv_heads, *shape)
        constants = self._constants(torch.empty(0, device=device, dtype=dtype))
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def _betas(self) -> Tensor:
        return torch.tensor(self.config.beta_init, dtype=torch.float64).expand(self.num_kv_heads).clone()

    def _draw_planes(self, **where: Any) -> Tensor:
        config = self.config
        return sample_planes(config.num_tables, config.num_planes, self.head_dim, seed=config.seed, layer=self.layer,
                             num_heads=None if config.share_planes else self.num_kv_heads, **where)

    def _constants(self, like: Tensor) -> dict[str, Tensor]:
        """What the config alone says: never rounded to a narrow dtype, never in a checkpoint."""
        where: dict[str, Any] = {"device": like.device, "dtype": compute_dtype(like)}
        constants = {}
        if not self.config.train_planes:
            constants["planes"] = self._draw_planes(**where)
        if not self.config.train_beta:
            constants["beta"] = self._betas().to(**where)
        if self.config.decay == "multiscale":
            constants["log_decay"] = torch.tensor([-1 / n for n in memory_lengths(self.num_kv_heads)],
                                                  dtype=torch.float64).to(**where)
        return constants

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to(...)`` and its kin move the constants but do not round them: they are made anew from the config."""
        super()._apply(fn, recurse)
        for name, value in self._constants(self.q_proj.weight).items():
            self._buffers[name] = value
        return self

    def initial(self) -> dict[str, float | Tensor]:
        values: dict[str, float | Tensor] = {}
        if self.config.qk_norm:
            values |= {"q_scale": torch.ones(()), "k_scale": torch.ones(())}
        if self.config.train_beta:
            values["log_beta"] = self._betas().log()
        if self.config.train_planes:
            values["planes"] = self._draw_planes()
        if self.config.decay == "token":
            memory = torch.tensor(memory_lengths(self.num_kv_heads, ENDLESS_MEMORY), dtype=torch.float64)
            values["decay_bias"] = (1 / memory).expm1().log()  # softplus of it is the rate of forgetting
        return values

    def zero_carry(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
                   state_dtype: torch.dtype | None = None) -> RaceCarry:
        """The carry of no tokens.

        Args:
            batch: rows.
            device: of the carry.
            dtype: of the convolution's tail.
            state_dtype: of the sketch; None: float32, or float64 if ``dtype`` is. Token-by-token decoding wants
                float64: a float32 mass that is fed single tokens stops growing at 2**24.
        """
        state_dtype = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        sketch = SketchState.empty(batch, self.num_kv_heads, self.config.num_features, self.head_dim, dtype=state_dtype,
                                   device=device, decay=self.config.decay != "none")
        if not self.config.short_conv:
            return RaceCarry(sketch)
        inputs = tuple(torch.zeros(batch, 0, heads * self.head_dim, device=device, dtype=dtype)
                       for heads in (self.num_heads, self.num_kv_heads))
        return RaceCarry(sketch, TailCarry.empty(inputs, self.config.short_conv - 1))

    def forward(self, x: Tensor, carry: RaceCarry | None = None,
                sequence: Sequence | None = None) -> tuple[Tensor, RaceCarry | None]:
        """One piece of a sequence.

        Args:
            x: ``[B, T, dim]``: this rank's rows.
            carry: what came before, or None at a beginning.
            sequence: where the rows stand; None: one document on one rank, at positions 0 to T - 1.

        Returns:
            ``y [B, T, dim]`` and the outgoing carry (None unless ``sequence.final``).
        """
        if x.dim() != 3 or x.shape[-1] != self.config.dim:
            raise ValueError(f"RaceAttention takes [B, T, dim = {self.config.dim}]; got {list(x.shape)}")
        if x.dtype != self.q_proj.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"RaceAttention has {self.q_proj.weight.dtype} weights but x is {x.dtype}; convert one of them")
        sequence = sequence or Sequence.alone(x, carry, self.rope_base)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, tail = self._convolve(q, k, None if carry is None else carry.tail, sequence)
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim))
        q, k = self._place(heads(q), self.q_scale, sequence), self._place(heads(k), self.k_scale, sequence)
        out, sketch = self._attend(q.to(v.dtype), k.to(v.dtype), heads(v), x, carry, sequence)
        if self.out_norm is not None:
            out = self.out_norm(out)
        y = out.flatten(2)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.o_proj(y), None if sketch is None else RaceCarry(sketch, tail)

    def _convolve(self, q: Tensor, k: Tensor, tail: TailCarry | None,
                  sequence: Sequence) -> tuple[Tensor, Tensor, TailCarry | None]:
        """Queries and keys, each plus its short convolution over tokens that are not padding."""
        q_conv, k_conv, mask = self.q_conv, self.k_conv, sequence.key_mask
        if q_conv is None or k_conv is None:
            return q, k, None
        real = (q, k) if mask is None else (torch.where(mask[..., None], q, 0), torch.where(mask[..., None], k, 0))

        def taps(piece: Extended) -> tuple[Tensor, Tensor]:
            return q_conv(piece.tensors[0], piece.documents), k_conv(piece.tensors[1], piece.documents)

        (more_q, more_k), tail = through_tails(real, self.config.short_conv - 1, tail, sequence, taps)
        return q + more_q, k + more_k, tail

    def _place(self, x: Tensor, scale: Tensor | None, sequence: Sequence) -> Tensor:
        """Unit length times a learned scale, then the rotary position, in the compute dtype. ``[B, T, H, D]``."""
        dtype = compute_dtype(x)
        if scale is not None:
            x = rms(x, self.config.norm_eps) * (scale.to(dtype) * self.head_dim**-0.5)
        if self.rope_base is not None:
            x = rotate(x, *sequence.rotation(self.head_dim, self.rope_base, dtype))
        return x

    def _beta(self, x: Tensor) -> Tensor:
        """``[Hkv]``."""
        if self.log_beta is not None:
            return self.log_beta.to(compute_dtype(x)).exp()
        assert self.beta is not None
        return self.beta

    def _decay(self, x: Tensor) -> Tensor | None:
        """``[Hkv]``, ``[B, T, Hkv]`` or None."""
        if self.decay_proj is None or self.decay_bias is None:
            return self.log_decay if self.config.decay == "multiscale" else None
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):  # a bfloat16 rate is off by half a percent, every token
            return -F.softplus(F.linear(x.to(dtype), self.decay_proj.weight.to(dtype), self.decay_bias.to(dtype)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, carry: RaceCarry | None,
                sequence: Sequence) -> tuple[Tensor, SketchState | None]:
        config, documents = self.config, sequence.num_documents
        options: AttentionOptions = {
            "causal": config.causal, "normalization": config.normalization, "backend": config.backend,
            "cu_seqlens": sequence.cu_seqlens, "key_mask": sequence.key_mask, "log_decay": self._decay(x),
            "initial_state": None if carry is None else _first_row_of(carry.sketch, documents),
            "group": sequence.group, "layout": sequence.layout}
        # sampled planes are bfloat16 numbers: nothing is rounded, and a kernel projects once instead of twice
        sampled = v.dtype == torch.bfloat16 and not config.train_planes
        planes = self.planes.to(torch.bfloat16) if sampled else self.planes
        if not sequence.final:
            return race_attention(q, k, v, planes, self._beta(x), **options), None
        out, state = race_attention(q, k, v, planes, self._beta(x), output_final_state=True, **options)
        if documents > 1:
            state = state[-1:]
            state = SketchState(state.mass, state.values, torch.full_like(state.mass[..., 0], -math.inf))
        return out, state


def _first_row_of(sketch: SketchState, documents: int) -> SketchState:
    """One row a document: the first continues ``sketch``, the others begin with nothing."""
    if documents <= 1:
        return sketch
    rows = (torch.cat([t, t.new_zeros(documents - 1, *t.shape[1:])]) for t in sketch.tensors())
    return sketch.with_tensors(tuple(rows))
