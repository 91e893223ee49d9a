"""The recall task: multi-query associative recall (MQAR), generated as zoology does, on the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.benchmarks.quality.protocol import Pairs, Protocol, RecallTask, Run
from race_dist.benchmarks.quality.variants import hidden
from race_dist.models import DecoderLM
from race_dist.nn import Sequence

TEST_SEED = 2**31  # of the test sequences: the same for every run, and different from every training seed


class Recall:
    """Fresh sequences for training, fixed ones for the measurement.

    Args:
        protocol: with a ``recall`` table.
        run: its seed draws the training sequences.
        device: of the generator; a CPU and a GPU draw different numbers.
    """

    def __init__(self, protocol: Protocol, run: Run, device: torch.device) -> None:
        assert protocol.recall is not None
        self.task: RecallTask = protocol.recall
        self.vocab_size = int(protocol.model.get("vocab_size", 8192))
        self.batch_size, self.device = protocol.batch_size, device
        self.generator = torch.Generator(device).manual_seed(run.seed)
        weights = np.array([kind.weight for kind in self.task.train])
        order = np.random.default_rng(run.seed).choice(len(weights), size=protocol.steps, p=weights / weights.sum())
        self.order = [self.task.train[n] for n in order]

    @property
    def context(self) -> int:
        """Tokens of the longest test sequence."""
        return max(kind.length for kind in self.task.test)

    def header(self) -> dict[str, Any]:
        """Facts about the sequences."""
        return {"vocab_size": self.vocab_size}

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """A step's sequences, the positions of their queries, and the values to recall."""
        return make_batch(self.order[step], self.batch_size, self.vocab_size, self.task.power, self.generator)

    def length(self, batch: tuple[Tensor, ...]) -> int:
        """Tokens that the model reads of each row."""
        return batch[0].shape[1]

    def loss(self, model: DecoderLM, batch: tuple[Tensor, ...], sequence: Sequence) -> Tensor:
        """The mean loss over the queries of a batch."""
        ids, positions, values = batch
        logits = answers(model, hidden(model, ids, sequence), positions)
        return F.cross_entropy(logits.flatten(0, 1).float(), values.flatten())

    @torch.no_grad()
    def measure(self, model: DecoderLM) -> dict[str, Any]:
        """Accuracy of the queries, for each kind of sequence and over all kinds."""
        generator = torch.Generator(self.device).manual_seed(TEST_SEED)
        rows: list[dict[str, Any]] = []
        for kind in self.task.test:
            size = max(1, min(self.task.examples, self.batch_size * 256 // kind.length))
            right = torch.zeros((), dtype=torch.int64, device=self.device)
            done = 0
            while done < self.task.examples:
                count = min(size, self.task.examples - done)
                ids, positions, values = make_batch(kind, count, self.vocab_size, self.task.power, generator)
                h, _ = model.hidden(ids, return_carry=False)
                right += (answers(model, h, positions).argmax(-1) == values).sum()
                done += count
            rows.append({"length": kind.length, "pairs": kind.pairs, "accuracy": round(int(right) / (done * kind.pairs), 4)})
        return {"accuracy": sum(row["accuracy"] for row in rows) / len(rows), "by_kind": rows}


def answers(model: DecoderLM, h: Tensor, positions: Tensor) -> Tensor:
    """``[B, pairs, vocab]``: logits at the queries' positions, from hidden states ``[B, T, dim]``."""
    return model.logits(h.take_along_dim(positions[..., None], 1))


def make_batch(
    kind: Pairs, count: int, vocab_size: int, power: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, the positions of their queries, and the values to recall.

    The first ``2 * pairs`` tokens are keys (from the lower half of the vocabulary, all different) and values (from the upper
    half, all different), alternating. Each key occurs once more, at an even distance drawn from a power law, all at different
    positions; the other tokens are random.

    Returns:
        ``ids [count, length]``, ``positions`` and ``values [count, pairs]``, int64.
    """
    device, half, pairs = generator.device, vocab_size // 2, kind.pairs
    uniform = lambda *shape: torch.rand(*shape, device=device, generator=generator)
    keys = uniform(count, half - 1).topk(pairs, 1).indices + 1
    values = uniform(count, vocab_size - half).topk(pairs, 1).indices + half
    room = (kind.length - 2 * pairs) // 2
    weight = torch.arange(1, room + 1, device=device, dtype=torch.float64) ** (power - 1)
    gumbel = -(-uniform(count, room).double().clamp(min=1e-30).log()).clamp(min=1e-30).log()
    gaps = (weight.log() + math.log(power) + gumbel).topk(pairs, 1).indices  # sampling without replacement, in order
    gaps = gaps.take_along_dim(uniform(count, pairs).argsort(1), 1)  # assigns the distances to keys at random
    ids = torch.randint(vocab_size, (count, kind.length), device=device, generator=generator)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    positions = 2 * pairs + 2 * gaps
    ids.scatter_(1, positions, keys)
    return ids, positions, values
