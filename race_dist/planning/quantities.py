"""The quantities that plans are made of: linear layers, activation bytes, arithmetic and memory traffic, the tokens of a chunk.

Letters as in docs/notation.md, and in formulas ``a = Hq D`` and ``b = Hkv D`` for the widths of all query and all key heads,
``d`` for the model's width, ``f`` for the feed-forward's.
"""

from __future__ import annotations

from dataclasses import dataclass

from race_dist.models import ModelConfig


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: its sizes, and whether it runs in the parameters' precision under autocast too."""

    inputs: int
    outputs: int
    always_full_precision: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that autograd saves of one block: per token, and independent of the number of tokens."""

    per_token: float
    constant: float = 0.0

    def __add__(self, other: ActivationBytes) -> ActivationBytes:
        return ActivationBytes(self.per_token + other.per_token, self.constant + other.constant)

    def total(self, tokens: int) -> float:
        """Bytes for that many tokens."""
        return self.per_token * tokens + self.constant


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class ChunkShape:
    """What one rank works on at a time.

    Attributes:
        rows: sequences, ``B``.
        tokens: of each row.
        on_cpu: whether the PyTorch backend runs it, and not the Triton kernels.
    """

    rows: int
    tokens: int
    on_cpu: bool


def widths(m: ModelConfig) -> tuple[int, int, int, int]:
    """``d, a, b, f``."""
    return m.dim, m.num_heads * m.resolved_head_dim, m.kv_heads * m.resolved_head_dim, m.resolved_ffn_dim
