"""Bytes that one attention layer passes to collectives, forward and backward: Ulysses' all-to-all and RACE's sketches.

torchrun --nproc-per-node 4 -m race_dist.integrations.deepspeed.traffic
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from race_dist.integrations.deepspeed.attention import SketchAttention
from race_dist.integrations.deepspeed.engine import join
from race_dist.nn import RaceConfig
from race_dist.parallel import count_bytes, shutdown


class Layer(NamedTuple):
    """The sizes of an attention layer; bfloat16, batch 1."""

    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    tables: int = 4
    planes: int = 4


def ulysses_bytes(layer: Layer, length: int, world: int) -> int:
    """Bytes per rank in bfloat16: q, k, v and the output are exchanged in the forward pass, their gradients in the backward."""
    return 2 * (length // world) * 2 * (layer.heads + layer.kv_heads) * layer.head_dim * 2


def count_ulysses(layer: Layer, length: int) -> int:
    """Bytes of this rank, counted in ``torch.distributed``. The inner attention does not matter and returns its queries."""
    from deepspeed.sequence.layer import DistributedAttention

    class Queries(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q + 0 * (k.sum() + v.sum())

    attention = DistributedAttention(Queries(), dist.group.WORLD, scatter_idx=2, gather_idx=1)
    with _counted_all_to_all() as count:
        _run(lambda q, k, v: attention(q, k, v, 0), layer, length)
    return count[0]


def count_race(layer: Layer, length: int) -> int:
    """Bytes of this rank, as counted by this package's collectives."""
    config = RaceConfig(
        num_heads=layer.heads,
        num_kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        num_tables=layer.tables,
        num_planes=layer.planes,
    )
    attention = SketchAttention(config, dist.group.WORLD)
    with count_bytes() as count:
        _run(lambda q, k, v: attention(q, k, v, 0), layer, length)
    return count.bytes


def _run(attention: Callable[[Tensor, Tensor, Tensor], Tensor], layer: Layer, length: int) -> None:
    shape = (1, length // dist.get_world_size())
    q, k, v = (
        torch.randn(*shape, heads, layer.head_dim, dtype=torch.bfloat16, requires_grad=True)
        for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
    )
    attention(q, k, v).float().sum().backward()


@contextmanager
def _counted_all_to_all() -> Iterator[list[int]]:
    """Count the bytes of the input buffers of every all-to-all in torch.distributed."""
    count, plain = [0], dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += input.numel() * input.element_size()
        return plain(output, input, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        yield count
    finally:
        dist.all_to_all_single = plain


def measure(lengths: list[int], layer: Layer = Layer()) -> list[dict[str, int]]:  # noqa: B008
    """Count the bytes at each length. A collective: every rank calls it.

    Raises:
        AssertionError: the count of Ulysses differs from :func:`ulysses_bytes`.
    """
    join()
    rows = []
    for length in lengths:
        ulysses = count_ulysses(layer, length)
        assert ulysses == ulysses_bytes(layer, length, dist.get_world_size()), (ulysses, length)
        rows.append({"length": length, "ulysses": ulysses, "race": count_race(layer, length)})
    return rows


def main() -> None:
    """Count at 4K and 64K tokens, and compute the bytes of longer sequences: Ulysses' grow with the length, RACE's do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,65536", help="counted")
    parser.add_argument("--computed", default="1048576", help="computed")
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    numbers = lambda text: [int(part) for part in text.split(",")]
    rows: list[dict[str, Any]] = [row | {"how": "counted"} for row in measure(numbers(options.lengths))]
    world = dist.get_world_size()
    sketches = {row["race"] for row in rows}
    if len(sketches) == 1:  # RACE's bytes did not depend on the length
        rows += [
            {"length": n, "ulysses": ulysses_bytes(Layer(), n, world), "race": sketches.copy().pop(), "how": "computed"}
            for n in numbers(options.computed)
        ]
    if dist.get_rank() == 0:
        for row in rows:
            print(
                f"{row['length']:>10,} tokens: Ulysses {row['ulysses']:>13,}  RACE {row['race']:>11,}  "
                f"({row['ulysses'] / row['race']:.1f} times, {row['how']})"
            )
        if options.out is not None:
            command = f"torchrun --nproc-per-node {world} -m {__spec__.name} {' '.join(sys.argv[1:])}"
            options.out.write_text(
                json.dumps({"command": command, "ranks": world, "layer": Layer()._asdict(), "rows": rows}, indent=1) + "\n",
                encoding="utf-8",
            )
    shutdown()


if __name__ == "__main__":
    main()
