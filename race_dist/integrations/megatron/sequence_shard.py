"""The shard of a sequence that one rank holds: context-parallel group, packed documents (THD) and their padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.nn.sequence import Sequence
from race_dist.parallel import Layout, group_rank, group_size, local_segments, shard_offset


@dataclass(frozen=True)
class SequenceShard:
    """The rows of a call in Megatron's terms; :meth:`sequence` translates them for this package's layers.

    Attributes:
        length: number of rows on this rank.
        group: the ranks that share the sequence (context parallelism); None for one rank.
        layout: order of their shards.
        cu_seqlens: ``[N + 1]`` int64 boundaries of packed documents in the whole sequence, padding included; or None.
        key_mask: ``[B, length]`` bool, False where a row is padding; or None.
    """

    length: int
    group: ProcessGroup | None
    layout: Layout
    cu_seqlens: Tensor | None = None
    key_mask: Tensor | None = None

    @classmethod
    def of(cls, length: int, packed: Any, cp_group: ProcessGroup | None, layout: Layout, device: torch.device) -> SequenceShard:
        """The shard of a call with these packed_seq_params (None: one document per batch row).

        Raises:
            ValueError: the packed_seq_params are inconsistent.
        """
        group = _context_parallel_group(packed, cp_group)
        if group_size(group) == 1:
            group, layout = None, "contiguous"
        if packed is None or packed.qkv_format != "thd":
            if packed is not None and packed.cu_seqlens_q is not None:
                raise ValueError(
                    f'packed_seq_params has cu_seqlens_q but qkv_format {packed.qkv_format!r}: packed documents come as "thd"'
                )
            return cls(length, group, layout)
        real, padded = packed.cu_seqlens_q, getattr(packed, "cu_seqlens_q_padded", None)
        if real is None:
            raise ValueError('packed_seq_params has qkv_format "thd" but no cu_seqlens_q: it says where documents begin')
        cu_seqlens = (real if padded is None else padded).to(device=device, dtype=torch.int64)
        lengths = None if padded is None else real.to(device=device, dtype=torch.int64).diff()
        if layout == "zigzag" or group is None:
            cu_seqlens, lengths = _with_padding_document(cu_seqlens, lengths, length * group_size(group))
        mask = None if lengths is None else _mask_of_real_rows(length, group, layout, cu_seqlens, lengths)
        return cls(length, group, layout, cu_seqlens, mask)

    def sequence(self, key_mask: Tensor | None, device: torch.device) -> Sequence:
        """The :class:`Sequence` of these rows with the given key mask."""
        return Sequence.of(
            self.length,
            cu_seqlens=self.cu_seqlens,
            key_mask=key_mask,
            group=self.group,
            layout=self.layout,
            return_carry=False,
            device=device,
        )


def _context_parallel_group(packed: Any, default: ProcessGroup | None) -> ProcessGroup | None:
    """The context-parallel group of the call: packed_seq_params may have its own (dynamic context parallelism)."""
    own, size = getattr(packed, "cp_group", None), getattr(packed, "local_cp_size", None)
    if own is not None:
        if size is not None and size != group_size(own):
            raise ValueError(f"packed_seq_params.local_cp_size is {size}, but its cp_group has {group_size(own)} ranks")
        return own
    if size is not None and size != 1:
        raise ValueError(f"packed_seq_params.local_cp_size is {size} but there is no cp_group: give the group of these ranks")
    return default if size is None else None


def _with_padding_document(cu_seqlens: Tensor, lengths: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
    """Append a document of padding alone for the rows after the last document.

    On the CPU it is appended only if there are such rows. On a device it is always appended, and usually empty: reading the
    last boundary would synchronize and break a CUDA graph.
    """
    if cu_seqlens.device.type == "cpu":
        last = int(cu_seqlens[-1])
        if last > total:
            raise ValueError(f"packed_seq_params: cu_seqlens end at {last}, but there are {total} rows")
        if last == total:
            return cu_seqlens, lengths
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total)])
    return cu_seqlens, None if lengths is None else torch.cat([lengths, lengths.new_zeros(1)])


def _mask_of_real_rows(length: int, group: ProcessGroup | None, layout: Layout, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """``[1, length]``: whether each local row is one of the first ``lengths[document]`` rows of its document."""
    device = cu_seqlens.device
    offset = shard_offset(length, group, device) if layout == "contiguous" else 0
    runs = local_segments(length, group_rank(group), group_size(group), layout=layout, cu_seqlens=cu_seqlens, offset=offset)
    run = torch.searchsorted(runs.cu_seqlens[1:].contiguous(), torch.arange(length, device=device), right=True)
    return (runs.positions(length) < lengths[runs.documents[run]])[None]
