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
from race_dist.nn.init import Drawn, initialize
from race_dist.nn.norm import RMSNorm, compute_dtype, rms
from race_dist.nn.rope import rotate
from race_dist.nn.sequence import Sequence
from race_dist.ops.inputs import Normalization
from race_dist.parallel import Layout
from race_dist.sketch import SketchState

SHORTEST_MEMORY, LONGEST_MEMORY = 8.0, 1024.0  # tokens after which a decaying head has forgotten all but 1/e
ENDLESS_MEMORY = 2.0**14  # at the start, of the heads of decay="token" that should remember


def decay_time_constants(heads: int, endless: float = math.inf) -> list[float]:
    """Tokens that each head remembers: spread geometrically, the last quarter of the heads (not an only one)
    ``endless``."""
    if heads == 1:
        return [math.sqrt(SHORTEST_MEMORY * LONGEST_MEMORY)]
    decaying = heads - max(1, heads // 4)
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (1 / max(1, decaying - 1))
    return [SHORTEST_MEMORY * ratio**h for h in range(decaying)] + [endless] * (heads - decaying)


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


class RaceCore(Drawn):
    """RACE Attention on queries, keys and values that somebody else projects: ``out, sketch = core(q, k, v, sketch,
    sequence)``. What fits where another model's layer has its inner attention.

    Its parameters, each where the config asks for it: ``q_scale``, ``k_scale``, ``log_beta``, ``planes``, ``out_norm``.

    Args:
        config: with num_heads, and head_dim or dim, set. ``short_conv``, ``output_gate`` and the rates of
            ``decay="token"`` belong to :class:`RaceAttention`; a core that decays per token is told the rates.
        layer: index of the layer: layers draw different hyperplanes.
        init_weights: whether to fill the parameters now, from ``config.seed`` and the layer's index.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_heads or the width of a head is not set.
    """

    planes: Tensor
    beta: Tensor | None
    log_decay: Tensor | None

    def __init__(
        self,
        config: RaceConfig,
        layer: int = 0,
        *,
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
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim, self.rope_base = config.resolved_head_dim, config.resolved_rope_base()
        where = checks.factory_kwargs(device, dtype)
        self.out_norm = (
            RMSNorm(self.num_heads, self.head_dim, eps=config.norm_eps, **where) if config.normalization == "none" else None
        )
        self._build_hash(where)
        if init_weights:
            initialize(self, config.seed, f"race.{layer}")

    def _build_hash(self, where: dict[str, Any]) -> None:
        config, kv_heads = self.config, self.num_kv_heads
        parameter = lambda *shape: nn.Parameter(torch.empty(shape, **where))
        self.q_scale = parameter(self.num_heads, 1) if config.qk_norm else None
        self.k_scale = parameter(kv_heads, 1) if config.qk_norm else None
        self.log_beta = parameter(kv_heads) if config.train_beta else None
        if config.train_planes:
            shape = (config.num_tables, config.num_planes, self.head_dim)
            self.planes = parameter(*shape) if config.share_planes else parameter(kv_heads, *shape)
        self._like = torch.empty(0, **where)  # follows the module: constants are made in its place and width
        for name, value in self._constants().items():
            self.register_buffer(name, value, persistent=False)

    def _betas(self) -> Tensor:
        return torch.tensor(self.config.beta_init, dtype=torch.float64).expand(self.num_kv_heads).clone()

    def _draw_planes(self, **where: Any) -> Tensor:
        config = self.config
        return sample_planes(
            config.num_tables,
            config.num_planes,
            self.head_dim,
            seed=config.seed,
            layer=self.layer,
            num_heads=None if config.share_planes else self.num_kv_heads,
            **where,
        )

    def _constants(self) -> dict[str, Tensor]:
        """What the config alone says: never rounded to a narrow dtype, never in a checkpoint."""
        where: dict[str, Any] = {"device": self._like.device, "dtype": compute_dtype(self._like)}
        constants = {}
        if not self.config.train_planes:
            constants["planes"] = self._draw_planes(**where)
        if not self.config.train_beta:
            constants["beta"] = self._betas().to(**where)
        if self.config.decay == "multiscale":
            constants["log_decay"] = torch.tensor(
                [-1 / n for n in decay_time_constants(self.num_kv_heads)], dtype=torch.float64
            ).to(**where)
        return constants

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to(...)`` and its kin move the constants but do not round them: they are made anew from the config."""
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        self._buffers.update(self._constants())
        return self

    def reset_constants(self, like: Tensor) -> None:
        """Make the constants anew on the device of ``like`` (a parameter that something other than ``.to`` has put
        there: a loader that assigns weights)."""
        self._like = like.detach().new_empty(0)
        self._buffers.update(self._constants())

    def initial(self) -> dict[str, float | Tensor]:
        values: dict[str, float | Tensor] = {}
        if self.config.qk_norm:
            values |= {"q_scale": torch.ones(()), "k_scale": torch.ones(())}
        if self.config.train_beta:
            values["log_beta"] = self._betas().log()
        if self.config.train_planes:
            values["planes"] = self._draw_planes()
        return values

    def zero_sketch(
        self, batch: int, *, device: torch.device | str | None = None, state_dtype: torch.dtype = torch.float32
    ) -> SketchState:
        """The sketch of no tokens. Token-by-token decoding wants float64: a float32 mass that is fed single tokens stops
        growing at 2**24."""
        return SketchState.empty(
            batch,
            self.num_kv_heads,
            self.config.num_features,
            self.head_dim,
            dtype=state_dtype,
            device=device,
            decay=self.config.decay != "none",
        )

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
            q: ``[B, T, Hq, D]``: this rank's rows; any strides.
            k, v: ``[B, T, Hkv, D]``.
            sketch: what came before, or None at a beginning.
            sequence: where the rows stand; None: one document on one rank, at positions 0 to T - 1.
            log_decay: ``[B, T, Hkv]``, at most 0: the rates of ``decay="token"``.

        Returns:
            ``out [B, T, Hq, D]`` in the dtype of v, and the outgoing sketch (None unless ``sequence.return_carry``).

        Raises:
            ValueError: a shape does not fit, or rates are missing or not wanted.
        """
        if (log_decay is not None) != (self.config.decay == "token"):
            raise ValueError(f'RaceConfig.decay is {self.config.decay!r}: log_decay is given with decay="token" only')
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.tensor(name, x, dtypes=checks.DTYPES, dim=4)
        if sketch is not None:
            checks.instance("sketch", sketch, SketchState)
        if sequence is not None:
            checks.instance("sequence", sequence, Sequence, "make it with Sequence.of(T, ...)")
        sequence = sequence or Sequence.alone(q, sketch, self.rope_base)
        q, k = self._place(q, self.q_scale, sequence), self._place(k, self.k_scale, sequence)
        rates = log_decay if log_decay is not None else self.log_decay if self.config.decay == "multiscale" else None
        q, k = q.to(v.dtype), k.to(v.dtype)
        out, state = attend(self.config, q, k, v, self.planes, self._beta(v), rates, sketch, sequence)
        return out if self.out_norm is None else self.out_norm(out), state

    def _place(self, x: Tensor, scale: Tensor | None, sequence: Sequence) -> Tensor:
        """Unit length times a learned scale, then the rotary position, in the compute dtype. ``[B, T, H, D]``."""
        if scale is not None:
            x = apply_qk_norm(x, scale, self.config.norm_eps)
        if self.rope_base is not None:
            x = rotate(x, *sequence.rotation(self.head_dim, self.rope_base, compute_dtype(x)))
        return x

    def _beta(self, x: Tensor) -> Tensor:
        """``[Hkv]``."""
        if self.log_beta is not None:
            return self.log_beta.to(compute_dtype(x)).exp()
        assert self.beta is not None
        return self.beta


def apply_qk_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Each query or key ``[B, T, H, D]`` at its head's learned length ``scale [H, 1]``, in the compute dtype."""
    return rms(x, eps) * (scale.to(compute_dtype(x)) * x.shape[-1] ** -0.5)


def attend(
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
    """The attention of a layer's heads over a piece of a sequence: output, and the outgoing sketch where it is wanted."""
    documents = sequence.num_documents
    options: AttentionOptions = {
        "causal": config.causal,
        "normalization": config.normalization,
        "backend": config.backend,
        "cu_seqlens": sequence.cu_seqlens,
        "key_mask": sequence.key_mask,
        "log_decay": log_decay,
        "initial_state": None if sketch is None else _first_row_of(sketch, documents),
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
    if documents > 1:
        state = state[-1:]
        state = SketchState.unchecked(state.mass, state.values, torch.full_like(state.mass[..., 0], -math.inf))
    return out, state


def _first_row_of(sketch: SketchState, documents: int) -> SketchState:
    """One row a document: the first continues ``sketch``, the others begin with nothing."""
    if documents <= 1:
        return sketch
    rows = (torch.cat([t, t.new_zeros(documents - 1, *t.shape[1:])]) for t in sketch.tensors())
    return sketch.with_tensors(tuple(rows))
