"""RACE layers under tensor parallelism: the heads of one rank, and how their parameters are marked and checkpointed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.megatron.config import RaceTransformerConfig
from race_dist.nn.head_partition import HeadAxis, HeadPartition, HeadRange
from race_dist.parallel import group_rank, group_size


@dataclass(frozen=True)
class TensorParallelHeads(HeadPartition):
    """The heads of a RACE layer that one tensor-parallel rank computes.

    Query heads are divided over the ranks, and so are key/value heads if there are at least as many as ranks. Otherwise each
    key/value head serves several neighbouring ranks, and its parameters are replicated on every rank. The gradients of
    replicated parameters are summed over the ranks in the backward pass, because each rank sees its own query heads only.

    Attributes:
        group: the tensor-parallel ranks; None for one rank.
    """

    group: ProcessGroup | None = None

    @classmethod
    def of(cls, config: RaceTransformerConfig, group: ProcessGroup | None) -> TensorParallelHeads:
        """The heads of this rank of the tensor-parallel group."""
        rank, size = group_rank(group), group_size(group)
        heads, kv_heads = int(config.num_attention_heads), config.race_query_groups
        return cls(
            query=HeadRange(rank * heads // size, heads // size, heads),
            key_value=HeadRange(rank * kv_heads // size, max(1, kv_heads // size), kv_heads),
            kv_replicated=kv_heads < size,
            group=group,
        )

    def is_sharded(self, axis: HeadAxis) -> bool:
        """Whether each rank stores its part of a parameter, instead of all of it."""
        return axis.heads == "query" or (axis.heads == "key_value" and not self.kv_replicated)

    def read(self, parameter: Tensor, axis: HeadAxis) -> Tensor:
        """This rank's heads of a stored parameter. The gradients of a replicated one are summed over the ranks."""
        return super().read(parameter if self.is_sharded(axis) else self.sum_gradients(parameter), axis)

    def sum_gradients(self, x: Tensor) -> Tensor:
        """``x``, which is the same on every tensor-parallel rank, with its gradient summed over the ranks."""
        result: Tensor = copy_to_tensor_model_parallel_region(x, group=self.group)
        return result

    def mark(self, parameters: Mapping[str, nn.Parameter], axes: Mapping[str, HeadAxis]) -> dict[str, int]:
        """Set Megatron's tensor-parallel attributes on sharded parameters; return the sharded dimension by name."""
        sharded = {name: axis.dim for name, axis in axes.items() if self.is_sharded(axis)}
        for name, dim in sharded.items():
            set_tensor_model_parallel_attributes(parameters[name], True, dim, 1)
        return sharded


class HeadModule(MegatronModule):  # type: ignore[misc]
    """A module of a RACE layer whose parameters are sharded by head.

    Attributes:
        heads: the heads of this rank.
        sharded_dims: by name in the state dict, the dimension in which a parameter is sharded; other parameters are replicated.
    """

    def __init__(self, config: RaceTransformerConfig, tp_group: ProcessGroup | None) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.heads = TensorParallelHeads.of(config, tp_group)
        self.sharded_dims: dict[str, int] = {}

    def factory_kwargs(self) -> dict[str, Any]:
        """Device and dtype of new parameters, as the config says."""
        current: Any = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        device = torch.device("cuda", current) if isinstance(current, int) else torch.device(current)
        return {"device": device, "dtype": self.config.params_dtype}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The state for megatron.core.dist_checkpointing, sharded by head: any tensor-parallel size can load it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.sharded_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return result
