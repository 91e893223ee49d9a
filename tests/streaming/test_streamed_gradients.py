"""A sequence streamed in chunks has the gradients of one pass."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from race_dist import RaceConfig
from race_dist.models import DecoderLM, ModelConfig
from race_dist.streaming import Progress, streamed_backward, streamed_loss, streamed_prompt

VOCAB = 17


def model(pattern: str = "R", **race: Any) -> DecoderLM:
    options = {"num_tables": 2, "num_planes": 2, "short_conv": 3, "decay": "token", **race}
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        window=9,
        ffn_dim=24,
        layer_pattern=pattern,
        race=RaceConfig(**options),
    )
    return DecoderLM(config).double()


def text(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCAB, (2, batch, length), generator=g)
    return ids, labels.masked_fill(torch.rand(batch, length, generator=g) < 0.2, -100)


def gradients(net: DecoderLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert float((got[name] - right).norm()) <= tolerance * max(float(right.norm()), 1e-6), name


@pytest.mark.parametrize("pattern", ["R", "W", "RW"])
@pytest.mark.parametrize(("length", "chunk_size"), [(40, 13), (40, 5), (7, 50), (13, 1)])
def test_gradients_are_those_of_the_whole(pattern: str, length: int, chunk_size: int) -> None:
    net = model(pattern)
    ids, labels = text(2, length)
    wanted_loss = net(ids, labels)
    wanted_loss.backward()
    expected = gradients(net)
    net.zero_grad()
    loss = streamed_backward(net, ids, labels, chunk_size=chunk_size)
    assert abs(float(loss - wanted_loss.detach())) <= 1e-12
    assert_same(gradients(net), expected)
    assert abs(float(streamed_loss(net, ids, labels, chunk_size=chunk_size) - wanted_loss.detach())) <= 1e-12


@pytest.mark.parametrize(
    "race",
    [
        {"decay": "none", "normalization": "global"},
        {"decay": "multiscale", "normalization": "bucket"},
        {"decay": "token", "normalization": "global"},
        {"short_conv": 0, "decay": "multiscale", "normalization": "none"},
    ],
)
def test_every_kind_of_carry_hands_its_gradient_back(race: dict[str, Any]) -> None:
    net = model(**race)
    ids, labels = text(1, 45)
    net(ids, labels).backward()
    expected = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=10, keep="host")
    assert_same(gradients(net), expected)


@pytest.mark.parametrize("bounds", [[0, 10, 20, 45], [0, 45], [0, 0, 7, 7, 8, 30, 45, 45], [0, 3, 10, 11, 45]])
def test_packed_documents(bounds: list[int]) -> None:
    net = model("RW")
    ids, labels = text(1, 45)
    cu_seqlens = torch.tensor(bounds)
    net(ids, labels, cu_seqlens=cu_seqlens).backward()
    expected = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=10, cu_seqlens=cu_seqlens)
    assert_same(gradients(net), expected)


def test_adds_to_gradients_that_stand_there_and_reads_memory_maps(tmp_path: Any) -> None:
    net = model()
    ids, labels = text(1, 30)
    net(ids, labels).backward()
    expected = {name: 2 * g for name, g in gradients(net).items()}
    for name, array in (("ids", ids), ("labels", labels)):
        np.save(tmp_path / f"{name}.npy", array.numpy().astype(np.int16))
    maps = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("ids", "labels")]
    streamed_backward(net, maps[0], maps[1], chunk_size=8)
    assert_same(gradients(net), expected)


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    net = model()
    ids, labels = text(1, 20)
    assert float(streamed_backward(net, ids, torch.full_like(labels, -100), chunk_size=6)) == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_narrow_parameters_add_up_in_float32() -> None:
    """In bfloat16 a sum of a thousand small gradients would stop growing after 256 of them."""
    net = model().to(torch.bfloat16)
    ids, labels = text(1, 600)
    whole = model().to(torch.bfloat16).float()
    whole(ids, labels).backward()
    streamed_backward(net, ids, labels, chunk_size=2)
    got = torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])
    expected = torch.cat([p.grad.flatten() for p in whole.parameters() if p.grad is not None])
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in net.parameters())
    assert float((got - expected).norm() / expected.norm()) <= 0.1


def test_progress_counts_every_chunk_of_both_phases() -> None:
    seen: list[Progress] = []
    ids, labels = text(2, 25)
    streamed_backward(model(), ids, labels, chunk_size=10, progress=seen.append)
    assert [(p.phase, p.chunk) for p in seen] == [
        ("forward", 1),
        ("forward", 2),
        ("backward", 1),
        ("backward", 2),
        ("backward", 3),
    ]
    assert [p.tokens for p in seen] == [20, 40, 10, 30, 50]  # of both rows; the ragged chunk comes first on the way back
    assert seen[-1].remaining == 0
    assert all(p.memory > 0 and p.tokens_per_second > 0 for p in seen)


def test_an_interrupted_step_leaves_gradients_as_they_were() -> None:
    net = model()
    ids, labels = text(1, 30)
    net(ids, labels).backward()
    before = gradients(net)

    def stop(p: Progress) -> None:
        if p.phase == "backward":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed_backward(net, ids, labels, chunk_size=8, progress=stop)
    assert_same(gradients(net), before, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1; got 0"),
        ({"labels": torch.zeros(1, 5, dtype=torch.int64)}, "must both be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "must end at T = 20"),
        ({"keep": "disk"}, "keep must be one of 'device', 'host', 'subtract'; got 'disk'"),
        ({"reduce": "max"}, "reduce must be one of 'mean', 'sum', 'none'; got 'max'"),
        ({"keep": "subtract"}, "needs race.decay = \"none\", but it is 'token'"),
        ({"input_ids": torch.full((1, 20), 17)}, "input_ids must be from 0 to vocab_size - 1 = 16; got 17"),
        ({"labels": torch.full((1, 20), -1)}, "labels must be from 0 to vocab_size - 1 = 16 \\(or -100\\); got -1"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    ids, labels = text(1, 20)
    with pytest.raises(ValueError, match=words):
        streamed_backward(model(), **{"input_ids": ids, "labels": labels, "chunk_size": 4, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.rand(1, 20)}, "input_ids must be integers; got torch.float32"),
        ({"labels": [[1]]}, "labels must be a torch.Tensor or a NumPy array; got list"),
        ({"model": torch.nn.Linear(2, 2)}, "model must be a race_dist.models.DecoderLM; got Linear"),
    ],
)
def test_other_types_are_named(change: dict[str, Any], words: str) -> None:
    ids, labels = text(1, 20)
    with pytest.raises(TypeError, match=words):
        streamed_backward(**{"model": model(), "input_ids": ids, "labels": labels, "chunk_size": 4, **change})


@pytest.mark.parametrize("pattern", ["R", "RW"])
@pytest.mark.parametrize("normalization", ["global", "bucket", "none"])
def test_sketches_recovered_by_subtraction(pattern: str, normalization: str) -> None:
    net = model(pattern, decay="none", normalization=normalization)
    ids, labels = text(2, 45)
    net(ids, labels).backward()
    expected = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=4, keep="subtract")
    assert_same(gradients(net), expected)


def test_subtraction_costs_no_digits_in_float32() -> None:
    """Sketches are float64 sums of float32 chunks: subtracting 64 chunks recovers the early states exactly."""
    net = model(decay="none").float()
    ids, labels = text(1, 1024)
    streamed_backward(net, ids, labels, chunk_size=16)
    expected = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=16, keep="subtract")
    assert_same(gradients(net), expected, 1e-6)


def test_subtraction_is_refused_where_documents_begin() -> None:
    ids, labels = text(1, 20)
    with pytest.raises(ValueError, match="does not go with cu_seqlens"):
        streamed_backward(model(decay="none"), ids, labels, chunk_size=4, keep="subtract", cu_seqlens=torch.tensor([0, 7, 20]))


def test_targets_may_be_counted_elsewhere() -> None:
    """Replicas that share a batch divide by the number of targets of all replicas."""
    net, (ids, labels) = model(), text(1, 30)
    mean = streamed_backward(net, ids, labels, chunk_size=8)
    expected, count = gradients(net), int((labels != -100).sum())
    net.zero_grad()
    assert float(streamed_backward(net, ids, labels, chunk_size=8, num_targets=3 * count)) == pytest.approx(float(mean) / 3)
    assert_same(gradients(net), {name: g / 3 for name, g in expected.items()})


@pytest.mark.parametrize(("length", "chunk_size"), [(30, 8), (24, 8), (5, 9)])
def test_a_prompt_is_read_in_chunks(length: int, chunk_size: int) -> None:
    net, (ids, _) = model("RW"), text(2, length)
    with torch.no_grad():
        expected = net(ids)[:, -1]
        logits, carry = streamed_prompt(net, ids, chunk_size=chunk_size)
        assert float((logits - expected).norm() / expected.norm()) <= 1e-12
        following = torch.ones(2, 1, dtype=torch.int64)
        h, _ = net.hidden(following, carry)
        expected = net(torch.cat([ids, following], 1))[:, -1]
        assert float((net.logits(h)[:, -1] - expected).norm() / expected.norm()) <= 1e-12


def test_compiled_blocks_run_one_graph_in_both_phases() -> None:
    """Different graphs in the forward and in the backward phase would round differently in bfloat16."""
    from torch._dynamo.utils import counters

    ids, labels = text(1, 64)
    net = model("R").float()
    eager = streamed_backward(net, ids, labels, chunk_size=16)
    expected = gradients(net)
    net.zero_grad()
    torch.compiler.reset()
    counters.clear()
    for block in net.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    loss = streamed_backward(net, ids, labels, chunk_size=16)
    assert counters["stats"]["unique_graphs"] == 1  # for all blocks, chunks and phases
    assert abs(float(loss - eager)) <= 1e-6
    assert_same(gradients(net), expected, 1e-4)


def test_a_chunks_graph_is_gone_before_the_next_begins() -> None:
    """Compiled blocks record a graph in the forward phase too; activations of two chunks must never exist at once."""
    net, (ids, labels), alive = model(), text(1, 64), []
    for block in net.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    hidden = net.hidden

    def recorded(*args: Any, **options: Any) -> Any:
        assert all(reference() is None for reference in alive)
        h, carry = hidden(*args, **options)
        node = next(t.grad_fn for t in carry.tensors() if t.grad_fn is not None)
        hook = lambda *_: None
        node.register_hook(hook)  # lives as long as the graph does
        alive[:] = [weakref.ref(hook)]
        return h, carry

    net.hidden = recorded  # type: ignore[method-assign]
    streamed_backward(net, ids, labels, chunk_size=16)
    assert alive


def test_full_softmax_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="its carry is every key and value so far"):
        streamed_backward(model("RS"), *text(1, 20), chunk_size=4)


@pytest.mark.parametrize("call", [streamed_backward, streamed_loss, streamed_prompt])
def test_padding_is_refused_with_what_to_do_instead(call: Any) -> None:
    ids, labels = text(2, 6)
    given = (ids,) if call is streamed_prompt else (ids, labels)
    with pytest.raises(ValueError, match=r"key_mask.*(cu_seqlens|race_dist\.models\.prefill)"):
        call(model(), *given, chunk_size=4, key_mask=torch.ones(2, 6, dtype=torch.bool))
