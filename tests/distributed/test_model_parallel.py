"""A model over several ranks is the model on one: outputs, losses, gradients and carries, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from race_dist.models import DecoderLM, MaskedLM, ModelConfig, SequenceClassifier
from race_dist.nn import RaceConfig
from race_dist.parallel import shard_sequence, unshard_sequence

DOCUMENTS = {"contiguous": [0, 9, 9, 22, 36], "zigzag": [0, 12, 12, 36]}


def config(pattern: str, **race: object) -> ModelConfig:
    return ModelConfig(vocab_size=19, dim=16, num_layers=len(pattern), num_heads=4, num_kv_heads=2, ffn_dim=16,
                       layer_pattern=pattern, window=9, race=RaceConfig(num_tables=2, num_planes=2, **race))


def tokens(batch: int, total: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 19, (batch, total), generator=generator)
    labels = torch.randint(0, 19, (batch, total), generator=generator)
    labels[:, 3:9] = -100
    return ids, labels


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def decoder_case(group: dist.ProcessGroup, pattern: str, layout: str, lengths: list[int] | None, race: dict[str, object],
                 documents: list[int] | None, chunks: int = 1) -> None:
    """Losses and gradients of the ranks add up to those of one process, also piece by piece."""
    total = 36
    ids, labels = tokens(1 if documents else 2, total)
    cu = None if documents is None else torch.tensor(documents)
    model = DecoderLM(config(pattern, **race), dtype=torch.float64)
    expected_logits, expected_loss = model(ids, cu_seqlens=cu), model(ids, labels, cu_seqlens=cu)
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    if lengths is None:
        shard = lambda x: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu)
    else:
        shard = lambda x: x.split(lengths, 1)[dist.get_rank(group)]
    loss = model(shard(ids), shard(labels), cu_seqlens=cu, group=group, layout=layout)
    loss.backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed, group=group)
    for g in gradients(model):
        dist.all_reduce(g, group=group)
    assert_same([summed, *gradients(model)], [expected_loss.detach(), *expected])
    logits = model(shard(ids), cu_seqlens=cu, group=group, layout=layout)
    assert_same([logits], [shard(expected_logits)])


RACE = {"token": {}, "plain": {"decay": "none", "normalization": "global", "output_gate": False},
        "bucket": {"decay": "none", "normalization": "bucket", "qk_norm": False}, "multiscale": {"decay": "multiscale"}}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pattern", "race"), [("RWS", "token"), ("RR", "plain"), ("R", "bucket"), ("RW", "multiscale")])
def test_decoder_over_three_ranks(pattern: str, race: str, packed: bool, layout: str) -> None:
    run_ranks(3, decoder_case, pattern, layout, None, RACE[race], DOCUMENTS[layout] if packed else None)
