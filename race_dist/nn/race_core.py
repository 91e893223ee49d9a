"""The RACE layer without its projections: hash parameters, positions, the attention and the norm of its heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.attention import BackendName, layer_attention
from race_dist.hashing import sample_planes
from race_dist.nn.config import RaceConfig
from race_dist.nn.decay import fixed_log_decay
from race_dist.nn.head_partition import HeadAxis, HeadPartition, HeadRange, HeadSlice
from race_dist.nn.initialization import InitialValue, SeededModule, initialize
from race_dist.nn.norm import RMSNorm, compute_dtype, rms
from race_dist.nn.rope import rotate
from race_dist.nn.sequence import Sequence
from race_dist.nn.short_conv import ShortConv, apply_short_convs
from race_dist.nn.tail_carry import TailCarry
from race_dist.ops.inputs import Normalization
from race_dist.parallel import Layout
from race_dist.sketch import SketchState


class AttentionOptions(TypedDict):
    """Keyword arguments of :func:`layer_attention` that the layer gives."""

    causal: bool
    normalization: Normalization
    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    log_decay: Tensor | None
    initial_state: SketchState | None
    group: ProcessGroup | None
    layout: Layout
    backend: BackendName


QUERY, KEY_VALUE, SHARED = HeadAxis("query"), HeadAxis("key_value"), HeadAxis("shared")
QUERY_CHANNELS, KEY_VALUE_CHANNELS = HeadAxis("query", 1), HeadAxis("key_value", 1)


class RaceCore(SeededModule):
    """RACE Attention on queries, keys and values that are projected elsewhere.

        out, sketch = core(q, k, v, sketch, sequence)

    It fits where another framework's layer has its core attention. Its parameters, each where the config asks for it:
    ``q_scale``, ``k_scale``, ``log_beta``, ``planes``, ``out_norm``, ``q_conv``, ``k_conv``, ``v_conv``.

    Args:
        config: of the whole layer, with num_heads, and head_dim or dim, set. ``output_gate`` and the projection of
            ``decay="token"`` belong to :class:`RaceAttention`; a core with per-token decay is given the log decays.
        layer: index of the layer: layers draw different hyperplanes.
        partition: the heads that this module computes; None: all. Its numbers are those of the whole layer for these heads.
        short_conv: whether to build the convolutions of ``config.short_conv``; :meth:`convolve` applies them.
        init_weights: whether to fill the parameters now, from ``config.seed`` and the layer's index.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_heads or the width of a head is not set.
    """

    planes: Tensor
    beta: Tensor | None
    log_decay: Tensor | None
    q_conv: ShortConv | None
    k_conv: ShortConv | None
    v_conv: ShortConv | None

    def __init__(
        self,
        config: RaceConfig,
        layer: int = 0,
        *,
        partition: HeadPartition | None = None,
        short_conv: bool = False,
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.instance("config", config, RaceConfig)
        layer = checks.integer("layer", layer, minimum=0, maximum=2**63 - 1)
        checks.flag("init_weights", init_weights)
        if config.num_heads is None:
            raise ValueError("RaceConfig.num_heads is not set: give it (a ModelConfig fills it in)")
        self.config, self.layer = config, layer
        self.is_partitioned = partition is not None
        self.partition = partition or HeadPartition.whole(config.num_heads, config.num_kv_heads or config.num_heads)
        self.num_heads, self.num_kv_heads = self.partition.query.count, self.partition.key_value.count
        self.head_dim, self.rope_base = config.resolved_head_dim, config.resolved_rope_base()
        where = checks.factory_kwargs(device, dtype)
        self.out_norm = (
            RMSNorm(self.num_heads, self.head_dim, eps=config.norm_eps, **where) if config.normalization == "none" else None
        )
        self.q_conv, self.k_conv, self.v_conv = None, None, None
        self._build_hash(where)
        if short_conv:
            self._build_short_convs(where)
        if init_weights:
            initialize(self, config.seed, f"race.{layer}")

    # --- parameters and constants ------------------------------------------------------------------------------------------

    def head_axes(self) -> dict[str, HeadAxis]:
        """Which dimension of each parameter goes over heads, by the parameter's name."""
        axes = {
            "q_scale": QUERY,
            "k_scale": KEY_VALUE,
            "log_beta": KEY_VALUE,
            "planes": self._planes_axis,
            "out_norm.weight": QUERY,
            "q_conv.weight": QUERY_CHANNELS,
            "k_conv.weight": KEY_VALUE_CHANNELS,
            "v_conv.weight": KEY_VALUE_CHANNELS,
        }
        names = dict(self.named_parameters())
        return {name: axis for name, axis in axes.items() if name in names}

    @property
    def _planes_axis(self) -> HeadAxis:
        return SHARED if self.config.share_planes else KEY_VALUE

    def _build_hash(self, where: dict[str, Any]) -> None:
        config, heads, kv_heads = self.config, self.partition.query.total, self.partition.key_value.total
        self.q_scale = self._parameter(QUERY, heads, 1, **where) if config.qk_norm else None
        self.k_scale = self._parameter(KEY_VALUE, kv_heads, 1, **where) if config.qk_norm else None
        self.log_beta = self._parameter(KEY_VALUE, kv_heads, **where) if config.train_beta else None
        if config.train_planes:
            planes = (config.num_tables, config.num_planes, self.head_dim)
            full = planes if config.share_planes else (kv_heads, *planes)
            self.planes = self._parameter(self._planes_axis, *full, **where)
        self._like = torch.empty(0, **where)  # follows the module: constants are made on its device, in its compute dtype
        for name, value in self._constants().items():
            self.register_buffer(name, value, persistent=False)

    def _parameter(self, axis: HeadAxis, *full: int, **where: Any) -> nn.Parameter:
        """This module's part of a parameter of shape ``full`` in the whole layer."""
        return nn.Parameter(torch.empty(self.partition.stored_shape(full, axis), **where))

    def _build_short_convs(self, where: dict[str, Any]) -> None:
        config = self.config
        if not config.short_conv:
            return

        def conv(axis: HeadAxis, heads: int) -> ShortConv:
            part = HeadSlice(self.partition, axis) if self.is_partitioned else None
            return ShortConv(heads * self.head_dim, config.short_conv, part=part, **where)

        heads, kv_heads = self.partition.query.total, self.partition.key_value.total
        self.q_conv, self.k_conv = conv(QUERY_CHANNELS, heads), conv(KEY_VALUE_CHANNELS, kv_heads)
        if config.conv_values:
            self.v_conv = conv(KEY_VALUE_CHANNELS, kv_heads)

    def _initial_betas(self) -> Tensor:
        """``[heads of the whole layer]``."""
        return torch.tensor(self.config.beta_init, dtype=torch.float64).expand(self.partition.key_value.total).clone()

    def _sample_planes(self, heads: HeadRange, **where: Any) -> Tensor:
        """The hyperplanes of some key/value heads."""
        config = self.config
        shared = config.share_planes
        return sample_planes(
            config.num_tables,
            config.num_planes,
            self.head_dim,
            seed=config.seed,
            layer=self.layer,
            num_heads=None if shared else heads.count,
            head_offset=0 if shared else heads.first,
            **where,
        )

    def _constants(self) -> dict[str, Tensor]:
        """Buffers that follow from the config: never rounded to a narrow dtype, never in a checkpoint."""
        where: dict[str, Any] = {"device": self._like.device, "dtype": compute_dtype(self._like)}
        own = self.partition.key_value
        constants = {}
        if not self.config.train_planes:
            constants["planes"] = self._sample_planes(own, **where)
        if not self.config.train_beta:
            constants["beta"] = own.narrow(self._initial_betas(), 0).to(**where)
        if self.config.decay == "multiscale":
            constants["log_decay"] = own.narrow(fixed_log_decay(own.total), 0).to(**where)
        return constants

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to(...)`` and its relatives move the constants but do not round them: they are computed again from the config."""
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        self._buffers.update(self._constants())
        return self

    def reset_constants(self, like: Tensor) -> None:
        """Compute the constants again on the device of ``like``: a parameter that was moved without ``.to``, for example by a
        loader that assigns weights."""
        self._like = like.detach().new_empty(0)
        self._buffers.update(self._constants())

    def initial_values(self) -> dict[str, InitialValue]:
        values: dict[str, InitialValue] = {}
        if self.config.qk_norm:
            values |= {"q_scale": torch.ones(()), "k_scale": torch.ones(())}
        if self.config.train_beta:
            values["log_beta"] = self.partition.stored(self._initial_betas().log(), KEY_VALUE)
        if self.config.train_planes:
            total = self.partition.key_value.total
            values["planes"] = self.partition.stored(self._sample_planes(HeadRange(0, total, total)), self._planes_axis)
        return values

    # --- the layer ---------------------------------------------------------------------------------------------------------

    def zero_sketch(
        self, batch: int, *, device: torch.device | str | None = None, state_dtype: torch.dtype = torch.float32
    ) -> SketchState:
        """The sketch of no tokens. Token-by-token decoding needs float64: a float32 mass stops growing at 2**24 tokens."""
        return SketchState.empty(
            batch,
            self.num_kv_heads,
            self.config.num_features,
            self.head_dim,
            dtype=state_dtype,
            device=device,
            decay=self.config.decay != "none",
        )

    def convolve(
        self, q: Tensor, k: Tensor, v: Tensor, tail: TailCarry | None, sequence: Sequence
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TailCarry | None]:
        """Queries, keys and values plus their short convolutions, and the outgoing tail; unchanged without convolutions.

        Args:
            q: ``[B, T, Hq, D]``.
            k, v: ``[B, T, Hkv, D]``.
            tail: the inputs of the convolutions before this piece, or None.
            sequence: the position of the rows in their sequence.
        """
        if self.q_conv is None:
            return (q, k, v), None
        flat = (q.flatten(2), k.flatten(2), v.flatten(2))
        (q, k, v), tail = apply_short_convs(flat, (self.q_conv, self.k_conv, self.v_conv), tail, sequence)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        return (q, k, v), tail

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sketch: SketchState | None = None,
        sequence: Sequence | None = None,
        *,
        log_decay: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """One piece of a sequence.

        Args:
            q: ``[B, T, Hq, D]``: this rank's rows, with any strides.
            k, v: ``[B, T, Hkv, D]``.
            sketch: of the tokens before, or None at the beginning of a sequence.
            sequence: the position of the rows; None: one document on one rank, at positions 0 to T - 1.
            log_decay: ``[B, T, Hkv]``, at most 0: the log decays of ``decay="token"``.

        Returns:
            ``out [B, T, Hq, D]`` in the dtype of v, and the outgoing sketch (None unless ``sequence.return_carry``).

        Raises:
            ValueError: a shape does not fit, or ``log_decay`` is missing or unexpected.
        """
        if (log_decay is not None) != (self.config.decay == "token"):
            raise ValueError(f'RaceConfig.decay is {self.config.decay!r}: log_decay is given with decay="token" only')
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.tensor(name, x, dtypes=checks.DTYPES, dim=4)
        if sketch is not None:
            checks.instance("sketch", sketch, SketchState)
        if sequence is not None:
            checks.instance("sequence", sequence, Sequence, "make it with Sequence.of(T, ...)")
        sequence = sequence or Sequence.of_one_document(q, sketch, self.rope_base)
        q, k = (
            self._norm_and_rotate(q, self.q_scale, QUERY, sequence),
            self._norm_and_rotate(k, self.k_scale, KEY_VALUE, sequence),
        )
        if self.config.decay == "multiscale":
            log_decay = self.log_decay
        q, k = q.to(v.dtype), k.to(v.dtype)
        planes = self._read(self.planes, self._planes_axis) if self.config.train_planes else self.planes
        out, state = _call_attention(self.config, q, k, v, planes, self._beta(v), log_decay, sketch, sequence)
        return out if self.out_norm is None else self.out_norm(out), state

    def _read(self, parameter: Tensor, axis: HeadAxis) -> Tensor:
        """A parameter per head as the forward pass uses it."""
        return self.partition.read(parameter, axis) if self.is_partitioned else parameter

    def _norm_and_rotate(self, x: Tensor, scale: Tensor | None, axis: HeadAxis, sequence: Sequence) -> Tensor:
        """Unit length times a learned scale, then the rotary position, in the compute dtype: ``[B, T, H, D]``."""
        if scale is not None:
            x = apply_qk_norm(x, self._read(scale, axis), self.config.norm_eps)
        if self.rope_base is not None:
            x = rotate(x, *sequence.rotation(self.head_dim, self.rope_base, compute_dtype(x)))
        return x

    def _beta(self, x: Tensor) -> Tensor:
        """``[Hkv]``."""
        if self.log_beta is not None:
            return self._read(self.log_beta, KEY_VALUE).to(compute_dtype(x)).exp()
        assert self.beta is not None
        return self.beta


def apply_qk_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Each query or key ``[B, T, H, D]`` scaled to its head's learned length ``scale [H, 1]``, in the compute dtype."""
    return rms(x, eps) * (scale.to(compute_dtype(x)) * x.shape[-1] ** -0.5)


def _call_attention(
    config: RaceConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    sketch: SketchState | None,
    sequence: Sequence,
) -> tuple[Tensor, SketchState | None]:
    """The attention over a piece of a sequence: the output, and the outgoing sketch where ``sequence.return_carry``."""
    documents = sequence.num_documents
    options: AttentionOptions = {
        "causal": config.causal,
        "normalization": config.normalization,
        "backend": config.backend,
        "cu_seqlens": sequence.cu_seqlens,
        "key_mask": sequence.key_mask,
        "log_decay": log_decay,
        "initial_state": None if sketch is None else _initial_states(sketch, documents),
        "group": sequence.group,
        "layout": sequence.layout,
    }
    # sampled planes are bfloat16 numbers: nothing is rounded, and a kernel projects once instead of twice
    sampled = v.dtype == torch.bfloat16 and not config.train_planes
    planes = planes.to(torch.bfloat16) if sampled else planes
    result = layer_attention(q, k, v, planes, beta, output_final_state=sequence.return_carry, **options)
    if not isinstance(result, tuple):
        return result, None
    out, state = result
    if documents > 1:  # the last document's state; nothing from before the sequence is seen after it
        state = state[-1:]
        state = SketchState.unchecked(state.mass, state.values, torch.full_like(state.mass[..., 0], -math.inf))
    return out, state


def _initial_states(sketch: SketchState, documents: int) -> SketchState:
    """One row per document: the first document continues ``sketch``, the others start empty."""
    if documents <= 1:
        return sketch
    rows = (torch.cat([t, t.new_zeros(documents - 1, *t.shape[1:])]) for t in sketch.tensors())
    return sketch.with_tensors(tuple(rows))
