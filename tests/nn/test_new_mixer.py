"""A new kind of mixing layer is one file (tests/nn/gated_delta.py): every mode works with it and is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from race_dist.models import DecoderLM, MaskedLM, ModelConfig, generate
from race_dist.nn import RaceConfig, Sequence, register_layer_kind, unregister_layer_kind
from race_dist.parallel import fold, shard_sequence
from race_dist.planning import Cluster, Job, Layout, find_gpu, make_plan
from race_dist.planning.layer_costs import layer_cost
from race_dist.planning.parameter_counts import parameter_count
from race_dist.streaming import streamed_backward, streamed_prompt
from tests.distributed.harness import run_ranks
from tests.nn.gated_delta import DeltaCarry, GatedDeltaConfig, GatedDeltaKind, GatedDeltaRule

F64, VOCAB = torch.float64, 13
PACKED = {"contiguous": [0, 7, 7, 20, 24], "zigzag": [0, 12, 12, 24]}


@contextmanager
def registered() -> Iterator[None]:
    register_layer_kind(GatedDeltaKind())
    try:
        yield
    finally:
        unregister_layer_kind("G")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


def model(pattern: str = "G", **race: Any) -> DecoderLM:
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=len(pattern),
        num_heads=2,
        ffn_dim=16,
        layer_pattern=pattern,
        window=5,
        race=RaceConfig(num_tables=2, num_planes=2, **race),
    )
    return DecoderLM(config, dtype=F64)


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, VOCAB, (2, batch, length), generator=torch.Generator().manual_seed(1))
    labels[:, 2:4] = -100
    return ids, labels


def gradients(net: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def brute_force(layer: GatedDeltaRule, x: Tensor, bounds: list[int]) -> Tensor:
    """The definition, token by token and pair by pair: what i reads of j has gone through every step in between."""
    q, k, v, stay, write = layer.inputs(x)
    out = torch.zeros_like(v)
    eye = torch.eye(layer.head_dim, dtype=x.dtype)
    for start, stop in zip(bounds, bounds[1:]):
        for b, h, i in ((b, h, i) for b in range(x.shape[0]) for h in range(layer.num_heads) for i in range(start, stop)):
            reader = q[b, i, h]
            for j in range(i, start - 1, -1):
                out[b, i, h] = out[b, i, h] + write[b, j, h] * v[b, j, h] * (k[b, j, h] @ reader)
                step = stay[b, j, h] * (eye - write[b, j, h] * torch.outer(k[b, j, h], k[b, j, h]))
                reader = step @ reader
    return layer.o_proj(layer.out_norm(out).flatten(2))


@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 4, 9]])
def test_layer_is_the_definition_with_its_gradients(bounds: list[int]) -> None:
    layer = GatedDeltaRule(8, 2, dtype=F64)
    batch = 2 if len(bounds) == 2 else 1
    x = torch.randn(batch, 9, 8, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sequence = Sequence.of(9, cu_seqlens=None if len(bounds) == 2 else torch.tensor(bounds))
    weights = torch.randn(batch, 9, 8, dtype=F64, generator=torch.Generator().manual_seed(2))
    results = []
    for out in (layer(x, None, sequence)[0], brute_force(layer, x, bounds)):
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])])
    assert_same(*results)


def test_carry_is_a_monoid() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (DeltaCarry(*torch.randn(2, 1, 2, 3, 3, dtype=F64, generator=g)) for _ in range(3))
    assert_same([*a.combine(b).combine(c).tensors()], [*a.combine(b.combine(c)).tensors()])
    assert_same([*a.zero().combine(a).tensors()], [*a.combine(a.zero()).tensors()])
    assert_same([a.combine(b.with_reset()).state], [b.state])
    assert_same([*fold([a, b, c]).tensors()], [*a.combine(b).combine(c).tensors()])


@pytest.mark.parametrize("pattern", ["G", "GR"])
def test_model_trains(pattern: str) -> None:
    net, (ids, _) = model(pattern), text(2, 12)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = net(ids, labels)
        loss.backward()
        assert all(g is not None and bool(g.abs().max() > 0) for g in gradients(net))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("pattern", ["G", "GRW"])
def test_decoding_token_by_token_is_the_whole(pattern: str) -> None:
    net, (ids, _) = model(pattern), text(2, 11)
    expected, last = net.hidden(ids)
    carry, hidden = net.zero_carry(2), []
    for t in range(11):
        h, after = net.hidden(ids[:, t : t + 1], carry)
        assert after is not None
        carry = after
        hidden.append(h)
    assert last is not None
    assert_same([torch.cat(hidden, 1), *carry.tensors()[:-1]], [expected, *last.tensors()[:-1]])
    token = next(iter(generate(net, ids, 1, temperature=0)))
    assert torch.equal(token, net.logits(expected[:, -1]).argmax(-1))


@pytest.mark.parametrize("bounds", [None, [0, 5, 11, 11, 23]])
@pytest.mark.parametrize("chunk_size", [4, 23])
def test_streamed_gradients_are_those_of_one_pass(chunk_size: int, bounds: list[int] | None) -> None:
    net, (ids, labels) = model("GRG"), text(1, 23)
    cu = None if bounds is None else torch.tensor(bounds)
    expected = net(ids, labels, cu_seqlens=cu)
    expected.backward()
    whole = gradients(net)
    net.zero_grad()
    loss = streamed_backward(net, ids, labels, chunk_size=chunk_size, cu_seqlens=cu)
    assert_same([loss.detach(), *gradients(net)], [expected.detach(), *whole])


def test_carries_that_do_not_add_are_kept_where_sketches_are_subtracted() -> None:
    net, (ids, labels) = model("GR", decay="none"), text(2, 17)
    expected = net(ids, labels)
    expected.backward()
    whole = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=5, keep="subtract")
    assert_same(gradients(net), whole)


def test_documents_reset_the_state() -> None:
    net, (ids, _) = model("GG"), text(1, 24)
    bounds = PACKED["contiguous"]
    packed, carry = net.hidden(ids, cu_seqlens=torch.tensor(bounds))
    alone = [net.hidden(ids[:, a:b]) for a, b in zip(bounds, bounds[1:])]
    assert_same([packed], [torch.cat([h for h, _ in alone], 1)])
    last = alone[-1][1]
    assert carry is not None
    assert last is not None
    assert_same([layer.state for layer in carry.layers], [layer.state for layer in last.layers])
    assert not any(layer.transition.any() for layer in carry.layers)


def test_a_document_that_begins_at_the_end_is_empty() -> None:
    net, (ids, _) = model("G"), text(1, 6)
    _, carry = net.hidden(ids, cu_seqlens=torch.tensor([0, 6, 6]))
    assert carry is not None
    assert not any(t.any() for t in carry.tensors())


def test_padding_is_absent() -> None:
    net, (ids, labels) = model("GG"), text(2, 9)
    mask = torch.tensor([[True, False, True, True, False, False, True, True, True], [False] * 3 + [True] * 6])
    h, carry = net.hidden(ids, key_mask=mask)
    for b in range(2):
        alone, after = net.hidden(ids[b : b + 1, mask[b]])
        assert carry is not None
        assert after is not None
        assert_same([h[b : b + 1, mask[b]]], [alone])
        assert_same([t[b : b + 1] for t in carry.tensors()[:-1]], [*after.tensors()[:-1]])
    net(ids, labels, key_mask=mask).backward()
    assert all(bool(g.isfinite().all()) for g in gradients(net))


def rank_case(group: dist.ProcessGroup, layout: str, bounds: list[int] | None, lengths: list[int] | None) -> None:
    with registered():
        ids, labels = text(1 if bounds else 2, 24)
        cu = None if bounds is None else torch.tensor(bounds)
        net = model("GRG")
        expected, logits = net(ids, labels, cu_seqlens=cu), net(ids, cu_seqlens=cu)
        expected.backward()
        whole = gradients(net)
        _, last = net.hidden(ids, cu_seqlens=cu)
        net.zero_grad()
        rank = dist.get_rank(group)
        if lengths is None:
            shard = lambda x: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu)
        else:
            shard = lambda x: x.split(lengths, 1)[rank]
        loss = net(shard(ids), shard(labels), cu_seqlens=cu, group=group, layout=layout)
        loss.backward()
        total = loss.detach().clone()
        for t in (total, *gradients(net)):
            dist.all_reduce(t, group=group)
        assert_same([total, *gradients(net)], [expected.detach(), *whole])
        assert_same([net(shard(ids), cu_seqlens=cu, group=group, layout=layout)], [shard(logits)])
        _, carry = net.hidden(shard(ids), cu_seqlens=cu, group=group, layout=layout)
        assert carry is not None
        assert last is not None
        assert_same([*carry.tensors()], [*last.tensors()])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_equal_one_rank(world: int, layout: str, packed: bool) -> None:
    run_ranks(world, rank_case, layout, PACKED[layout] if packed else None, None)


@pytest.mark.parametrize("bounds", [None, [0, 7, 20, 24, 24]])
@pytest.mark.parametrize("lengths", [[5, 0, 19], [20, 4, 0]])
def test_shards_of_any_length(lengths: list[int], bounds: list[int] | None) -> None:
    run_ranks(3, rank_case, "contiguous", bounds, lengths)


def padded_case(group: dist.ProcessGroup, layout: str) -> None:
    with registered():
        ids, labels = text(2, 24)
        mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.6
        net = model("GG")
        expected = net(ids, labels, key_mask=mask)
        expected.backward()
        whole = gradients(net)
        net.zero_grad()
        shard = lambda x: shard_sequence(x, group, dim=1, layout=layout)
        loss = net(shard(ids), shard(labels), key_mask=shard(mask), group=group, layout=layout)
        loss.backward()
        for g in gradients(net):
            dist.all_reduce(g, group=group)
        assert_same(gradients(net), whole)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_padding_over_ranks(layout: str) -> None:
    run_ranks(2, padded_case, layout)


def streamed_case(group: dist.ProcessGroup, bounds: list[int] | None) -> tuple[list[Tensor], Tensor]:
    with registered():
        net, (ids, labels) = model("GR"), text(1, 25)
        cu = None if bounds is None else torch.tensor(bounds)
        streamed_backward(net, ids, labels, chunk_size=4, group=group, cu_seqlens=cu)
        return gradients(net), streamed_prompt(net, ids, chunk_size=4, group=group)[0]


@pytest.mark.parametrize("bounds", [None, [0, 6, 16, 25]])
def test_streaming_over_ranks(bounds: list[int] | None) -> None:
    net, (ids, labels) = model("GR"), text(1, 25)
    net(ids, labels, cu_seqlens=None if bounds is None else torch.tensor(bounds)).backward()
    expected = [*gradients(net), net(ids)[:, -1]]
    for found, logits in run_ranks(3, streamed_case, bounds):
        assert_same([*found, logits], expected)


def test_planner_asks_the_kind() -> None:
    net = model("GR")
    job = Job(net.config, 4096, precision="float64")
    plan = make_plan(job, Layout(1, 2, 1024), Cluster(find_gpu("h100"), 2))
    assert plan.step > 0
    assert parameter_count(net.config) == sum(p.numel() for p in net.parameters())
    carry = net.zero_carry(1, state_dtype=F64)
    assert layer_cost("G").carry_bytes(job) == sum(t.numel() * t.element_size() for t in carry.layers[0].tensors())


def test_options_of_the_kind_reach_its_layers() -> None:
    unregister_layer_kind("G")
    register_layer_kind(GatedDeltaKind(GatedDeltaConfig(initial_stay=-20.0)))
    net, (ids, _) = model("G"), text(1, 6)
    alone = torch.cat([net.hidden(ids[:, t : t + 1])[0] for t in range(6)], 1)
    torch.testing.assert_close(net.hidden(ids)[0], alone, rtol=0, atol=1e-6)  # nothing of the state stays


def test_messages_know_the_kind() -> None:
    with pytest.raises(ValueError, match="MaskedLM reads in both directions, but a G layer is causal"):
        MaskedLM(ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, layer_pattern="G"))
    with pytest.raises(ValueError, match="layer_pattern = 'SG' may hold R, W and G"):
        streamed_backward(model("SG"), *text(1, 8), chunk_size=4)
    with pytest.raises(ValueError, match="G stands for gated delta rule layers already"):
        register_layer_kind(type("Other", (GatedDeltaKind,), {})())
    with pytest.raises(TypeError, match="carry must be a DeltaCarry"):
        model("G").blocks[0].mixer(torch.zeros(1, 2, 16, dtype=F64), torch.zeros(1))
