"""Parameters per head under tensor parallelism: which heads a rank has, and which part of a parameter is theirs."""

from __future__ import annotations

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
from race_dist.parallel import group_rank, group_size


@dataclass(frozen=True)
class HeadShare:
    """The heads of one tensor-parallel rank.

    Query heads always divide over the ranks. Key/value heads divide too, or (fewer than ranks) each serves several
    neighbouring ranks, which then hold the same keys and values and different queries.

    Attributes:
        kv_heads: on this rank.
        first_kv_head: global index of the first of them.
        replicated: whether a key/value head serves several ranks.
    """

    kv_heads: int
    first_kv_head: int
    replicated: bool

    @classmethod
    def of(cls, config: RaceTransformerConfig, group: ProcessGroup | None) -> HeadShare:
        """Of this rank of the tensor-parallel group."""
        rank, size = group_rank(group), group_size(group)
        groups = config.race_query_groups
        return cls(max(1, groups // size), rank * groups // size, replicated=groups < size)


class HeadModule(MegatronModule):  # type: ignore[misc]
    """A module with parameters per head.

    Those of query heads, and of key/value heads that divide over the ranks, are tensor-parallel. Those of key/value heads
    that serve several ranks are whole on every rank, and their gradients are summed over the ranks in the backward pass:
    each rank has seen only its own queries.
    """

    def __init__(self, config: RaceTransformerConfig, tp_group: ProcessGroup | None) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.share = HeadShare.of(config, tp_group)
        self._axes: dict[str, int] = {}

    def _where(self) -> dict[str, Any]:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        return {"device": device, "dtype": self.config.params_dtype}

    def add_parameter(self, name: str, full: Tensor, *, dim: int = 0, divided: bool = True) -> None:
        """Register this rank's part of a parameter whose dimension ``dim`` goes over all heads.

        Args:
            name: of the attribute.
            full: the initial values of all heads.
            dim: the dimension of the heads.
            divided: whether it is this rank's part; else it is whole on every rank.
        """
        if divided:
            full = full.chunk(group_size(self.tp_group), dim)[group_rank(self.tp_group)]
        parameter = nn.Parameter(full.to(**self._where()).contiguous())
        if divided:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
            self._axes[name] = dim
        self.register_parameter(name, parameter)

    def add_kv_parameter(self, name: str, full: Tensor, *, dim: int = 0) -> None:
        """:meth:`add_parameter` of key/value heads."""
        self.add_parameter(name, full, dim=dim, divided=not self.share.replicated)

    def of_own_kv_heads(self, name: str, *, dim: int = 0) -> Tensor:
        """The part of such a parameter that belongs to this rank's key/value heads."""
        parameter: Tensor = self.get_parameter(name)
        if not self.share.replicated:
            return parameter
        width = parameter.shape[dim] // self.config.race_query_groups
        return self.summed_over_ranks(parameter).narrow(dim, self.share.first_kv_head * width, width)

    def summed_over_ranks(self, x: Tensor) -> Tensor:
        """``x``, the same on every tensor-parallel rank, whose gradient is the sum over the ranks."""
        result: Tensor = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return result

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For megatron.core.dist_checkpointing: parameters per head are cut by head, so that any size can load them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return result
