"""Convert weights between :class:`race_dist.models.DecoderLM` and Megatron's GPTModel, and shard them over ranks.

Both models compute the same function (tests compare them). A run can therefore start from the same weights in either model,
and DecoderLM can generate text with weights that Megatron has trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron.core_attention import state_dict_name
from race_dist.models import ModelConfig
from race_dist.parallel import all_gather_tensor, group_rank, group_size

_ENDS = {
    "embed.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
_LAYER = {
    "mixer_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "pre_mlp_layernorm.weight",
    "mixer.o_proj.weight": "self_attention.linear_proj.weight",
    "ffn.down_proj.weight": "mlp.linear_fc2.weight",
}
_CORE = (
    "q_scale",
    "k_scale",
    "log_beta",
    "planes",
    "q_conv.weight",
    "k_conv.weight",
    "v_conv.weight",
    "out_norm.weight",
)
_DECAY = {"decay_proj.weight": "weight", "decay_bias": "bias"}


def _renamed(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(DecoderLM's name, Megatron's name) of every weight that is stored in the same form by both."""
    yield from (pair for pair in _ENDS.items() if not (config.tie_embeddings and pair[0] == "head.weight"))
    for i, kind in enumerate(config.layer_kinds):
        own, other = f"blocks.{i}.", f"decoder.layers.{i}."
        yield from ((own + a, other + b) for a, b in _LAYER.items())
        if kind == "R":
            core = f"{other}self_attention.core_attention.core."
            yield from ((f"{own}mixer.{name}", state_dict_name(core + name)) for name in _CORE)
            yield from ((f"{own}mixer.{a}", f"{other}self_attention.decay.{b}") for a, b in _DECAY.items())


def _projections(config: ModelConfig, layer: int, names: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The parts of linear_qkv, in the order within a query group: (DecoderLM's name, rows per group)."""
    width = config.resolved_head_dim
    of_queries = config.num_heads // config.kv_heads * width
    parts = [("q_proj", of_queries), ("gate_proj", of_queries), ("k_proj", width), ("v_proj", width)]
    return [(name, rows) for part, rows in parts if (name := f"blocks.{layer}.mixer.{part}.weight") in names]


def to_megatron(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A DecoderLM's weights, unsharded, under the names of a GPTModel's state dict; :func:`load_full_weights` shards them."""
    result = {other: state[own] for own, other in _renamed(config) if own in state}
    for i in range(config.num_layers):
        groups = [state[name].unflatten(0, (config.kv_heads, rows)) for name, rows in _projections(config, i, state)]
        result[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = torch.cat(groups, 1).flatten(0, 1)
        result[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = torch.cat(
            [state[f"blocks.{i}.ffn.{part}_proj.weight"] for part in ("gate", "up")]
        )
    return result


def from_megatron(state: Mapping[str, Tensor], config: ModelConfig, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of :func:`to_megatron`; the keys of ``names`` are the names of the DecoderLM's weights."""
    result = {own: state[other] for own, other in _renamed(config) if own in names}
    for i in range(config.num_layers):
        parts = _projections(config, i, names)
        qkv = state[f"decoder.layers.{i}.self_attention.linear_qkv.weight"].unflatten(0, (config.kv_heads, -1))
        for (name, _), part in zip(parts, qkv.split([rows for _, rows in parts], 1), strict=True):
            result[name] = part.flatten(0, 1)
        for part, half in zip(("gate", "up"), state[f"decoder.layers.{i}.mlp.linear_fc1.weight"].chunk(2), strict=True):
            result[f"blocks.{i}.ffn.{part}_proj.weight"] = half
    return result


@torch.no_grad()
def load_full_weights(model: nn.Module, full: Mapping[str, Tensor], tp_group: ProcessGroup | None) -> None:
    """Fill a GPTModel that is sharded over tensor-parallel ranks from full weights.

    Args:
        model: filled in place.
        full: every weight, by its name in the state dict or its parameter name.
        tp_group: the tensor-parallel ranks.

    Raises:
        ValueError: a weight of the model is missing, or one is not a weight of the model.
    """
    parameters: dict[str, Any] = {state_dict_name(name): p for name, p in model.named_parameters()}
    values = {state_dict_name(name): value for name, value in full.items()}
    if parameters.keys() != values.keys():
        raise ValueError(
            "the weights do not fit the model: missing are "
            + (", ".join(sorted(parameters.keys() - values.keys())) or "none")
            + "; not the model's are "
            + (", ".join(sorted(values.keys() - parameters.keys())) or "none")
        )
    rank, size = group_rank(tp_group), group_size(tp_group)
    for name, parameter in parameters.items():
        value = values[name]
        if _is_sharded(parameter):
            dim = parameter.partition_dim
            value = torch.cat([part.chunk(size, dim)[rank] for part in _sharded_parts(name, value)], dim)
        parameter.copy_(value)


@torch.no_grad()
def gather_full_weights(
    model: nn.Module, tp_group: ProcessGroup | None, read: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """The full weights of a GPTModel, by their names in the state dict, gathered from the tensor-parallel ranks.

    ``read`` returns what is gathered for each parameter, for example its gradient. A collective: every rank calls it.
    """
    result = {}
    for name, parameter in model.named_parameters():
        value = read(parameter)
        if _is_sharded(parameter) and group_size(tp_group) > 1:
            dim = cast(Any, parameter).partition_dim
            parts = [_sharded_parts(name, part) for part in all_gather_tensor(value, tp_group)]
            value = torch.cat([torch.cat(half, dim) for half in zip(*parts, strict=True)], dim)
        result[state_dict_name(name)] = value
    return result


def _is_sharded(parameter: Any) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _sharded_parts(name: str, value: Tensor) -> tuple[Tensor, ...]:
    """The parts of a weight that are sharded separately: the gate and the linear half of a gated MLP's first projection."""
    return value.chunk(2) if name.endswith("mlp.linear_fc1.weight") else (value,)
