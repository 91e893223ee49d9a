"""The language task: train a model on windows of a text, then measure bits per byte on held-out windows by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.benchmarks.quality.protocol import LanguageTask, Protocol, Run
from race_dist.benchmarks.quality.variants import hidden
from race_dist.models import DecoderLM
from race_dist.nn import Sequence
from race_dist.training.data.batches import check_fits, evaluation_batches, training_batch
from race_dist.training.data.corpus import Corpus, load_corpus


class Language:
    """The text on the device, its windows, and the measurement.

    Args:
        protocol: with a ``language`` table.
        run: its seed draws the windows.
        device: of the text.

    Raises:
        ValueError: the text is too short, is not bytes, or does not exist.
    """

    def __init__(self, protocol: Protocol, run: Run, device: torch.device) -> None:
        assert protocol.language is not None
        self.task: LanguageTask = protocol.language
        self.seed, self.batch_size, self.steps, self.device = run.seed, protocol.batch_size, protocol.steps, device
        self.corpus: Corpus = load_corpus(self.task.path, self.task.pattern)
        if self.corpus.tokenizer is not None:
            raise ValueError(f"language.path: {self.task.path} is packed by a tokenizer; bits per byte here are those of bytes")
        self.train, self.held_out = self.corpus.split(self.task.held_out)
        check_fits(self.train, self.held_out, max(self.task.context, self._eval_context), self.corpus.name)
        self.text = torch.from_numpy(self.train.read(0, len(self.train))).to(device)

    @property
    def _eval_context(self) -> int:
        return self.task.eval_context or self.task.context

    @property
    def context(self) -> int:
        """Tokens of an evaluated sequence."""
        return self._eval_context

    def header(self) -> dict[str, Any]:
        """Facts about the text."""
        passes = self.steps * self.batch_size * self.task.context / len(self.train)
        return {
            "text": self.corpus.name,
            "passes": round(passes, 3),
            "training_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
            "digest": self.corpus.digest(),
        }

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """A step's windows ``[B, T + 1]``, and the number of their targets."""
        size = self.task.context
        batch = training_batch(self.train, seed=self.seed, position=step, batch_size=self.batch_size, context=size)
        starts = torch.tensor(batch.starts, device=self.device)
        windows = self.text[starts[:, None] + torch.arange(size + 1, device=self.device)].long()
        return windows, torch.full((), self.batch_size * size, device=self.device)

    def length(self, batch: tuple[Tensor, ...]) -> int:
        """Tokens that the model reads of each row."""
        return batch[0].shape[1] - 1

    def loss(self, model: DecoderLM, batch: tuple[Tensor, ...], sequence: Sequence) -> Tensor:
        """The mean loss of a batch."""
        windows, targets = batch
        h = hidden(model, windows[:, :-1], sequence)
        return model.loss(h, windows[:, 1:].contiguous(), num_targets=targets)

    @torch.no_grad()
    def measure(self, model: DecoderLM) -> dict[str, Any]:
        """Bits per byte of the held-out text: mean, and by position in the window."""
        size = self._eval_context
        rows = max(1, self.batch_size * self.task.context // size)
        total = torch.zeros(size, dtype=torch.float64, device=self.device)
        count = 0
        for batch in evaluation_batches(self.held_out, tokens=self.task.eval_tokens, batch_size=rows, context=size):
            windows = torch.from_numpy(np.stack([batch.row(n) for n in range(batch.count)]).astype(np.int64)).to(self.device)
            total += bits_by_token(model, windows).sum(0)
            count += batch.count
        by_token = (total / count).cpu()
        parts = [float(part.mean()) for part in by_token.tensor_split(min(self.task.positions, size))]
        return {
            "bits_per_byte": float(by_token.mean()),
            "by_position": [round(p, 4) for p in parts],
            "measured_bytes": count * size,
        }


def bits_by_token(model: DecoderLM, windows: Tensor) -> Tensor:
    """Bits per token ``[B, T]`` (float64) of windows ``[B, T + 1]``."""
    logits = model(windows[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(windows.shape[0], -1).double() / math.log(2)
