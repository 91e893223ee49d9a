"""Streaming on a CUDA device: gradients stay within the noise of the full sequence, compiled or not, offloaded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist import RaceConfig
from race_dist.models import DecoderLM, ModelConfig
from race_dist.streaming import streamed_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH, CHUNK = 8192, 2048


def model(**race: Any) -> DecoderLM:
    config = ModelConfig(vocab_size=256, dim=256, num_layers=2, num_heads=2, race=RaceConfig(**race))
    return DecoderLM(config).cuda()


def text() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, 256, (2, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    return ids, labels


def gradient(net: DecoderLM, **options: Any) -> Tensor:
    """The gradient of the whole model in bfloat16; streamed if a chunk size is given."""
    net.zero_grad()
    ids, labels = text()
    with torch.autocast("cuda", torch.bfloat16, enabled=options.pop("narrow", True)):
        if "chunk_size" in options:
            streamed_backward(net, ids.to(torch.uint8).numpy(), labels.to(torch.uint8).numpy(), **options)
        else:
            net(ids.cuda(), labels.cuda()).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("race", [{}, {"decay": "none", "normalization": "global"}])
def test_bfloat16_is_within_the_noise_of_the_whole(race: dict[str, Any]) -> None:
    net = model(**race)
    whole = gradient(net)
    noise = error(whole, gradient(net, narrow=False))
    assert noise > 0
    assert error(gradient(net, chunk_size=CHUNK), whole) <= 2 * noise


def test_carries_come_back_from_the_host_as_they_went() -> None:
    net = model()
    assert torch.equal(gradient(net, chunk_size=CHUNK, keep="host"), gradient(net, chunk_size=CHUNK))


def test_subtraction_costs_no_digits_here_either() -> None:
    net = model(decay="none", normalization="global")
    assert error(gradient(net, chunk_size=CHUNK, keep="subtract"), gradient(net, chunk_size=CHUNK)) <= 1e-2


def test_compiled_blocks_are_one_graph_and_within_the_noise() -> None:
    from torch._dynamo.utils import counters

    net = model()
    whole = gradient(net)
    noise = error(whole, gradient(net, narrow=False))
    torch.compiler.reset()
    counters.clear()
    for block in net.blocks:
        block.compile(dynamic=False, fullgraph=True)
    assert error(gradient(net, chunk_size=CHUNK), whole) <= 2 * noise
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("pattern", ["R", "RW"])
def test_a_chunk_does_not_wait_for_the_device(pattern: str) -> None:
    """The host queues one chunk while the chunk before it runs: nothing in a forward pass synchronizes."""
    config = ModelConfig(vocab_size=256, dim=256, num_layers=2, num_heads=2, layer_pattern=pattern, window=64)
    net, ids = DecoderLM(config).cuda(), torch.zeros(1, CHUNK, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        carry = net.hidden(ids, net.zero_carry(1, state_dtype=torch.float64))[1]  # kernels are compiled and tuned
        torch.cuda.set_sync_debug_mode("error")
        try:
            net.hidden(ids, carry)
        finally:
            torch.cuda.set_sync_debug_mode("default")
