"""What Megatron says about the rows of a call: context-parallel group, packed documents, masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.nn.sequence import Sequence
from race_dist.parallel import Layout, group_rank, group_size, local_segments, shard_offset, shard_rows

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
PADDED = (AttnMaskType.padding, AttnMaskType.padding_causal)


def is_causal(mask_type: AttnMaskType) -> bool:
    """Whether a token reads only what comes before it. ValueError for masks that are neither that nor everything."""
    if mask_type == AttnMaskType.arbitrary or mask_type not in (*CAUSAL, *PADDED, AttnMaskType.no_mask):
        raise ValueError(
            f"attn_mask_type is {mask_type.name}, but a RACE layer keeps one running sum of the tokens before "
            "a token and cannot leave some of them out: use causal, no_mask, padding or padding_causal, and "
            "packed_seq_params (THD) to keep documents apart"
        )
    return mask_type in CAUSAL


@dataclass(frozen=True)
class SequenceShard:
    """Where the rows of a call stand.

    Attributes:
        length: rows on this rank.
        group: the ranks that share the sequence, None for one.
        layout: order of their shards.
        cu_seqlens: ``[N + 1]`` int64 boundaries of packed documents in the whole sequence (those with padding, where
            documents are padded), or None.
        key_mask: ``[B, length]`` bool, False where a row is padding, or None.
    """

    length: int
    group: ProcessGroup | None
    layout: Layout
    cu_seqlens: Tensor | None = None
    key_mask: Tensor | None = None

    @classmethod
    def of(cls, length: int, packed: Any, cp_group: ProcessGroup | None, layout: Layout, device: torch.device) -> SequenceShard:
        """Of a call with these packed_seq_params (None: one document a batch row).

        Raises:
            ValueError: the packing does not make sense.
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
            cu_seqlens, lengths = _with_rest(cu_seqlens, lengths, length * group_size(group))
        mask = None if lengths is None else _real_rows(length, group, layout, cu_seqlens, lengths)
        return cls(length, group, layout, cu_seqlens, mask)

    def sequence(self, key_mask: Tensor | None, device: torch.device) -> Sequence:
        """The same as the project's layers want it, with this mask."""
        return Sequence.of(
            self.length,
            cu_seqlens=self.cu_seqlens,
            key_mask=key_mask,
            group=self.group,
            layout=self.layout,
            return_carry=False,
            device=device,
        )


def _context_parallel_group(packed: Any, usual: ProcessGroup | None) -> ProcessGroup | None:
    """The group of the call: packed_seq_params may bring its own (dynamic context parallelism)."""
    own, size = getattr(packed, "cp_group", None), getattr(packed, "local_cp_size", None)
    if own is not None:
        if size is not None and size != group_size(own):
            raise ValueError(f"packed_seq_params.local_cp_size is {size}, but its cp_group has {group_size(own)} ranks")
        return own
    if size is not None and size != 1:
        raise ValueError(f"packed_seq_params.local_cp_size is {size} but there is no cp_group: give the group of these ranks")
    return usual if size is None else None


def _with_rest(cu_seqlens: Tensor, lengths: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
    """Rows after the last document become one more, of padding alone; where that takes no look at a device, only if any.

    On a device it is there always (and usually empty): asking would wait, and break a CUDA graph.
    """
    if cu_seqlens.device.type == "cpu":
        last = int(cu_seqlens[-1])
        if last > total:
            raise ValueError(f"packed_seq_params: cu_seqlens end at {last}, but there are {total} rows")
        if last == total:
            return cu_seqlens, lengths
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total)])
    return cu_seqlens, None if lengths is None else torch.cat([lengths, lengths.new_zeros(1)])


def _real_rows(length: int, group: ProcessGroup | None, layout: Layout, cu_seqlens: Tensor, lengths: Tensor) -> Tensor:
    """``[1, length]``: whether each local row lies in its document's first ``lengths[document]`` rows."""
    device = cu_seqlens.device
    offset = shard_offset(length, group, device) if layout == "contiguous" else 0
    runs = local_segments(length, group_rank(group), group_size(group), layout=layout, cu_seqlens=cu_seqlens, offset=offset)
    run = torch.searchsorted(runs.cu_seqlens[1:].contiguous(), torch.arange(length, device=device), right=True)
    return (runs.positions(length) < lengths[runs.documents[run]])[None]


def padding_mask(attention_mask: Tensor | None, mask_type: AttnMaskType, batch: int, length: int) -> Tensor | None:
    """``[B, T]`` bool, True where a key counts, from Megatron's ``[B, 1, 1, T]`` whose True hides a key.

    A hidden token is absent, as a key and as a query. Raises:
        ValueError: the mask is of another shape, or the layer is told to have none.
    """
    if attention_mask is None or mask_type == AttnMaskType.causal:
        return None
    if mask_type == AttnMaskType.no_mask:
        raise ValueError(
            "attention_mask came with attn_mask_type no_mask, with which a RACE layer reads every token: give "
            "None, or attn_mask_type padding and a mask [B, 1, 1, T] that hides padding"
        )
    if attention_mask.dtype != torch.bool or tuple(attention_mask.shape) != (batch, 1, 1, length):
        raise ValueError(
            f"with attn_mask_type {mask_type.name} a RACE layer takes a bool mask [B, 1, 1, T] = "
            f"{[batch, 1, 1, length]} over this rank's keys; got {attention_mask.dtype} "
            f"{list(attention_mask.shape)}"
        )
    return ~attention_mask.view(batch, length)


def combine_masks(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """True where both say that a token is there."""
    return one if other is None else other if one is None else one & other


def check_causal_mask(attention_mask: Tensor, rows: SequenceShard) -> None:
    """Raise ValueError unless a ``[..., T, total]`` mask, True where a key is hidden, hides exactly what comes later.

    It looks at the values, so that documents that Megatron keeps apart by a mask (--reset-attention-mask) are not joined
    unnoticed.
    """
    total = rows.length * group_size(rows.group)
    device = attention_mask.device
    if attention_mask.dtype != torch.bool or attention_mask.shape[-2:] != (rows.length, total):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}, where a causal layer of "
            f"{total} tokens has bool [..., {rows.length}, {total}], or None"
        )
    if rows.group is not None and rows.layout == "contiguous":
        own = shard_offset(rows.length, rows.group, device) + torch.arange(rows.length, device=device)
    else:
        own = shard_rows(total, group_rank(rows.group), group_size(rows.group), layout=rows.layout, device=device)
    if not bool((attention_mask == (torch.arange(total, device=device) > own[:, None])).all()):
        raise ValueError(
            "attention_mask hides more or less than the tokens that come later, but a RACE layer keeps one "
            "running sum and cannot leave some of the earlier ones out: give None, and keep documents apart by "
            "packed_seq_params (THD) instead of --reset-attention-mask"
        )
