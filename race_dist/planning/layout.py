"""The inputs of a plan: a job (model, context, batch, precision) and a layout (mesh, chunks, checkpointing, sharding)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from race_dist.messages import short_repr
from race_dist.models import ModelConfig
from race_dist.nn import LayerKind, kinds_in
from race_dist.planning.clusters import Cluster
from race_dist.planning.quantities import ChunkShape
from race_dist.strict_config import COUNT_LIMIT

Precision = Literal["bfloat16", "float32", "float64"]
Sharding = Literal["none", "fsdp"]
Keep = Literal["device", "host"]
_SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str, low: int = 0) -> int:
    """Parse a number of tokens: ``75M``, ``1B``, ``131072``, ``128K`` (thousands, not powers of two).

    Raises:
        ValueError: it is not a whole number from ``low`` to ``COUNT_LIMIT``.
    """
    match = re.fullmatch(
        r"([0-9]{1,40}(?:_[0-9]{1,40}){0,20}(?:\.[0-9]{1,40})?(?:E[0-9]{1,3})?)([KMB]?)", str(text).strip().upper()
    )
    number = Decimal(match[1].replace("_", "")) * _SCALES[match[2]] if match else Decimal("NaN")
    if number.is_nan() or number != number.to_integral_value():
        raise ValueError(
            f"{short_repr(text)} is not a number of tokens: write for example 131072, 128K, 75M or 1B"
            + (", without commas" if "," in str(text) else "")
        )
    if not low <= number <= COUNT_LIMIT:
        raise ValueError(f"{short_repr(text)} is not a number of tokens from {low} to {COUNT_LIMIT:,}")
    return int(number)


def growing_carries(model: ModelConfig) -> list[LayerKind]:
    """Kinds of layers in the model whose carry grows with the sequence: they cannot be streamed."""
    return [kind for kind in kinds_in(model.layer_kinds) if not kind.fixed_size_carry]


@dataclass(frozen=True)
class Job:
    """One optimizer step of a causal language model.

    Attributes:
        model: configuration of the model.
        context: tokens per sequence.
        batch: sequences per step, over all ranks.
        precision: "bfloat16" (autocast: weights, gradients and norms stay float32), "float32" or "float64".
        compiled: whether the blocks are compiled (``compile = true`` in a training configuration).

    Raises:
        ValueError: a number is less than 1, the precision is unknown, or a layer is not causal.
    """

    model: ModelConfig
    context: int
    batch: int = 1
    precision: Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.precision not in ("bfloat16", "float32", "float64"):
            raise ValueError(f'precision must be "bfloat16", "float32" or "float64"; got {self.precision!r}')
        for kind in kinds_in(self.model.layer_kinds):
            if kind.is_causal(self.model) is False:
                name = f"model.{kind.options_name}.causal"
                raise ValueError(f"the planner knows causal language models only, but {name} is False: leave it out")

    @classmethod
    def checked(cls, model: ModelConfig, context: int, batch: int, precision: str, *, compiled: bool = False) -> Job:
        """A job from values that are checked here."""
        return cls(model, context, batch, cast(Precision, precision), compiled)

    @property
    def param_bytes(self) -> int:
        """Bytes per number of weights, gradients, norms and the residual stream."""
        return 8 if self.precision == "float64" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes per number of matrix products and the attention."""
        return 2 if self.precision == "bfloat16" else self.param_bytes


@dataclass(frozen=True)
class Layout:
    """How the GPUs share the job.

    Attributes:
        dp: data-parallel size: groups of ranks, each with its share of the batch.
        sp: context-parallel size: ranks per group, each with a shard of every sequence (when streamed: of every chunk).
        chunk_size: tokens of each row whose activations exist at a time on one rank; None: the sequence is not streamed.
        checkpointing: recompute each block in the backward pass.
        sharding: "none" (every rank holds all weights) or "fsdp" (weights and optimizer states are sharded).
        keep: where the carries at chunk starts are stored, "device" or "host".

    Raises:
        ValueError: a number is less than 1, or an option is unknown.
    """

    dp: int
    sp: int
    chunk_size: int | None = None
    checkpointing: bool = False
    sharding: Sharding = "none"
    keep: Keep = "device"

    def __post_init__(self) -> None:
        for name in ("dp", "sp", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.sharding not in ("none", "fsdp"):
            raise ValueError(f'sharding must be "none" or "fsdp"; got {self.sharding!r}')
        if self.keep not in ("device", "host"):
            raise ValueError(f'keep must be "device" or "host"; got {self.keep!r}')

    @property
    def ranks(self) -> int:
        """GPUs in use."""
        return self.dp * self.sp

    def check(self, job: Job, cluster: Cluster) -> None:
        """Raise ValueError where the layout does not fit the job or the cluster."""
        if self.ranks != cluster.count:
            raise ValueError(
                f"dp = {self.dp} times sp = {self.sp} makes {self.ranks} ranks, but the cluster has "
                f"{cluster.count} GPUs: change --dp, --sp or --gpus"
            )
        if job.batch % self.dp:
            raise ValueError(f"batch = {job.batch} does not divide over dp = {self.dp} groups of ranks: change one of them")
        if job.context < self.sp:
            raise ValueError(f"context = {job.context} is shorter than sp = {self.sp} ranks: lower --sp")
        for kind in growing_carries(job.model)[:1] if self.chunk_size is not None else ():
            raise ValueError(
                f"a {kind.name.replace(' ', '-')} layer cannot be streamed: its carry is {kind.carry_text}; take the "
                f"{kind.letter} out of layer_pattern = {job.model.layer_pattern!r} or plan without --chunk-size"
            )

    def rows(self, job: Job) -> int:
        """Sequences per rank, ``B``."""
        return job.batch // self.dp

    def shard(self, job: Job) -> int:
        """Tokens of each sequence on one rank."""
        return -(-job.context // self.sp)

    def chunk(self, job: Job) -> int:
        """Tokens of each row whose activations exist at a time on one rank."""
        return self.shard(job) if self.chunk_size is None else min(self.chunk_size, self.shard(job))

    def chunks(self, job: Job) -> int:
        """Chunks of a sequence."""
        return math.ceil(self.shard(job) / self.chunk(job))

    def chunk_shape(self, job: Job, cluster: Cluster) -> ChunkShape:
        """What one rank works on at a time."""
        return ChunkShape(self.rows(job), self.chunk(job), cluster.on_cpu)
