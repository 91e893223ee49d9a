"""Megatron's attention masks for RACE layers: mask types, padding masks, and the check of a causal mask."""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from race_dist.integrations.megatron.sequence_shard import SequenceShard
from race_dist.parallel import group_rank, group_size, shard_offset, shard_rows

CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)
NON_CAUSAL_TYPES = (AttnMaskType.no_mask, AttnMaskType.padding)


def is_causal(mask_type: AttnMaskType) -> bool:
    """Whether each token attends to itself and earlier tokens only.

    Raises:
        ValueError: the mask type is neither causal nor a mask of padding alone.
    """
    if mask_type not in (*CAUSAL_TYPES, *NON_CAUSAL_TYPES):
        raise ValueError(
            f"attn_mask_type is {mask_type.name}, but a RACE layer keeps one running sum of the earlier tokens and cannot "
            "leave some of them out: use causal, no_mask, padding or padding_causal, and packed_seq_params (THD) to separate "
            "documents"
        )
    return mask_type in CAUSAL_TYPES


def padding_mask(attention_mask: Tensor | None, mask_type: AttnMaskType, batch: int, length: int) -> Tensor | None:
    """The key mask ``[B, T]`` bool, False for padding, from Megatron's ``[B, 1, 1, T]``, True for padding.

    A masked token is absent both as a key and as a query.

    Raises:
        ValueError: the mask has another shape, or the mask type says that there is no mask.
    """
    if attention_mask is None or mask_type == AttnMaskType.causal:
        return None
    if mask_type == AttnMaskType.no_mask:
        raise ValueError(
            "attention_mask came with attn_mask_type no_mask, with which a RACE layer reads every token: pass "
            "None, or attn_mask_type padding and a mask [B, 1, 1, T] that hides padding"
        )
    if attention_mask.dtype != torch.bool or tuple(attention_mask.shape) != (batch, 1, 1, length):
        raise ValueError(
            f"with attn_mask_type {mask_type.name} a RACE layer takes a bool mask [B, 1, 1, T] = {[batch, 1, 1, length]} over "
            f"this rank's keys; got {attention_mask.dtype} {list(attention_mask.shape)}"
        )
    return ~attention_mask.view(batch, length)


def combine_masks(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The key mask that is True where both key masks are True; None stands for all True."""
    return a if b is None else b if a is None else a & b


def check_causal_mask(attention_mask: Tensor, shard: SequenceShard) -> None:
    """Raise ValueError unless a mask ``[..., T, total]``, True for hidden keys, hides exactly the later tokens.

    The check reads the values, so that documents that Megatron separates by a mask (--reset-attention-mask) are not joined.
    """
    total = shard.length * group_size(shard.group)
    device = attention_mask.device
    if attention_mask.dtype != torch.bool or attention_mask.shape[-2:] != (shard.length, total):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}, where a causal layer of "
            f"{total} tokens has bool [..., {shard.length}, {total}], or None"
        )
    if shard.group is not None and shard.layout == "contiguous":
        rows = shard_offset(shard.length, shard.group, device) + torch.arange(shard.length, device=device)
    else:
        rows = shard_rows(total, group_rank(shard.group), group_size(shard.group), layout=shard.layout, device=device)
    if not bool((attention_mask == (torch.arange(total, device=device) > rows[:, None])).all()):
        raise ValueError(
            "attention_mask hides more or less than the tokens that come later, but a RACE layer keeps one running sum and "
            "cannot leave some of the earlier tokens out: pass None, and separate documents by packed_seq_params (THD) instead "
            "of --reset-attention-mask"
        )
