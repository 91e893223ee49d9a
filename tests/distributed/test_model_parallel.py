"""A model over several ranks equals the model on one rank: outputs, losses, gradients and carries, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from race_dist.models import DecoderLM, MaskedLM, ModelConfig, SequenceClassifier
from race_dist.nn import RaceConfig
from race_dist.parallel import shard_sequence

DOCUMENTS = {"contiguous": [0, 9, 9, 22, 36], "zigzag": [0, 12, 12, 36]}


def config(pattern: str, **race: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=19,
        dim=16,
        num_layers=len(pattern),
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=16,
        layer_pattern=pattern,
        window=9,
        race=RaceConfig(num_tables=2, num_planes=2, **race),
    )


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


def decoder_case(
    group: dist.ProcessGroup,
    pattern: str,
    layout: str,
    lengths: list[int] | None,
    race: dict[str, object],
    documents: list[int] | None,
) -> None:
    """Losses and gradients of the ranks add up to those of one process."""
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


RACE: dict[str, dict[str, object]] = {
    "token": {},
    "plain": {"decay": "none", "normalization": "global", "output_gate": False},
    "bucket": {"decay": "none", "normalization": "bucket", "qk_norm": False},
    "multiscale": {"decay": "multiscale"},
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pattern", "race"), [("RWS", "token"), ("RR", "plain"), ("R", "bucket"), ("RW", "multiscale")])
def test_decoder_over_three_ranks(pattern: str, race: str, packed: bool, layout: str) -> None:
    run_ranks(3, decoder_case, pattern, layout, None, RACE[race], DOCUMENTS[layout] if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [[5, 0, 31], [33, 3, 0]])
def test_shards_of_any_length(lengths: list[int], packed: bool) -> None:
    run_ranks(3, decoder_case, "RWS", "contiguous", lengths, {}, DOCUMENTS["contiguous"] if packed else None)


def chunks_case(group: dist.ProcessGroup, pattern: str, layout: str, documents: list[list[int]] | None) -> None:
    """Chunks that are sharded over the ranks, one after the other: carries are whole on every rank, and their gradients
    are the ranks' shares."""
    ids, _ = tokens(1 if documents else 2, 36)
    model = DecoderLM(config(pattern), dtype=torch.float64)
    begins = [12 * i + d for i, inside in enumerate(documents or []) for d in inside[1:-1]]  # of documents but the first
    expected, last = model.hidden(ids, cu_seqlens=torch.tensor([0, *begins, 36]) if documents else None)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected.backward(gradient)
    expected_gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    carry, total = None, torch.zeros((), dtype=torch.float64)
    for i, (piece, weight) in enumerate(zip(ids.split(12, 1), gradient.split(12, 1), strict=True)):
        cu = None if documents is None else torch.tensor(documents[i])
        shard = lambda x: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu)
        h, carry = model.hidden(shard(piece), carry, cu_seqlens=cu, group=group, layout=layout)
        torch.testing.assert_close(h, shard(expected[:, 12 * i : 12 * i + 12]).detach(), rtol=1e-9, atol=1e-9)
        total = total + (h * shard(weight)).sum()
    total.backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    for g in actual:
        dist.all_reduce(g, group=group)
    assert_same(actual, expected_gradients)
    for a, e in zip(carry.layers, last.layers, strict=True):
        mine, theirs = a.tensors(), e.tensors()
        assert_same([mine[0], mine[1].to(theirs[1].dtype)], [theirs[0], theirs[1]])
    assert carry.position.item() == last.position.item()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, [[0, 12], [0, 4, 8, 12], [0, 0, 12]]])
def test_sharded_chunks_one_after_the_other(layout: str, documents: list[list[int]] | None) -> None:
    run_ranks(2, chunks_case, "RW", layout, documents)


def encoder_case(group: dist.ProcessGroup, layout: str) -> None:
    ids, labels = tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 11:] = mask[1, :6] = False
    shard = lambda x: shard_sequence(x, group, dim=1, layout=layout)
    masked = MaskedLM(config("RS", causal=False), dtype=torch.float64)
    classifier = SequenceClassifier(config("RS", causal=False), 3, dtype=torch.float64)
    classes = torch.tensor([2, 0])
    for model, whole, part in [
        (
            masked,
            lambda: masked(ids, labels, key_mask=mask),
            lambda: masked(shard(ids), shard(labels), key_mask=shard(mask), group=group, layout=layout),
        ),
        (
            classifier,
            lambda: classifier(ids, classes, key_mask=mask),
            lambda: classifier(shard(ids), classes, key_mask=shard(mask), group=group, layout=layout),
        ),
    ]:
        expected = whole()
        expected.backward()
        expected_gradients = gradients(model)
        model.zero_grad()
        loss = part()
        loss.backward()
        summed = loss.detach().clone()
        for t in (summed, *gradients(model)):
            dist.all_reduce(t, group=group)
        assert_same([summed, *gradients(model)], [expected.detach(), *expected_gradients])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_encoders_over_two_ranks(layout: str) -> None:
    run_ranks(2, encoder_case, layout)


def checkpoint_case(group: dist.ProcessGroup) -> None:
    ids, labels = tokens(2, 12)
    shard = lambda x: shard_sequence(x, group, dim=1)
    results = []
    for activation_checkpointing in (False, True):
        options = config("RW").model_copy(update={"activation_checkpointing": activation_checkpointing})
        model = DecoderLM(options, dtype=torch.float64)
        loss = model(shard(ids), shard(labels), group=group)
        loss.backward()
        results.append([loss.detach(), *gradients(model)])
    assert_same(*results)


def test_activation_checkpointing_under_a_group() -> None:
    run_ranks(2, checkpoint_case)
