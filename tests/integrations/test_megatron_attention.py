"""Megatron's own test of parallel attention with a RACE layer: output and gradients on every mesh of the grid equal those of
one rank.

The grid is that of megatron-core's test of parallel attention: tensor, sequence and context parallelism on four ranks,
sequence packing, output gate, query and key layer norms.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from harness import spawn_ranks
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module
from megatron_ranks import layout, own_zigzag
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron import RaceTransformerConfig, get_race_layer_spec
from race_dist.integrations.megatron.weights import gather_full_weights, load_full_weights
from race_dist.parallel import all_reduce_sum

LENGTH, ROWS, WIDTH = 64, 4, 64
GRID = [(4, False, 1), (4, True, 1), (1, False, 4), (2, False, 2), (2, True, 2)]


def attention(tp: int, sp: bool, cp: int, **options: Any) -> nn.Module:
    torch.manual_seed(123)
    config = RaceTransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        race_num_tables=2,
        race_num_planes=3,
        **options,
    )
    layer: nn.Module = build_module(get_race_layer_spec(config).submodules.self_attention, config=config, layer_number=1)
    return layer


def own_part(x: Tensor, sp: bool, packed: bool) -> Tensor:
    """This rank's shard of ``[s, b, h]``: zigzag over context-parallel ranks, then by sequence parallelism."""
    part = own_zigzag(x.transpose(0, 1), parallel_state.get_context_parallel_group())
    part = part.reshape(1, -1, WIDTH) if packed else part
    part = part.transpose(0, 1)
    if sp:
        group = parallel_state.get_tensor_model_parallel_group()
        part = part.chunk(group.size())[group.rank()]
    return part.contiguous()


def step(layer: nn.Module, x: Tensor, weight: Tensor, packed: Any) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input for the loss ``sum(weight * (output + bias))``."""
    x = x.clone().requires_grad_(True)
    out, bias = layer(x, attention_mask=None, packed_seq_params=packed)
    ((out + bias) * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """The full gradient of every parameter, summed over the ranks with different tokens."""
    tp, cp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()

    def read(p: nn.Parameter) -> Tensor:
        assert p.grad is not None
        grad = all_reduce_sum(p.grad, cp)
        return all_reduce_sum(grad, tp) if p in partial else grad

    # the parameters whose gradients finalize_model_grads sums over tensor-parallel ranks
    partial = {p for name, p in layer.named_parameters() if getattr(p, "sequence_parallel", False) or "_layernorm" in name}
    return gather_full_weights(layer, tp, read)


@dataclass(frozen=True)
class Variant:
    """The options of a layer, its meshes, and the tolerance relative to the largest value."""

    name: str
    options: dict[str, Any]
    grid: list[tuple[int, bool, int]]
    tolerance: float = 1e-10


VARIANTS = [
    Variant("defaults", {}, GRID),
    Variant("bare", {"race_output_gate": False, "race_decay": "none", "race_normalization": "global"}, GRID),
    # megatron-core's layer norm from pip has no sequence parallelism, and its gate is always computed in float32
    Variant(
        "megatron's gate, layer norms, fewer groups than ranks",
        {"num_query_groups": 2, "qk_layernorm": True, "attention_output_gate": True, "race_output_gate": False},
        [each for each in GRID if not each[1]],
        1e-5,
    ),
]


def errors(_: ProcessGroup, variants: list[Variant]) -> dict[str, float]:
    """Every error on every mesh in float64, divided by its tolerance."""
    worst: dict[str, float] = {}
    torch.set_default_dtype(torch.float64)  # the layer norms use the default dtype

    def compare(what: str, got: Tensor, expected: Tensor) -> None:
        assert got.isfinite().all(), what
        worst[what] = float((got - expected).abs().max() / expected.abs().max()) / variant.tolerance

    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(LENGTH, ROWS, WIDTH, generator=generator) for _ in range(2))
    bounds = torch.arange(ROWS + 1, dtype=torch.int32) * LENGTH
    thd = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    baselines = {}
    with layout(1, 1):
        for variant in variants:
            layer = attention(1, False, 1, **variant.options)
            weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
            baselines[variant.name] = weights, step(layer, x, weight, None), gradients(layer)
    for tp, cp in sorted({(tp, cp) for tp, _, cp in GRID}):
        with layout(tp, cp):
            for variant, sp, packed in itertools.product(variants, (False, True), (False, True)):
                if (tp, sp, cp) not in variant.grid:
                    continue
                weights, expected, expected_grads = baselines[variant.name]
                layer = attention(tp, sp, cp, **variant.options)
                load_full_weights(layer, weights, parallel_state.get_tensor_model_parallel_group())
                got = step(layer, *(own_part(t, sp, packed) for t in (x, weight)), thd if packed else None)
                name = f"{variant.name}, tp {tp}, sp {sp}, cp {cp}, packed {packed}: "
                compare(name + "output", got[0], own_part(expected[0], sp, packed))
                compare(name + "gradient of the input", got[1], own_part(expected[1], sp, packed))
                for weight_name, grad in gradients(layer).items():
                    compare(f"{name}gradient of {weight_name}", grad, expected_grads[weight_name])
    return worst


def test_parallel_attention_is_that_of_one_rank() -> None:
    for rank in spawn_ranks(4, errors, VARIANTS, timeout=120):
        assert rank.error is None, rank.error
        assert len(rank.value) > 100
        assert not {what: error for what, error in rank.value.items() if not error <= 1}
