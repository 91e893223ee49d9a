"""Language models: a backbone, a head over the vocabulary, and their loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.models.backbone import Backbone
from race_dist.models.config import ModelConfig
from race_dist.models.loss import IGNORE_INDEX, linear_cross_entropy
from race_dist.models.targets import check_masked, check_shifted
from race_dist.nn import Linear
from race_dist.parallel import all_reduce_sum, group_size


def _check_labels(labels: Tensor, like: Tensor) -> None:
    """``like``: input_ids or hidden states."""
    checks.tensor("labels", labels)
    if isinstance(like, Tensor) and (labels.shape != like.shape[:2] or labels.dtype != torch.int64):
        raise ValueError(f"labels must be int64 {list(like.shape[:2])} like input_ids; got {labels.dtype} {list(labels.shape)}")
    if isinstance(like, Tensor) and labels.device != like.device:
        raise ValueError(f"labels is on {labels.device} but input_ids is on {like.device}: move one of them")


def _check_num_targets(num_targets: Tensor | float | None) -> None:
    if num_targets is None or torch.compiler.is_compiling():
        return
    if not isinstance(num_targets, Tensor):
        checks.number("num_targets", num_targets, above=0, maximum=2**53)
        return
    checks.tensor("num_targets", num_targets)
    if num_targets.numel() != 1 or num_targets.dtype not in (*checks.INTEGERS, *checks.DTYPES):
        raise ValueError(f"num_targets must be a number or a tensor of one number; got {checks.short_repr(num_targets)}")
    if checks.readable(num_targets):
        checks.number("num_targets", num_targets.item(), above=0)


class LanguageModel(Backbone):
    """A backbone and a linear head over the vocabulary, tied to the embedding with ``config.tie_embeddings``."""

    def __init__(
        self, config: ModelConfig, *, causal: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, causal=causal, device=device, dtype=dtype)
        self.causal = causal
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, device=device, dtype=dtype)
        self.initialize()

    @property
    def head_weight(self) -> Tensor:
        """``[vocab, dim]``."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, h: Tensor) -> Tensor:
        """``[..., vocab]`` of hidden states ``[..., dim]``, at least float32."""
        logits = torch.nn.functional.linear(h, self.head_weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(
        self, h: Tensor, labels: Tensor, *, num_targets: Tensor | float | None = None, group: ProcessGroup | None = None
    ) -> Tensor:
        """This rank's summed cross-entropy over the global count of targets.

        Args:
            h: ``[B, T, dim]`` from :meth:`hidden`.
            labels: ``[B, T]`` int64, the target of each position; -100 is ignored.
            num_targets: targets that count, over all ranks; None: those of ``labels``, summed over ``group``.
            group: the ranks that share the sequence.

        Returns:
            A scalar; 0 (with gradients 0) where no target counts.
        """
        _check_labels(labels, h)
        if num_targets is None:
            num_targets = all_reduce_sum((labels != IGNORE_INDEX).sum(), group)
        total = linear_cross_entropy(h.flatten(0, 1), self.head_weight, labels.flatten(), chunk=self.config.loss_chunk)
        count = torch.as_tensor(num_targets, device=total.device)
        return total / torch.where(count > 0, count, 1)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        key_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
        num_targets: Tensor | float | None = None,
    ) -> Tensor:
        """Logits ``[B, T, vocab]``, or the mean loss when labels are given.

        Args:
            input_ids: ``[B, T]`` int: this rank's tokens.
            labels: ``[B, T]`` int64: ``labels[t]`` is the target of position t (nothing is shifted inside); -100 is ignored.
                Of a causal model: ``torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)``.
            cu_seqlens: ``[N + 1]`` int, documents packed in the whole sequence (B = 1).
            key_mask: ``[B, T]`` bool, False for padding, which may stand anywhere. A False token is absent: its label does not
                count, and its logits are 0. Under a group either every rank gives a mask or none does.
            group: the ranks that each hold a shard of the sequence. Each rank's loss is its share: the losses add up.
            layout: order of the shards, "contiguous" or "zigzag".
            num_targets: the divisor of the summed loss, above 0; None: the number of labels that count, over the group.

        Raises:
            TypeError, ValueError: a class, shape, dtype, token or label does not fit, or the labels equal the input.
        """
        if labels is not None:
            _check_labels(labels, input_ids)
            _check_num_targets(num_targets)
        h, _ = self.hidden(input_ids, cu_seqlens=cu_seqlens, key_mask=key_mask, group=group, layout=layout, return_carry=False)
        if labels is None:
            return self.logits(h)
        if self.causal:  # mask and documents have been validated by now
            check_shifted(input_ids, labels, key_mask=key_mask, layout=layout, cu_seqlens=cu_seqlens, world=group_size(group))
        else:
            check_masked(input_ids, labels)
        if key_mask is not None:
            labels = torch.where(key_mask, labels, IGNORE_INDEX)
        return self.loss(h, labels, num_targets=num_targets, group=group)


class DecoderLM(LanguageModel):
    """A causal language model: ``DecoderLM(ModelConfig(...))``, then ``model(input_ids, labels)``, where ``labels[t]`` is the
    token after position t.

    Initial weights depend only on ``config.seed`` and their names. :meth:`hidden` with a carry runs the model piece by piece.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, causal=True, device=device, dtype=dtype)


class MaskedLM(LanguageModel):
    """A bidirectional encoder that predicts masked tokens; labels are -100 at other positions.

    It needs ``race=RaceConfig(causal=False)`` and layers R and S. ``key_mask`` marks padding, which may stand anywhere.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, causal=False, device=device, dtype=dtype)
