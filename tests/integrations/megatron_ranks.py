"""Helpers of the Megatron tests on each rank: a tiny GPTModel on a tp x cp x dp mesh, its loss and its full gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import RaceConfig
from race_dist.integrations.megatron.cpu import without_cuda
from race_dist.integrations.megatron.model import build_gpt, transformer_config
from race_dist.integrations.megatron.weights import from_megatron, gather_full_weights, load_full_weights, to_megatron
from race_dist.models import DecoderLM, ModelConfig
from race_dist.parallel import all_reduce_sum, shard_sequence

VOCAB, LENGTH, ROWS = 32, 48, 4


def model_config(**race: Any) -> ModelConfig:
    """A tiny model with every feature. Keywords are options of RaceConfig; those of ModelConfig have a leading underscore."""
    own = {name[1:]: race.pop(name) for name in list(race) if name.startswith("_")}
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 48,
        "loss_chunk": 64,
    }
    return ModelConfig(**(defaults | own), race=RaceConfig(**({"num_tables": 2, "num_planes": 3} | race)))


def batch(real: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and targets ``[ROWS, LENGTH]``, the same on all ranks. Some targets, and those past ``real``, are ignored."""
    rows = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = rows[:, 1:].clone()
    labels[1, 5:11] = -100
    for row, length in enumerate(real or ()):
        labels[row, length:] = -100
    return rows[:, :-1].clone(), labels


@dataclass
class Outcome:
    """The results on one mesh: the mean loss, and every full gradient by DecoderLM's names, as numpy arrays."""

    loss: float
    grads: dict[str, Any] = field(default_factory=dict)


def native(config: ModelConfig, real: Sequence[int] | None = None) -> Outcome:
    """The reference result: DecoderLM in float64 on one rank."""
    model = DecoderLM(config, dtype=torch.float64)
    with torch.no_grad():  # the perturbed float32 weights, in float64
        for p, q in zip(model.parameters(), weights(config).values(), strict=True):
            p.copy_(q)
    loss = model(*batch(real))
    loss.backward()
    return Outcome(float(loss), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """Initial weights, with constant initial values perturbed, and an embedding of unit size: a small embedding before a norm
    makes large gradients with large rounding errors."""
    state = {name: p.detach().clone() for name, p in DecoderLM(config).named_parameters()}
    state["embed.weight"] *= 50
    generator = torch.Generator().manual_seed(2)
    for name, p in state.items():
        if "norm" in name or "scale" in name or "beta" in name or "bias" in name:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return state


@contextmanager
def layout(tp: int, cp: int) -> Iterator[None]:
    """Use all ranks of the job as a tp x cp x dp mesh."""
    with without_cuda():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, context_parallel_size=cp, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def build(config: ModelConfig, **more: Any) -> GPTModel:
    tp, cp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    model = build_gpt(config, transformer_config(config, tp=tp, cp=cp, **more), LENGTH)
    load_full_weights(model, to_megatron(weights(config), config), parallel_state.get_tensor_model_parallel_group())
    return model


@dataclass(frozen=True)
class Packed:
    """Rows passed as packed documents (THD); of each the first ``real`` tokens are real and the rest is padding.

    With ``dynamic`` ranks the context-parallel groups are those of packed_seq_params, not the job's.
    """

    real: tuple[int, ...] = (LENGTH,) * ROWS
    dynamic: int = 0

    def params(self, rows: slice, group: ProcessGroup | None) -> PackedSeqParams:
        real = torch.tensor(self.real[rows])
        cu = torch.cat([real.new_zeros(1), real.cumsum(0)]).int()
        padded = torch.arange(len(real) + 1, dtype=torch.int32) * LENGTH
        padding = {} if set(self.real) == {LENGTH} else {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
        own = {"cp_group": group, "local_cp_size": self.dynamic} if self.dynamic else {}
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH, **padding, **own
        )


def own_zigzag(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's shard of ``[rows, length, ...]``, by Megatron's own function (newer versions have one more argument)."""
    more = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
    part: Tensor = get_batch_on_this_cp_rank({"x": x}, cp_group=group, **more)["x"]
    return part


@dataclass(frozen=True)
class Place:
    """The batch rows of this rank and the group that shares them."""

    rows: slice
    group: ProcessGroup | None

    @classmethod
    def of(cls, dynamic: int = 0) -> Place:
        dp, index = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        group = parallel_state.get_context_parallel_group()
        if dynamic:
            groups = [dist.new_group(list(range(first, first + dynamic))) for first in range(0, dist.get_world_size(), dynamic)]
            dp, index = len(groups), dist.get_rank() // dynamic
            group = groups[index]
        return cls(slice(index * ROWS // dp, (index + 1) * ROWS // dp), group)

    def part(self, x: Tensor, order: str, flat: bool) -> Tensor:
        """This rank's shard of ``[ROWS, LENGTH]``, flat if rows are packed; zigzag by Megatron's own function."""
        if order == "contiguous":
            own = x[self.rows].reshape(1, -1) if flat else x[self.rows]
            return shard_sequence(own, self.group, dim=1).contiguous()
        part = own_zigzag(x[self.rows], self.group)
        return part.reshape(1, -1) if flat else part


def run(config: ModelConfig, order: str = "zigzag", *, packed: Packed | None = None, **more: Any) -> Outcome:
    """The loss and gradients of one step through Megatron's DistributedDataParallel."""
    model = build(config, race_layout=order, **more)
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.zero_grad_buffer()
    place = Place.of(packed.dynamic if packed else 0)
    tokens, labels = batch(packed.real if packed else None)
    count = int((labels != -100).sum())
    ids, labels, positions = (
        place.part(x, order, packed is not None) for x in (tokens, labels, torch.arange(LENGTH).expand(ROWS, -1))
    )
    params = packed and packed.params(place.rows, place.group)
    losses = model(ids, positions, None, labels=labels.clamp(min=0), packed_seq_params=params)
    loss = (losses * (labels != -100)).sum() / count
    loss.backward()
    finalize_model_grads([model])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    grads = gather_full_weights(model.module, parallel_state.get_tensor_model_parallel_group(), lambda p: p.main_grad)
    grads = from_megatron(grads, config, dict.fromkeys(weights(config)))
    return Outcome(float(all_reduce_sum(loss, group)), {name: g.numpy() for name, g in grads.items()})


def losses_of_training(config: ModelConfig, steps: int, *, use_distributed_optimizer: bool) -> list[float]:
    """Mean losses of a number of optimizer steps on the same batch."""
    model = build(config)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=use_distributed_optimizer), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=use_distributed_optimizer),
        [ddp],
        use_gloo_process_groups=False,
    )
    place, (tokens, labels) = Place.of(), batch()
    count = int((labels != -100).sum())
    ids, labels = (place.part(x, "zigzag", False) for x in (tokens, labels))
    means = []
    for _ in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        losses = ddp(ids, torch.zeros_like(ids), None, labels=labels.clamp(min=0))
        loss = (losses * (labels != -100)).sum() / count
        loss.backward()
        finalize_model_grads([ddp])
        optimizer.step()
        means.append(float(all_reduce_sum(loss, parallel_state.get_data_parallel_group(with_context_parallel=True))))
    return means
