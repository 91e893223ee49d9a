"""Convolutions of values and in window and full softmax layers over several ranks equal those on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import RaceConfig, SoftmaxConfig
from race_dist.parallel import shard_sequence


def case(group: dist.ProcessGroup, layout: str, documents: list[int] | None) -> None:
    model = DecoderLM(
        ModelConfig(
            vocab_size=19,
            dim=16,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=16,
            layer_pattern="RWS",
            window=9,
            softmax=SoftmaxConfig(short_conv=4, conv_values=True, output_gate=True, gate_activation="sigmoid"),
            race=RaceConfig(num_tables=2, num_planes=2, conv_values=True, gate_activation="sigmoid"),
        ),
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 19, (2, 1 if documents else 2, 36), generator=generator).unbind()
    cu = None if documents is None else torch.tensor(documents)
    expected_loss = model(ids, labels, cu_seqlens=cu)
    expected_loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    shard = lambda x: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu)
    loss = model(shard(ids), shard(labels), cu_seqlens=cu, group=group, layout=layout)
    loss.backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed, group=group)
    torch.testing.assert_close(summed, expected_loss.detach(), rtol=1e-9, atol=1e-9)
    for p, e in zip(model.parameters(), expected, strict=True):
        dist.all_reduce(p.grad, group=group)
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layout", "documents"),
    [("contiguous", None), ("zigzag", None), ("contiguous", [0, 9, 9, 22, 36]), ("zigzag", [0, 12, 12, 36])],
)
def test_a_decoder_over_three_ranks(layout: str, documents: list[int] | None) -> None:
    run_ranks(3, case, layout, documents)
