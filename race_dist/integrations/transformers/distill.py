"""Losses for distilling a softmax teacher into a converted model: first layer by layer, then on the predictions.

This is the usual recipe for linearizing a softmax model: match the output of each replaced layer on the teacher's hidden states
(mean squared error), then the teacher's predictions (Kullback-Leibler divergence) together with the text (cross-entropy).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from race_dist.integrations.transformers.decoder_hook import attention_module, decoder_of
from race_dist.integrations.transformers.layer import RaceSelfAttention
from race_dist.messages import short_repr

# arguments of the teacher's layer that are passed to the student's layer too
PASSED_ARGUMENTS = ("position_embeddings", "position_ids", "cu_seq_lens_q")


class TeacherCall(NamedTuple):
    """One call of a teacher's attention module: its input, the arguments that the student's layer gets too, its output."""

    x: Tensor
    arguments: dict[str, Any]
    target: Tensor


def layer_loss(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The error of the RACE layers' outputs on the teacher's hidden states, relative to the teacher's outputs.

    It is the mean squared error divided by the mean square of the target, averaged over the layers: 1 for a layer that outputs
    zeros, 0 for a perfect match.

    Args:
        teacher: the model before its conversion; it gets no gradients.
        student: the converted model.
        batch: input_ids ``[B, T]`` and further arguments of the teacher; attention_mask marks padding, which is excluded.

    Raises:
        ValueError: the student has no RACE layer, or the teacher computes NaN or Inf at real tokens (checked on the CPU).
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a converted model; got {type(student).__name__}")
    if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & set(batch):
        raise TypeError(f"batch must be a dictionary with input_ids [B, T]; got {short_repr(batch)}")
    layers = {m.layer_idx: m for m in student.modules() if isinstance(m, RaceSelfAttention)}
    if not layers:
        raise ValueError("the student has no RACE layer to train: convert it first")
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "shift_labels", "num_items_in_batch")}
    with torch.no_grad(), _recorded_calls(teacher, layers) as calls:
        decoder_of(teacher)(**inputs, use_cache=False)
    mask = batch.get("attention_mask")
    losses = []
    for index, (x, arguments, target) in calls.items():
        if mask is not None:  # the teacher's values at padding are arbitrary and may be NaN
            is_real = mask.to(x.device).ne(0)[..., None]
            x, target = torch.where(is_real, x, 0), torch.where(is_real, target, 0)
        if x.device.type == "cpu" and not (x.isfinite().all() and target.isfinite().all()):
            raise ValueError(
                f"the teacher's hidden states at layer {index} hold NaN or Inf at tokens that are not padding:"
                " look for the cause in the teacher (its weights, dtype or attention implementation)"
            )
        out, _ = layers[index](x, attention_mask=mask, **arguments)
        error = out - target if mask is None else torch.where(is_real.to(out.device), out - target, 0)
        losses.append(error.float().square().sum() / target.float().square().sum())
    return torch.stack(losses).mean()


@contextmanager
def _recorded_calls(teacher: nn.Module, wanted: Mapping[int, nn.Module]) -> Iterator[dict[int, TeacherCall]]:
    """Record the calls of the teacher's attention modules whose layer indices are keys of ``wanted``."""
    calls: dict[int, TeacherCall] = {}
    handles = []
    for index, block in enumerate(decoder_of(teacher).layers):  # type: ignore[arg-type]
        attention = attention_module(block)
        if index in wanted and attention is not None:

            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, index: int = index) -> None:
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                passed = {name: kwargs[name] for name in PASSED_ARGUMENTS if kwargs.get(name) is not None}
                calls[index] = TeacherCall(x, passed, out[0])

            handles.append(attention.register_forward_hook(record, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def prediction_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float = 1.0, share: float = 0.5
) -> Tensor:
    """``share * KL(teacher || student) + (1 - share) * cross-entropy``, averaged over the targets that are not ignored.

    Args:
        logits, teacher_logits: ``[B, T, vocab]``.
        targets: ``[B, T]`` int64, the target of each position; -100 is ignored.
        temperature: temperature of both distributions in the divergence, which is scaled by its square.
        share: weight of the divergence, 0 to 1.

    Raises:
        ValueError: temperature or share is out of its range.
    """
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits), ("targets", targets)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    given = (temperature, share)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in given)
    if not numbers or not 0 < temperature < float("inf") or not 0 <= share <= 1:
        raise ValueError(
            f"temperature must be positive and share from 0 to 1; got {short_repr(temperature)} and {short_repr(share)}"
        )
    counts = targets != -100
    ours, theirs = (F.log_softmax(x[counts].float() / temperature, -1) for x in (logits, teacher_logits.detach()))
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2
    return share * divergence + (1 - share) * F.cross_entropy(logits[counts].float(), targets[counts])
