"""SketchAttention: a replacement for Ulysses' DistributedAttention that exchanges sketches instead of activations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.communication import check_group
from race_dist.integrations.core_options import CORE_DEFAULTS, whole_layer_options
from race_dist.nn import RaceConfig, RaceCore, Sequence
from race_dist.parallel.sharding import check_layout


class SketchAttention(nn.Module):
    """RACE Attention over sharded sequences, with the call signature of ``deepspeed.sequence.layer.DistributedAttention``.

    Each rank passes all heads of its shard of the sequence and gets the output in the same form. The ranks exchange one sketch
    per head. The numbers of heads and tokens need not be divisible by the number of ranks.

    Args:
        config: a config with num_heads and head_dim (and num_kv_heads) set. ``decay="token"``, a convolution and a gate need
            the layer's input, which this module does not get: use RaceAttention for them.
        sequence_process_group: the ranks that share a sequence; None: one rank, until :func:`initialize` sets the group.
        layer: index of the layer: each layer draws its own hyperplanes.
        layout: order of the shards.

    Raises:
        ValueError: the config has an option that needs the layer's input.
    """

    def __init__(
        self,
        config: RaceConfig,
        sequence_process_group: ProcessGroup | None = None,
        *,
        layer: int = 0,
        layout: str = "contiguous",
    ) -> None:
        super().__init__()
        checks.instance("config", config, RaceConfig)
        check_group(sequence_process_group, "sequence_process_group")
        check_layout(layout)
        config = RaceConfig.model_validate(CORE_DEFAULTS | config.model_dump(exclude_unset=True))
        unsupported = whole_layer_options(config)
        if unsupported:
            raise ValueError(
                f"SketchAttention gets queries, keys and values only; {', '.join(unsupported)} needs the layer's "
                "input: leave it out, or use race_dist.RaceAttention in place of the whole layer"
            )
        self.core = RaceCore(config, layer)
        self.group, self.layout = sequence_process_group, layout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int = 0,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            query: ``[B, T, Hq, D]`` with ``batch_dim_idx = 0``, ``[T, B, Hq, D]`` with 1; T is this rank's number of tokens.
            key, value: the same with Hkv heads.
            rotary_pos_emb: must be None: apply rotary positions before the call, each rank at its own positions.
            *args, **kwargs: arguments of a local attention; only None is accepted (no mask other than the causal one).

        Returns:
            The output, in the shape of ``query``.

        Raises:
            ValueError: a rotary table or a mask is passed.
        """
        if rotary_pos_emb is not None:
            raise ValueError(
                "SketchAttention does not apply rotary positions: apply them before the call and pass rotary_pos_emb=None"
            )
        if any(x is not None for x in (*args, *kwargs.values())):
            raise ValueError(
                "SketchAttention takes no mask and no other arguments of a local attention: RACE Attention is "
                "causal by its config"
            )
        if checks.integer("batch_dim_idx", batch_dim_idx) not in (0, 1):
            raise ValueError(f"batch_dim_idx must be 0 or 1; got {checks.short_repr(batch_dim_idx)}")
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.tensor(name, x, dim=4)
        q, k, v = (x.transpose(0, 1) if batch_dim_idx else x for x in (query, key, value))  # [B, T, H, D]
        sequence = Sequence.of(q.shape[1], group=self.group, layout=self.layout, return_carry=False, device=q.device)
        out, _ = self.core(q, k, v, None, sequence)
        return out.transpose(0, 1) if batch_dim_idx else out
