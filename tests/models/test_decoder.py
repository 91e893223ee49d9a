"""The decoder with every pattern, in pieces, with documents, in every precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from race_dist.carry import detach
from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import RaceConfig

VOCAB = 23


def config(pattern: str = "RWS", **more: object) -> ModelConfig:
    base = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "layer_pattern": pattern,
        "window": 6,
        "ffn_dim": 24,
        "race": RaceConfig(num_tables=2, num_planes=2),
    }
    return ModelConfig(**(base | more))


def model(pattern: str = "RWS", **more: object) -> DecoderLM:
    return DecoderLM(config(pattern, **more), dtype=torch.float64)


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, VOCAB, (2, batch, length))
    labels[:, ::5] = -100
    return ids, labels


@pytest.mark.parametrize("pattern", ["R", "W", "S", "RW", "RWS", "SRW"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients(pattern: str, tied: bool) -> None:
    net, (ids, labels) = model(pattern, tie_embeddings=tied, loss_chunk=7), text(2, 19)
    loss = net(ids, labels)
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values()), grads
    net.zero_grad()
    logits = net(ids)
    assert logits.shape == (2, 19, VOCAB)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.parametrize("pattern", ["R", "RWS"])
def test_piece_by_piece(pattern: str) -> None:
    """Chunks and single tokens: the same hidden states, and the same gradients through the carries."""
    net, (ids, _) = model(pattern), text(2, 21)
    whole, _ = net.hidden(ids)
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, list(net.parameters())[:-1], gradient, allow_unused=True)
    for lengths in ([10, 1, 1, 9], [1] * 21, [21]):
        carry, parts = net.zero_carry(2), []
        for piece in ids.split(lengths, 1):
            h, carry = net.hidden(piece, carry)
            parts.append(h)
        assert carry.position.item() == 21
        pieces = torch.cat(parts, 1)
        torch.testing.assert_close(pieces, whole)
        actual = torch.autograd.grad(pieces, list(net.parameters())[:-1], gradient, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_documents_are_sequences_of_their_own() -> None:
    net, cu = model(), [0, 0, 4, 17, 17, 26]
    ids, _ = text(1, 26)
    logits = net(ids, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    for a, b in itertools.pairwise(cu):
        if b > a:
            torch.testing.assert_close(logits[:, a:b], net(ids[:, a:b]))
    carry, parts = None, []
    for start, stop in itertools.pairwise([0, 3, 4, 11, 17, 18, 26]):
        inside = [0, *(c - start for c in cu[1:-1] if start <= c < stop), stop - start]
        h, carry = net.hidden(ids[:, start:stop], carry, cu_seqlens=torch.tensor(inside))
        parts.append(h)
    torch.testing.assert_close(net.logits(torch.cat(parts, 1)), logits)
    assert carry is not None
    assert carry.position.item() == 9


def test_padding_changes_nothing() -> None:
    net, (ids, _) = model(), text(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    logits = net(ids, key_mask=mask)
    torch.testing.assert_close(logits[0], net(ids[:1])[0])
    torch.testing.assert_close(logits[1, :8], net(ids[1:, :8])[0])


def test_loss_without_targets_is_zero_with_zero_gradients() -> None:
    net, (ids, _) = model(), text(2, 9)
    loss = net(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_the_caller_may_say_how_many_targets_count() -> None:
    net, (ids, labels) = model("R"), text(2, 9)
    count = int((labels != -100).sum())
    torch.testing.assert_close(net(ids, labels, num_targets=4 * count) * 4, net(ids, labels))
    torch.testing.assert_close(net(ids, labels, num_targets=torch.tensor(count)), net(ids, labels))


def test_checkpointing_changes_nothing() -> None:
    nets = model("RW"), model("RW", activation_checkpointing=True)
    ids, labels = text(2, 15)
    losses = [net(ids, labels) for net in nets]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(5)
    a = model("RW")
    torch.manual_seed(6)
    b = DecoderLM(config("RW"), device="meta").to_empty(device="cpu").double()
    b.initialize()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    more = model("RW", num_layers=6).state_dict()
    same = [name for name, value in a.state_dict().items() if torch.equal(value, more[name])]
    assert {n for n in a.state_dict() if "o_proj" not in n and "down_proj" not in n} <= set(same)
    assert not torch.equal(a.embed.weight, model("RW", seed=1).embed.weight)


def test_far_positions() -> None:
    """Softmax layers are invariant to the position of a sequence, also at positions that float32 cannot distinguish."""
    net, (ids, _) = model("W"), text(1, 10)
    zero = net.zero_carry(1)
    far = type(zero)(zero.layers, torch.tensor(2**40))
    torch.testing.assert_close(net.hidden(ids, far)[0], net.hidden(ids)[0], rtol=1e-5, atol=1e-5)


def test_narrow_precision() -> None:
    net = DecoderLM(config())
    ids, labels = text(2, 30)
    expected = net(ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(ids, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        assert abs(net.bfloat16()(ids, labels).item() - expected.item()) < 0.1
        assert net(ids).dtype == torch.float32


def test_compiles_whole() -> None:
    """One graph, no breaks, with and without a carry."""
    net, (ids, labels) = DecoderLM(config()), text(2, 30)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(ids, labels), net(ids, labels))
    streamed = torch.compile(net.hidden, fullgraph=True, backend="eager")
    first, carry = streamed(ids[:, :20], net.zero_carry(2))
    second, _ = net.hidden(ids[:, 20:], carry)
    torch.testing.assert_close(torch.cat([first, second], 1), net.hidden(ids)[0])


def test_carry_can_be_cut_from_the_graph() -> None:
    net, (ids, _) = model(), text(1, 5)
    _, carry = net.hidden(ids)
    assert carry is not None
    detached = detach(carry)
    assert not any(t.requires_grad for t in detached.tensors())
    assert len(detached.layers) == 3


def test_errors() -> None:
    net, (ids, labels) = model(), text(2, 5)
    for call, message in [
        (lambda: net(ids.float()), r"input_ids must be int \[B, T\]; got torch.float32"),
        (lambda: net(ids[0]), r"input_ids must be int \[B, T\]"),
        (lambda: net(ids + VOCAB), "from 0 to vocab_size - 1 = 22; got"),
        (lambda: net(ids, labels[:, 1:]), r"labels must be int64 \[2, 5\]"),
        (lambda: net(ids, labels + VOCAB + 100), "labels .* must be from 0"),
        (lambda: net(ids, key_mask=torch.ones(2, 5)), r"key_mask must be bool \[2, 5\]"),
        (lambda: net(ids, layout="ring"), "layout must be one of"),
        (lambda: net(ids, cu_seqlens=torch.tensor([0, 5])), "need a batch of 1; got B = 2"),
        (lambda: net(ids[:1], cu_seqlens=torch.tensor([0, 4])), "must end at the sequence's length, 5; it ends at 4"),
        (lambda: net(ids[:1], cu_seqlens=torch.tensor([0, 4, 3, 5])), "must start at 0 and never fall"),
        (lambda: net(ids[:1], cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens must be int32 or int64"),
        (lambda: DecoderLM(config("R", race=RaceConfig(causal=False))), "DecoderLM needs race.causal = True"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
