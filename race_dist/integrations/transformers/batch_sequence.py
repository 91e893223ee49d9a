"""The Sequence of a transformers batch: padding, packed documents, positions, and the ranks that share the sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.nn import Sequence


@dataclass(frozen=True)
class BatchSequence:
    """A batch ``[B, T]`` in the form that RACE layers process.

    Attributes:
        sequence: the Sequence of the rows; if ``folded``, of one long row.
        batch: ``B``.
        folded: whether the rows of the batch are concatenated into one row of packed documents.
    """

    sequence: Sequence
    batch: int
    folded: bool = False

    def fold(self, x: Tensor) -> Tensor:
        """``x [B, T, ...]`` in the shape of ``sequence``: unchanged, or ``[1, B * T, ...]`` if folded."""
        return x.reshape(1, -1, *x.shape[2:]) if self.folded else x

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""
        return x.reshape(self.batch, -1, *x.shape[2:]) if self.folded else x


@dataclass(frozen=True)
class CachedTokens:
    """The tokens that a cache has seen before a call.

    Attributes:
        count: their number, padding included.
        position: the number of those that are not padding, an int or ``[B]``; None: it is counted in the attention mask, or is
            ``count`` without a mask.
    """

    count: int = 0
    position: Tensor | int | None = None


def batch_sequence(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cached: CachedTokens = CachedTokens(),
    return_carry: bool = False,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
) -> BatchSequence:
    """The BatchSequence of a call of a transformers model.

    As in transformers, positions that restart mean packed documents only if there is no mask and no cache. Padding is absent:
    without ``position_ids``, positions count the tokens that are not padding.

    Args:
        batch, length: ``B`` and ``T`` of the new tokens on this rank.
        device: of the new tokens.
        attention_mask: ``[B, cached + T]``, 0 where a token is padding.
        position_ids: ``[B, T]`` or ``[1, T]``.
        cu_seqlens: ``[N + 1]`` boundaries of documents packed in one row (of the whole sequence, under a group).
        cached: the tokens that a cache has seen.
        return_carry: whether the carry after the rows is needed.
        group, layout: the ranks that each hold a shard of the rows, and the order of the shards.

    Raises:
        ValueError: the mask is not a padding mask, or packed rows cannot be processed in this call.
    """
    past = cached.count
    mask = None if attention_mask is None else _key_mask(attention_mask, batch, past, length)
    position = _next_position(cached, attention_mask, batch, device)
    if cu_seqlens is not None and (batch > 1 or past or mask is not None):
        raise ValueError(
            f"cu_seq_lens need one row, no cache and no attention_mask; got a batch of {batch}, {past} cached "
            f"tokens and {'a' if mask is not None else 'no'} mask: pack the documents into one row"
        )
    if position_ids is not None:
        position_ids = _text_positions(position_ids, batch, device)
    folded = False
    if group is None and cu_seqlens is None and mask is None and position_ids is not None and not past:
        cu_seqlens = packed_boundaries(position_ids)
        folded = cu_seqlens is not None
    if folded and return_carry and batch > 1:
        raise ValueError(f"{batch} packed rows have no single carry to continue from: pass use_cache=False")
    if folded:
        sequence = Sequence.of(batch * length, cu_seqlens=cu_seqlens, return_carry=return_carry, device=device)
    else:
        sequence = Sequence.of(
            length,
            cu_seqlens=cu_seqlens,
            key_mask=mask,
            group=group,
            layout=layout,
            position=position,
            return_carry=return_carry,
            device=device,
        )
    if group is not None and cu_seqlens is None and mask is None and position_ids is not None:
        _check_one_document(position_ids, sequence.positions)
    if position_ids is not None:
        positions = position_ids.reshape(-1) if folded else position_ids[0] if batch == 1 else position_ids
        sequence = replace(sequence, positions=positions)
    return BatchSequence(sequence, batch, folded)


def _next_position(cached: CachedTokens, attention_mask: Tensor | None, batch: int, device: torch.device) -> Tensor | int:
    """The position of the first new token: the number of cached tokens that are not padding.

    Raises:
        ValueError: the mask disagrees with what the cache has seen. (Checked on the CPU, where reading the mask does not wait.)
    """
    past, position = cached.count, cached.position
    if position is None:
        return past if attention_mask is None or not past else attention_mask[:, :past].to(device).ne(0).sum(1)
    if attention_mask is not None and past and attention_mask.device.type == "cpu":
        counted = attention_mask[:, :past].ne(0).sum(1)
        if bool((counted != torch.as_tensor(position)).any()):
            raise ValueError(
                f"attention_mask says that {counted.tolist()} of {past} tokens in the cache are not padding, "
                f"but the RACE layers have seen {torch.as_tensor(position).expand(batch).tolist()}: a state "
                "cannot forget tokens, so mask them in the call in which they are new"
            )
    return position


def _text_positions(position_ids: Tensor, batch: int, device: torch.device) -> Tensor | None:
    """``[B, T]`` int64 positions of text. In M-RoPE positions of images and text, those of text come first, if any."""
    if position_ids.dim() == 3:
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    return position_ids.to(device=device, dtype=torch.int64).expand(batch, -1)


def packed_boundaries(position_ids: Tensor) -> Tensor | None:
    """``[N + 1]`` int64 document boundaries in the concatenated rows, from positions ``[B, T]`` that restart; None if every row
    is one document."""
    starts = _starts(position_ids)
    return boundaries(starts) if bool(starts[:, 1:].any()) else None


def _check_one_document(position_ids: Tensor, positions: Tensor) -> None:
    """Raise ValueError unless the given positions of a shard increase by one, as those of a single document do."""
    ahead = position_ids - positions
    if bool((ahead != ahead[:, :1]).any()):
        raise ValueError(
            "position_ids restart inside a shard: under sequence parallelism packed documents are given by "
            "cu_seq_lens_q of the whole sequence; shard_batch computes it from a whole batch"
        )


def _starts(position_ids: Tensor) -> Tensor:
    """``[B, T]`` bool: whether a document begins at the token; one begins at the start of each row."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.cat([torch.ones_like(begins[:, :1]), begins], 1)


def boundaries(starts: Tensor) -> Tensor:
    """``[N + 1]`` int64 boundaries from the document starts ``[B, T]`` bool."""
    flat = starts.reshape(-1)
    return torch.cat([flat.nonzero()[:, 0], torch.tensor([flat.numel()], device=flat.device)])


def _key_mask(attention_mask: Tensor, batch: int, past: int, length: int) -> Tensor:
    """``[B, T]`` bool of the new tokens."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        kind = f"{attention_mask.dim()}-dimensional" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"RACE layers take a padding mask [batch, length]; got a {kind} attention_mask. It cannot mask single "
            "pairs of tokens: keep such layers softmax, or pack documents by position_ids"
        )
    if tuple(attention_mask.shape) != (batch, past + length):
        raise ValueError(
            f"attention_mask must be [batch, past + new tokens] = {[batch, past + length]} ({past} tokens are in "
            f"the cache, {length} are new); got {list(attention_mask.shape)}"
        )
    return attention_mask[:, past:].ne(0)
