"""README's snippets for several ranks, run as they stand: outputs, losses and gradients are those of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import run_ranks

from race_dist import RaceConfig, race_attention, sample_planes
from race_dist.models import DecoderLM, ModelConfig
from race_dist.parallel import shard_sequence

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "group" in block]


def run_block(text: str, names: dict[str, Any]) -> None:
    exec(compile(text, str(README), "exec"), names)  # noqa: S102


def snippets_case(group: dist.ProcessGroup) -> None:
    attention, model_over_ranks, data_parallel = blocks()
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 30, 4, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    planes = sample_planes(num_tables=4, num_planes=4, head_dim=8, seed=0).double()
    expected = shard_sequence(race_attention(q, k, v, planes, beta=2.0), group, dim=1)
    names: dict[str, Any] = {
        "torch": torch,
        "q": q,
        "k": k,
        "v": v,
        "planes": planes,
        "group": group,
        "race_attention": race_attention,
    }
    run_block(attention, names)
    torch.testing.assert_close(names["out"], expected, rtol=1e-9, atol=1e-9)

    config = ModelConfig(
        vocab_size=19,
        dim=16,
        num_layers=2,
        num_heads=4,
        ffn_dim=16,
        layer_pattern="RW",
        window=9,
        race=RaceConfig(num_tables=2, num_planes=2),
    )
    ids = torch.randint(0, 19, (2, 31), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    whole = DecoderLM(config, dtype=torch.float64)
    loss = whole(ids, labels)
    loss.backward()
    for text in (model_over_ranks, data_parallel):
        model = DecoderLM(config, dtype=torch.float64)
        names |= {"model": model, "input_ids": ids, "shard_sequence": shard_sequence}
        if text is data_parallel:  # DDP of the harness' ranks, which are not the default group
            text = text.replace("DistributedDataParallel(model)", "DistributedDataParallel(model, process_group=group)")
        run_block(text, names)
        share = names["loss"].detach().clone()
        if text is not model_over_ranks:
            share /= dist.get_world_size(group)
        dist.all_reduce(share, group=group)
        torch.testing.assert_close(share, loss.detach(), rtol=1e-9, atol=1e-9)
        for one, all_ranks in zip(whole.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(all_ranks.grad, one.grad, rtol=1e-8, atol=1e-10)


def test_the_snippets_over_two_and_three_ranks() -> None:
    for world in (2, 3):
        run_ranks(world, snippets_case)
