"""What the Megatron tests run on each rank: a tiny GPTModel over some layout, its loss and its whole gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from race_dist import RaceConfig
from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.integrations.megatron.model import build_gpt, transformer_config
from race_dist.integrations.megatron.weights import from_megatron, load_weights, to_megatron, whole_weights
from race_dist.models import DecoderLM, ModelConfig
from race_dist.parallel import all_reduce_sum, shard_positions, shard_sequence

VOCAB, LENGTH, ROWS = 32, 48, 4


def model_config(**race: Any) -> ModelConfig:
    """Tiny, with everything on; ``race_`` options as keywords, others with a leading underscore."""
    own = {name[1:]: race.pop(name) for name in list(race) if name.startswith("_")}
    defaults: dict[str, Any] = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
                                "ffn_dim": 48, "loss_chunk": 64}
    return ModelConfig(**(defaults | own), race=RaceConfig(**({"num_tables": 2, "num_planes": 3} | race)))


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets ``[ROWS, LENGTH]``, the same everywhere; some targets do not count."""
    rows = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = rows[:, 1:].clone()
    labels[1, 5:11] = -100
    return rows[:, :-1].clone(), labels


@dataclass
class Outcome:
    """What one layout computed: the mean loss and every gradient, whole and under DecoderLM's names, in numpy."""

    loss: float
    grads: dict[str, Any] = field(default_factory=dict)


def native(config: ModelConfig) -> Outcome:
    """The reference: DecoderLM in float64 on one rank."""
    model = DecoderLM(config, dtype=torch.float64)
    with torch.no_grad():  # as far from the start as float32 weights can say
        for p, q in zip(model.parameters(), weights(config).values(), strict=True):
            p.copy_(q)
    loss = model(*batch())
    loss.backward()
    return Outcome(float(loss), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Initial weights, with what starts at a constant moved off it, and an embedding of unit size: a small one before a
    norm makes large gradients, and their last digits large too."""
    state = {name: p.detach().clone() for name, p in DecoderLM(config).named_parameters()}
    state["embed.weight"] *= 50
    generator = torch.Generator().manual_seed(2)
    for name, p in state.items():
        if "norm" in name or "scale" in name or "beta" in name or "bias" in name:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return state


@contextmanager
def layout(tp: int, cp: int) -> Iterator[None]:
    """All ranks of the job as tp x cp x dp."""
    with without_cuda():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp,
                                                 create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def build(config: ModelConfig, **more: Any) -> GPTModel:
    tp, cp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    model = build_gpt(config, transformer_config(config, tp=tp, cp=cp, **more), LENGTH)
    load_weights(model, to_megatron(weights(config), config), parallel_state.get_tensor_model_parallel_group())
    return model


def own_part(x: Tensor, order: str) -> Tensor:
    """This rank's rows and its shard of the sequence."""
    dp, place = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return shard_sequence(x.chunk(dp)[place], parallel_state.get_context_parallel_group(), dim=1, layout=order).contiguous()


def run(config: ModelConfig, order: str = "zigzag", *, packed: Any = None, **more: Any) -> Outcome:
    """One step's loss and gradients through Megatron's DistributedDataParallel."""
    model = build(config, race_layout=order, **more)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.zero_grad_buffer()
    ids, labels = (own_part(x, order) for x in batch())
    count = int((batch()[1] != -100).sum())
    cp = parallel_state.get_context_parallel_group()
    positions = shard_positions(ids.shape[1], cp, layout=order).expand(*ids.shape)
    keep = labels != -100
    if packed is not None:
        ids, labels, keep, positions = packed.flatten(ids, labels, keep, positions)
    losses = model(ids, positions, None, labels=labels.clamp(min=0), packed_seq_params=packed and packed.params)
    loss = (losses * keep).sum() / count
    loss.backward()
    finalize_model_grads([model])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    grads = whole_weights(model.module, parallel_state.get_tensor_model_parallel_group(), lambda p: p.main_grad)
    grads = from_megatron(grads, config, dict.fromkeys(weights(config)))
    return Outcome(float(all_reduce_sum(loss, group)), {name: g.numpy() for name, g in grads.items()})
