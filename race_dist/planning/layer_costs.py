"""The cost of one mixing layer by its kind: parameters, activations, arithmetic, memory traffic, carry.

Each letter of ``layer_pattern`` has a :class:`LayerCost`. The package registers those of RACE and softmax layers; another kind
registers its own with :func:`register_layer_cost`, or sets it as ``cost`` of its :class:`race_dist.nn.LayerKind`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from race_dist.models import ModelConfig
from race_dist.nn import layer_kind
from race_dist.planning.layout import Job
from race_dist.planning.quantities import ActivationBytes, ChunkShape, Cost, LinearShape, widths
from race_dist.planning.roofline import Roofline

if TYPE_CHECKING:
    from race_dist.nn import RaceConfig, SoftmaxConfig


class LayerCost(ABC):
    """One kind of mixing layer, as the planner sees it. Activations include the layer's norm."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    @abstractmethod
    def linear_layers(self, m: ModelConfig) -> list[LinearShape]:
        """The linear layers of the mixing layer."""

    @abstractmethod
    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """What autograd saves of the layer without a compiler."""

    @abstractmethod
    def compiled_activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        """What autograd saves of the layer inside a compiled block, beyond the block's input and norms."""

    @abstractmethod
    def elementwise_traffic(self, job: Job) -> tuple[float, float]:
        """Bytes per token that compiled element-wise kernels move between the projections, forward and backward."""

    @abstractmethod
    def head_cost(self, job: Job, chunk: ChunkShape) -> tuple[Cost, Cost]:
        """The attention of one token and query head, forward and backward."""

    @abstractmethod
    def definition_flops(self, m: ModelConfig) -> float:
        """Operations of one token and query head, forward, as the definition counts them (for MFU)."""

    def parameter_count(self, m: ModelConfig) -> int:
        """Trained numbers of the layer."""
        return _built_parameter_count(self.letter, m)

    def head_seconds(self, job: Job, chunk: ChunkShape, roofline: Roofline) -> tuple[float, float]:
        """Seconds of :meth:`head_cost` on a device, forward and backward."""
        forward, backward = self.head_cost(job, chunk)
        return roofline.matmul(forward), roofline.matmul(backward)

    def rope_base(self, m: ModelConfig) -> float | None:
        """Base of the rotary positions, whose cosines and sines layers of one base share; None: no rotary positions."""
        return m.rope_base

    def state_numbers(self, m: ModelConfig) -> int:
        """Numbers of the recurrent state of one row, which the ranks exchange by an exclusive scan; 0: no state but a tail."""
        return 0

    def tail_bytes(self, job: Job) -> int:
        """Bytes of the tail of one row: inputs of convolutions, keys and values of a window."""
        return 0

    def carry_bytes(self, job: Job) -> int:
        """Bytes that a streamed layer passes from chunk to chunk per row. States are float64: sums over the whole sequence."""
        return self.tail_bytes(job) + 8 * self.state_numbers(job.model)

    def backward_temporaries(self, job: Job, chunk: ChunkShape) -> float | None:
        """Bytes of temporaries and gradients at the fullest moment of the layer's backward pass, less the activations that are
        free again by then. None: the start of the block's backward pass needs more."""
        return None


@lru_cache(maxsize=64)
def _built_parameter_count(letter: str, m: ModelConfig) -> int:
    layer = layer_kind(letter).build(m, 0, causal=True, device=torch.device("meta"))
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


_COSTS: dict[str, LayerCost] = {}


def register_layer_cost(cost: LayerCost) -> None:
    """Plan layers of the letter ``cost.letter`` with this cost.

    Raises:
        ValueError: the letter has a cost already.
    """
    if cost.letter in _COSTS:
        raise ValueError(f"layers of kind {cost.letter} have a cost already: {type(_COSTS[cost.letter]).__name__}")
    _COSTS[cost.letter] = cost


def layer_cost(letter: str) -> LayerCost:
    """The cost of a kind of layers.

    Raises:
        ValueError: the kind has none.
    """
    if letter in _COSTS:
        return _COSTS[letter]
    kind = layer_kind(letter)
    if isinstance(kind.cost, LayerCost):
        return kind.cost
    raise ValueError(
        f"the planner has no cost for layers of kind {letter} ({kind.name}): give its LayerKind a cost, or plan a model "
        "without them"
    )


def layer_counts(m: ModelConfig) -> Counter[str]:
    """Layers of each kind, by letter."""
    return Counter(m.layer_kinds)


# --- what kinds of layers have in common ---------------------------------------------------------------------------------


def conv_channels(m: ModelConfig, options: RaceConfig | SoftmaxConfig) -> int:
    """Numbers per token that a layer's short convolutions read: queries, keys, and values where these are convolved."""
    _, a, b, _ = widths(m)
    return 0 if not options.short_conv else a + b + (b if options.conv_values else 0)


def conv_tail_bytes(job: Job, options: RaceConfig | SoftmaxConfig) -> int:
    """Bytes of the convolutions' last inputs of one row."""
    return max(0, options.short_conv - 1) * conv_channels(job.model, options) * job.compute_bytes


def attention_projections(m: ModelConfig, options: RaceConfig | SoftmaxConfig) -> list[LinearShape]:
    """Projections of queries, keys, values and output, and of the output gate."""
    d, a, b, _ = widths(m)
    shapes = [LinearShape(d, a), LinearShape(d, b), LinearShape(d, b), LinearShape(a, d)]
    return [*shapes, LinearShape(d, a)] if options.output_gate else shapes


def norm_activations(job: Job) -> float:
    """An RMS norm saves its input and the scaled input (for the weight's gradient), ``d`` numbers each, and one number per
    token."""
    return (2 * job.model.dim + 1) * job.param_bytes


def linear_input_activations(job: Job, layers: int, *, full_precision: bool) -> float:
    """What linear layers save that read the same norm's output: the output once; under autocast one cast copy per layer, and
    the uncast output only for a layer that runs in full precision."""
    if job.compute_bytes == job.param_bytes:
        return job.model.dim * job.param_bytes
    return job.model.dim * (layers * job.compute_bytes + (job.param_bytes if full_precision else 0))
