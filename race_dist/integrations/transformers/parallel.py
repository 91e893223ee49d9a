"""Batches for sequence parallelism: shard one batch, shard the batches of a data loader, or train with HF's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import check_group
from race_dist.integrations.transformers.batch_sequence import packed_boundaries
from race_dist.integrations.transformers.decoder_hook import sequence_parallel
from race_dist.messages import short_repr
from race_dist.models.loss import IGNORE_INDEX
from race_dist.parallel import (
    all_gather_tensor,
    broadcast_tensor,
    check_same_on_all_ranks,
    group_rank,
    group_size,
    shard_sequence,
)
from race_dist.parallel.sharding import check_layout


def shard_batch(batch: Mapping[str, Any], group: ProcessGroup | None, *, layout: str = "contiguous") -> dict[str, Any]:
    """This rank's shard of a batch that every rank of ``group`` holds.

    Tensors ``[B, T]`` are sharded along T. The result also has what a shard alone does not contain: ``position_ids``;
    ``shift_labels``, the target of each position; ``num_items_in_batch``, the number of targets of the whole batch, by which
    transformers' causal losses divide; ``cu_seq_lens_q`` of the whole sequence if positions restart inside the row (of one).

        loss = model(**shard_batch(batch, group)).loss       # a share: losses and gradients are summed over the ranks

    Args:
        batch: ``input_ids [B, T]`` and optionally labels (the tokens themselves, as in transformers), attention_mask,
            position_ids.
        group: the ranks that share the sequences; None: one rank.
        layout: "contiguous" or "zigzag".

    Raises:
        ValueError: there are no input_ids, several packed rows, or a length that the layout cannot divide.
    """
    layout = check_layout(layout)
    check_group(group)
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a dictionary with input_ids [B, T]; got {short_repr(batch)}")
    if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].dim() != 2:
        raise ValueError(f"a batch to shard needs input_ids [B, T]; got the keys {', '.join(map(str, batch))}")
    ids = batch["input_ids"]
    rows, length = ids.shape
    whole = dict(batch)
    if whole.get("position_ids") is None:
        mask = whole.get("attention_mask")
        if mask is None:
            whole["position_ids"] = torch.arange(length, device=ids.device)
        else:  # padding is not counted
            whole["position_ids"] = (mask.ne(0).cumsum(-1) - 1).clamp(min=0)
    whole["position_ids"] = whole["position_ids"].expand(rows, -1)
    cu_seqlens = whole.get("cu_seq_lens_q")
    if cu_seqlens is None and whole.get("attention_mask") is None:
        cu_seqlens = packed_boundaries(whole["position_ids"])
    if cu_seqlens is not None:
        if rows > 1 and group_size(group) > 1:
            raise ValueError(f"packed documents that ranks share must be in one row; got {rows} rows: pack them into one")
        whole |= {"cu_seq_lens_q": cu_seqlens} if rows == 1 else {}
    if whole.get("labels") is not None:
        if whole.get("shift_labels") is None:
            whole["shift_labels"] = torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        whole["num_items_in_batch"] = (whole["shift_labels"] != IGNORE_INDEX).sum().clamp(min=1)
    if group_size(group) == 1:
        return whole
    assert group is not None
    is_sharded = lambda x: isinstance(x, Tensor) and x.dim() >= 2 and x.shape[:2] == (rows, length)
    cu = cu_seqlens if layout == "zigzag" else None
    return {
        name: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu).contiguous() if is_sharded(x) else x
        for name, x in whole.items()
    }


class ShardedLoader:
    """A data loader whose batches are each shared by all ranks of a group.

    The loader of every rank gives its own batches, as for data parallelism. All ranks of the group first share the batch of the
    group's first rank, then that of its second rank, and so on, so no token is read twice.

    Args:
        loader: yields dictionaries of tensors ``[B, T]``: as many batches on each rank, with the same keys.
        group, layout: as for :func:`shard_batch`.
    """

    def __init__(self, loader: Iterable[Mapping[str, Any]], group: ProcessGroup, *, layout: str = "contiguous") -> None:
        check_group(group)
        self.loader, self.group, self.layout = loader, group, check_layout(layout)

    def __len__(self) -> int:
        return len(self.loader) * group_size(self.group)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
            facts = {"keys and dtypes": ", ".join(f"{n} {t.dtype} {t.dim()}d" for n, t in sorted(tensors.items()))}
            check_same_on_all_ranks(facts, self.group, what="a batch to share")
            device = batch["input_ids"].device
            sizes = torch.tensor([[*t.shape, *[0] * (4 - t.dim())] for _, t in sorted(tensors.items())], device=device)
            everyone = all_gather_tensor(sizes, self.group).tolist()
            for source, shapes in enumerate(everyone):
                whole = {}
                for (name, own), shape in zip(sorted(tensors.items()), shapes, strict=True):
                    mine = source == group_rank(self.group)
                    like = own if mine else own.new_empty(shape[: own.dim()])
                    whole[name] = broadcast_tensor(like, self.group, source=source)
                yield shard_batch(whole, self.group, layout=self.layout)


def sequence_parallel_trainer(trainer_class: type | None = None) -> Any:
    """A subclass of HF's Trainer (or of ``trainer_class``) for sequence parallelism, with arguments ``group`` and ``layout``.

        mesh = build_mesh(dp, sp)
        trainer = sequence_parallel_trainer()(model, args, group=mesh["sp"].get_group(), train_dataset=...)

    It uses the Trainer's own data parallelism (DDP): the loss is the global mean over all targets for every mesh. A step of the
    trainer is one batch of ``per_device_train_batch_size`` rows per group.
    """
    from transformers import Trainer

    base: Any = trainer_class or Trainer

    class SequenceParallelTrainer(base):
        def __init__(self, *args: Any, group: ProcessGroup, layout: str = "contiguous", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if not self.args.average_tokens_across_devices:
                raise ValueError(
                    "average_tokens_across_devices=False divides each rank's loss by its own number of targets, so that "
                    "the shares do not sum to the batch's loss: leave it True"
                )
            self.group, self.layout = group, layout
            sequence_parallel(self.accelerator.unwrap_model(self.model), group, layout=layout)

        def get_train_dataloader(self) -> Any:
            return ShardedLoader(super().get_train_dataloader(), self.group, layout=self.layout)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return ShardedLoader(super().get_eval_dataloader(eval_dataset), self.group, layout=self.layout)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            """This rank's share of the loss, times the group size: the Trainer averages over the ranks. With
            num_items_in_batch the Trainer scales the loss itself."""
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
            if model.training or num_items_in_batch is not None:
                return result
            loss, *outputs = result if return_outputs else (result,)
            loss = loss * group_size(self.group)
            return (loss, *outputs) if return_outputs else loss

    SequenceParallelTrainer.__name__ = f"SequenceParallel{base.__name__}"
    return SequenceParallelTrainer
