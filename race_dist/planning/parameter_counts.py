"""Parameters of a model, counted from its configuration."""

from __future__ import annotations

from race_dist.models import ModelConfig
from race_dist.planning.layer_costs import layer_cost, layer_counts
from race_dist.planning.quantities import LinearShape


def block_linear_layers(m: ModelConfig, kind: str) -> list[LinearShape]:
    """The linear layers of one block: those of the mixing layer, then SwiGLU's (gate, up, down)."""
    d, f = m.dim, m.resolved_ffn_dim
    return [*layer_cost(kind).linear_layers(m), LinearShape(d, f), LinearShape(d, f), LinearShape(f, d)]


def block_parameter_count(m: ModelConfig, kind: str) -> int:
    """Trained numbers of one block: mixing layer, SwiGLU, two norms."""
    return layer_cost(kind).parameter_count(m) + 3 * m.dim * m.resolved_ffn_dim + 2 * m.dim


def parameter_count(m: ModelConfig) -> int:
    """Trained numbers of the model: embedding, blocks, last norm, head."""
    embedding_and_head = m.vocab_size * m.dim * (1 if m.tie_embeddings else 2) + m.dim
    return embedding_and_head + sum(count * block_parameter_count(m, kind) for kind, count in layer_counts(m).items())


def matmul_parameter_count(m: ModelConfig) -> int:
    """Numbers that are multiplied with every token: weights of linear layers and of the head, not the embedding's."""
    blocks = sum(count * layer.weights for kind, count in layer_counts(m).items() for layer in block_linear_layers(m, kind))
    return m.vocab_size * m.dim + blocks
