"""Generation equals the full forward pass, with a carry of constant size."""

from __future__ import annotations

import pytest
import torch

from race_dist.models import DecoderLM, ModelConfig, generate, prefill, sample
from race_dist.nn import RaceConfig


def model(pattern: str = "RW") -> DecoderLM:
    return DecoderLM(
        ModelConfig(
            vocab_size=29,
            dim=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            layer_pattern=pattern,
            window=5,
            ffn_dim=24,
            race=RaceConfig(num_tables=2, num_planes=2),
        ),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("pattern", ["R", "RW", "RS"])
@pytest.mark.parametrize("prefill_chunk", [3, 100])
def test_greedy_is_the_argmax_of_the_full_forward(pattern: str, prefill_chunk: int) -> None:
    net = model(pattern)
    prompt = torch.randint(0, 29, (2, 11))
    new = torch.stack(list(generate(net, prompt, 6, temperature=0, prefill_chunk=prefill_chunk)), 1)
    ids = torch.cat([prompt, new], 1)
    assert torch.equal(net(ids).argmax(-1)[:, 10:-1], new)


def test_the_same_seed_draws_the_same() -> None:
    net, prompt = model().float(), torch.randint(0, 29, (7,))
    draw = lambda seed: torch.cat(list(generate(net, prompt, 12, seed=seed, top_k=20, top_p=0.95))).tolist()
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert not list(generate(net, prompt, 0))


def test_the_carry_keeps_its_size() -> None:
    net = model()
    shapes = lambda carry: [t.shape for t in carry.tensors()]
    carry = net.zero_carry(1, state_dtype=torch.float64)
    before = shapes(carry)
    for _ in range(9):
        _, carry = net.hidden(torch.zeros(1, 1, dtype=torch.int64), carry)
    assert shapes(carry) == before
    assert carry.position.item() == 9


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).expand(500, -1)
    assert set(sample(logits, top_k=2).tolist()) == {2, 3}
    assert set(sample(logits, top_p=0.5).tolist()) == {2}
    assert set(sample(logits, top_p=0.8).tolist()) == {2, 3}
    assert set(sample(logits, temperature=0).tolist()) == {2}
    assert set(sample(logits, temperature=10.0).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0; got -1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    arguments = {"prompt_ids": torch.zeros(1, 2, dtype=torch.int64), "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=message):
        generate(model(), **arguments)


@pytest.mark.parametrize("pattern", ["R", "RW", "RS"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_prompts_of_several_lengths(pattern: str, chunk: int) -> None:
    """Padding on the left, on the right and inside, also whole chunks of it; then a second turn that some rows lack."""
    net = model(pattern)
    mask = torch.tensor([[0] * 8 + [1] * 3, [1] * 5 + [0] * 6, [1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    turn = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    first, second = torch.randint(0, 29, mask.shape), torch.randint(0, 29, turn.shape)
    prompt = prefill(net, first, chunk=chunk, key_mask=mask)
    context = prefill(net, second, prompt, chunk=chunk, key_mask=turn)
    for start, ids, real in ((prompt, first, mask), (context, torch.cat([first, second], 1), torch.cat([mask, turn], 1))):
        new = torch.stack(list(generate(net, start, 6, temperature=0)), 1)
        for b in range(3):
            alone = torch.cat(list(generate(net, ids[b, real[b]], 6, temperature=0)))
            assert torch.equal(new[b], alone)
    padded = torch.stack(list(generate(net, first, 6, temperature=0, prefill_chunk=chunk, key_mask=mask)), 1)
    assert torch.equal(padded, torch.stack(list(generate(net, prompt, 6, temperature=0)), 1))
    one = torch.cat(list(generate(net, first[2], 6, temperature=0, key_mask=mask[2])))
    assert torch.equal(one, padded[2])
    with pytest.raises(ValueError, match=r"key_mask must be bool \[3, 11\] like prompt_ids"):
        generate(net, first, 1, key_mask=turn)
    with pytest.raises(ValueError, match="row 1 of key_mask is all False"):
        generate(net, first, 1, key_mask=mask & torch.tensor([[True], [False], [True]]))
    with pytest.raises(ValueError, match="prompt_ids is a PromptState"):
        generate(net, prompt, 1, key_mask=mask)
    with pytest.raises(ValueError, match="row 1 of key_mask is all False"):
        prefill(net, first, key_mask=mask & torch.tensor([[True], [False], [True]]))
    with pytest.raises(ValueError, match=r"key_mask must be bool \[3, 11\] like ids"):
        prefill(net, first, key_mask=turn)
