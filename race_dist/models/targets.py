"""Checks for labels that equal the input: a model trained on them learns to copy, and its loss collapses silently."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from race_dist.models.loss import IGNORE_INDEX

SHIFTED = "labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)"
_COMPARED_TOKENS = 2**16  # of a long text


def check_shifted(
    input_ids: Tensor,
    labels: Tensor,
    *,
    key_mask: Tensor | None = None,
    layout: str = "contiguous",
    cu_seqlens: Tensor | None = None,
    world: int = 1,
) -> None:
    """Raise if the labels of a causal model are its input instead of the tokens that follow.

    Labels in the same memory are refused on every device. On the CPU equal values are refused too, unless they are correct (a
    text may repeat one token). On other devices values are not read, because that would wait for the device.

    Args:
        input_ids: ``[B, T]`` int.
        labels: ``[B, T]`` int64, -100 where nothing is predicted.
        key_mask: ``[B, T]`` bool, False for padding, whose labels do not count.
        layout: of the shards: "zigzag" rows are two pieces of the sequence, or two of each document.
        cu_seqlens: ``[N + 1]`` int: the boundaries of documents in the whole sequence, which ``world`` ranks share.

    Raises:
        ValueError: the message contains the correct line of code.
    """
    if _same_memory(input_ids, labels):
        raise ValueError(f"labels are input_ids, so that the model would learn to copy its input; {_shifting_hint()}")
    if torch.compiler.is_compiling() or labels.shape != input_ids.shape or not labels.numel():
        return
    if labels.device.type != "cpu" or input_ids.device.type != "cpu":
        return
    counted = labels != IGNORE_INDEX
    if key_mask is not None and key_mask.device.type == "cpu":
        counted &= key_mask
    if not bool(((labels == input_ids) | ~counted).all()):
        return
    unlike_next = counted[:, :-1] & (labels[:, :-1] != input_ids[:, 1:])
    if key_mask is not None and key_mask.device.type == "cpu":
        unlike_next &= key_mask[:, 1:]
    if layout == "zigzag":  # the token after a piece is on another rank
        unlike_next[:, _last_of_pieces(labels.shape[1], cu_seqlens, world)] = False
    if bool(unlike_next.any()):
        raise ValueError(
            f"labels equal input_ids wherever they count, so that the model would learn to copy its input; {_shifting_hint()}"
        )


def _last_of_pieces(length: int, cu_seqlens: Tensor | None, world: int) -> Tensor:
    """The last row of each piece of a zigzag shard, except the shard's last row."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return torch.tensor([length // 2 - 1])
    ends = (cu_seqlens.diff() // (2 * world)).repeat_interleave(2).cumsum(0)
    return ends[(ends > 0) & (ends < length)] - 1


def warn_unshifted_text(input_ids: Any, labels: Any) -> None:
    """Warn if the labels of a text of any length, a tensor or a NumPy array ``[B, T]``, are its input: in the same memory, or
    on the CPU with the same first tokens. This is no error, because streamed steps are also run to measure time and memory."""
    size = max(2, _COMPARED_TOKENS // max(1, int(input_ids.shape[0])))
    try:
        if _same_memory(input_ids, labels):
            raise ValueError(f"labels are input_ids, so that the model would learn to copy its input; {_shifting_hint()}")
        head = [
            torch.from_numpy(np.asarray(x[:, :size]).astype(np.int64)) if isinstance(x, np.ndarray) else x[:, :size]
            for x in (input_ids, labels)
        ]
        check_shifted(head[0], head[1])
    except ValueError as error:
        warnings.warn(str(error), stacklevel=3)


def check_masked(input_ids: Tensor, labels: Tensor) -> None:
    """Raise if the labels of a bidirectional model are its input. Labels may repeat single input tokens: some of the predicted
    tokens may be left unmasked."""
    if _same_memory(input_ids, labels):
        raise ValueError(
            "labels are input_ids, so that the model would learn to copy its input; labels of a MaskedLM are the "
            "tokens under the masks and -100 elsewhere: labels = torch.where(masked, original_ids, -100)"
        )


def _shifting_hint() -> str:
    return f"labels[t] is the target of position t, nothing is shifted inside the model: write {SHIFTED}"


def _same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays start at the same address of the same device and have the same shape."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.size > 0 and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or torch.compiler.is_compiling():
        return False
    if a.shape != b.shape or not a.numel() or a.device != b.device or a.device.type == "meta":
        return False
    try:
        return a.data_ptr() == b.data_ptr()
    except RuntimeError:  # tensors inside a torch.func transform have no memory of their own
        return False
