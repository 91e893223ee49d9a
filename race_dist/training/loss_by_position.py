"""The loss by position in the context, which shows what a longer context is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from race_dist.models import DecoderLM, ModelCarry
from race_dist.training.data.batches import Batch, Shard, evaluation_batches
from race_dist.training.data.splits import Split

CHUNK = 8192  # tokens per forward pass
FIRST = 16  # positions in the first bucket; every following bucket ends at twice the position


def bucket_edges(context: int) -> list[int]:
    """0, 16, 32, 64, ... up to ``context``."""
    edges = [0]
    while edges[-1] < context:
        edges.append(min(context, max(FIRST, 2 * edges[-1])))
    return edges


@torch.no_grad()
def loss_by_position(
    model: DecoderLM,
    split: Split,
    *,
    context: int,
    tokens: int,
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on windows of a text, in chunks, on one process.

    Args:
        model: not sharded; its training mode is restored.
        split: the text; the windows are spread evenly over it.
        context: tokens per window.
        tokens: approximate number of tokens to evaluate; at least one window.
        chunk: tokens per forward pass.
        progress: called with the number of tokens after each chunk.

    Returns:
        ``context``, ``tokens`` (number of targets), ``loss`` (mean, in nats), and ``buckets``: for each range of positions
        ``[start, stop)`` the mean ``loss`` and the number of ``targets``.
    """
    training, edges = model.training, bucket_edges(context)
    model.eval()
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    for batch in evaluation_batches(split, tokens=tokens, batch_size=1, context=context):
        _window(model, batch, edges, sums, counts, chunk, progress or (lambda _: None))
    model.train(training)
    buckets = [
        {"start": a, "stop": b, "loss": float(s / n), "targets": int(n)}
        for a, b, s, n in zip(edges, edges[1:], sums, counts)
        if n
    ]
    return {"context": context, "tokens": int(counts.sum()), "loss": float(sums.sum() / counts.sum()), "buckets": buckets}


def _window(
    model: DecoderLM,
    batch: Batch,
    edges: list[int],
    sums: torch.Tensor,
    counts: torch.Tensor,
    chunk: int,
    progress: Callable[[int], None],
) -> None:
    device = model.embed.weight.device
    carry: ModelCarry | None = model.zero_carry(1, state_dtype=torch.float64)
    boundaries = [
        int(b) - batch.starts[0] for b in batch.split.boundaries_in(batch.starts[0] + 1, batch.starts[0] + batch.context)
    ]
    for start in range(0, batch.context, chunk):
        stop = min(start + chunk, batch.context)
        window = Batch(batch.split, (batch.starts[0] + start,), stop - start, 1)
        part = window.shard(range(1), Shard())
        cu = None
        if batch.split.boundaries is not None:
            inside = [b - start for b in boundaries if start <= b < stop]
            cu = torch.tensor([0, *inside, stop - start], device=device)
        h, carry = model.hidden(part.inputs.to(device), carry, cu_seqlens=cu)
        labels = part.labels.to(device)
        for n, (a, b) in enumerate(zip(edges, edges[1:])):
            low, high = max(a, start) - start, min(b, stop) - start
            if low < high:
                sums[n] += model.loss(h[:, low:high], labels[:, low:high], num_targets=1).double().cpu()
                counts[n] += int((labels[:, low:high] != -100).sum())
        progress(stop - start)
