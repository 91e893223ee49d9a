"""Sequence classification on a bidirectional encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.collectives import differentiable_sum_of_others
from race_dist.models.backbone import Backbone, check_ids
from race_dist.models.config import ModelConfig
from race_dist.nn import Linear
from race_dist.nn.norm import compute_dtype
from race_dist.parallel import group_size


class SequenceClassifier(Backbone):
    """A bidirectional encoder with a linear classifier on its mean hidden state.

    Args:
        config: of the encoder, with ``race=RaceConfig(causal=False)`` and layers R and S.
        num_classes: at least 2.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if checks.integer("num_classes", num_classes, maximum=2**31 - 1) < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}")
        super().__init__(config, causal=False, device=device, dtype=dtype)
        self.classify = Linear(config.dim, num_classes, device=device, dtype=dtype)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        group: ProcessGroup | None = None,
        layout: str = "contiguous",
    ) -> Tensor:
        """Logits ``[B, classes]``, or the mean loss when ``labels [B]`` are given.

        Under a group every rank returns the logits of the whole sequence, and an equal share of the loss: losses and gradients
        add up over the ranks.

        Args:
            input_ids: ``[B, T]`` int: this rank's tokens.
            labels: ``[B]`` int64, the same on every rank.
            key_mask: ``[B, T]`` bool, False for padding, which may stand anywhere: a False token is absent.
            group, layout: as for a language model.
        """
        if labels is not None:
            checks.tensor("labels", labels)
        h, _ = self.hidden(input_ids, key_mask=key_mask, group=group, layout=layout, return_carry=False)
        h = h.to(compute_dtype(h))
        weight = torch.ones(h.shape[:2], dtype=h.dtype, device=h.device) if key_mask is None else key_mask.to(h.dtype)
        total, count = (h * weight[..., None]).sum(1), weight.sum(1, keepdim=True)
        world = group_size(group)
        if group is not None and world > 1:
            others = differentiable_sum_of_others((total, count), group)
            total, count = total + others[0], count + others[1]
        logits = self.classify(total / count.clamp(min=1))
        logits = logits.to(compute_dtype(logits))
        if labels is None:
            return logits
        if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [B] = {list(logits.shape[:1])}; got {labels.dtype} {list(labels.shape)}")
        check_ids("labels", labels, logits.shape[1], "num_classes")
        return F.cross_entropy(logits, labels) / world
