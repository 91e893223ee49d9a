"""A masked token is absent over several ranks too: each row equals the row without its padding on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks
from torch import Tensor
from torch._dynamo.utils import counters

from race_dist.models import DecoderLM, MaskedLM, ModelConfig, SequenceClassifier
from race_dist.nn import RaceConfig
from race_dist.parallel import shard_sequence

TOTAL = 36
DOCUMENTS = {"contiguous": [0, 9, 9, 22, 36], "zigzag": [0, 12, 12, 36]}
RACE: dict[str, dict[str, object]] = {
    "token": {"rope_base": 50.0},
    "multiscale": {"decay": "multiscale", "normalization": "global"},
    "bucket": {"decay": "none", "normalization": "bucket", "qk_norm": False},
}


def config(pattern: str, **race: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=19,
        dim=16,
        num_layers=len(pattern),
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=16,
        layer_pattern=pattern,
        window=5,
        race=RaceConfig(num_tables=2, num_planes=2, **race),
    )


def padding(batch: int, total: int = TOTAL, seed: int = 0) -> Tensor:
    """Padding inside each row; the second row begins with a whole shard of padding, the third is all padding."""
    mask = torch.rand(batch, total, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[1:2, : total // 2] = False
    mask[2:] = False
    return mask


def tokens(batch: int, total: int = TOTAL) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, 19, (batch, total), generator=generator) for _ in range(2))
    labels[:, 3:9] = -100
    return ids, labels


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def summed(group: dist.ProcessGroup, tensors: list[Tensor]) -> list[Tensor]:
    """The same over the ranks."""
    result = [t.detach().clone() for t in tensors]
    for t in result:
        dist.all_reduce(t, group=group)
    return result


def decoder_case(
    group: dist.ProcessGroup, pattern: str, layout: str, lengths: list[int] | None, race: str, documents: list[int] | None
) -> None:
    ids, labels = tokens(1 if documents else 3)
    mask, cu = padding(ids.shape[0]), None if documents is None else torch.tensor(documents)
    model = DecoderLM(config(pattern, **RACE[race]), dtype=torch.float64)
    if lengths is None:
        shard = lambda x: shard_sequence(x, group, dim=1, layout=layout, cu_seqlens=cu)
    else:
        shard = lambda x: x.split(lengths, 1)[dist.get_rank(group)]
    expected_logits = torch.zeros(*ids.shape, 19, dtype=torch.float64)
    count, expected_loss = int((labels[mask] != -100).sum()), torch.zeros((), dtype=torch.float64)
    for b, real in enumerate(mask):
        inside = None if cu is None else torch.cat([torch.zeros(1, dtype=torch.int64), real.cumsum(0)])[cu]
        expected_logits[b, real] = model(ids[b : b + 1, real], cu_seqlens=inside)[0].detach()
        expected_loss = expected_loss + model(
            ids[b : b + 1, real], labels[b : b + 1, real], cu_seqlens=inside, num_targets=count
        )
    expected = gradients(model, expected_loss)
    options = {"cu_seqlens": cu, "key_mask": shard(mask), "group": group, "layout": layout}
    logits = model(shard(ids), **options)
    close(torch.where(shard(mask)[..., None], logits, 0), shard(expected_logits))
    loss = model(shard(ids), shard(labels), **options)
    close(summed(group, [loss, *gradients(model, loss)]), [expected_loss.detach(), *expected])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pattern", "race"), [("RWS", "token"), ("RR", "multiscale"), ("RW", "bucket")])
def test_decoder_over_three_ranks(pattern: str, race: str, packed: bool, layout: str) -> None:
    run_ranks(3, decoder_case, pattern, layout, None, race, DOCUMENTS[layout] if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [[5, 0, 31], [33, 3, 0], [2, 33, 1]])
def test_shards_of_any_length(lengths: list[int], packed: bool) -> None:
    run_ranks(3, decoder_case, "RWS", "contiguous", lengths, "token", DOCUMENTS["contiguous"] if packed else None)


def turns_case(group: dist.ProcessGroup, pattern: str, layout: str) -> None:
    """Padded pieces in sequence, each over the ranks; the last piece has no mask."""
    ids, mask = tokens(3)[0], padding(3)
    mask[:, 24:] = True
    model = DecoderLM(config(pattern, rope_base=50.0), dtype=torch.float64)
    shard = lambda x: shard_sequence(x, group, dim=1, layout=layout)
    weight = torch.randn(3, TOTAL, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    carry, total = None, torch.zeros((), dtype=torch.float64)
    for i, (piece, real, w) in enumerate(zip(ids.split(12, 1), mask.split(12, 1), weight.split(12, 1), strict=True)):
        h, carry = model.hidden(shard(piece), carry, key_mask=shard(real) if i < 2 else None, group=group, layout=layout)
        total = total + (h * shard(w)).sum()
    assert carry is not None
    expected = torch.zeros((), dtype=torch.float64)
    for b, real in enumerate(mask):
        alone, last = model.hidden(ids[b : b + 1, real])
        expected = expected + (alone * weight[b : b + 1, real]).sum()
        assert last is not None
        assert int(carry.position[b]) == int(last.position)
        for mine, theirs in zip(carry.layers, last.layers, strict=True):
            for a, e in zip(mine.tensors(), theirs.tensors(), strict=True):
                close(a[b].to(e.dtype), e[0])
    close(summed(group, [total, *gradients(model, total)]), [expected.detach(), *gradients(model, expected)])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_turns_over_two_ranks(layout: str) -> None:
    run_ranks(2, turns_case, "RW", layout)


def encoder_case(group: dist.ProcessGroup, layout: str) -> None:
    ids, labels = tokens(3)
    mask, classes = padding(3), torch.tensor([2, 0, 1])
    shard = lambda x: shard_sequence(x, group, dim=1, layout=layout)
    model = MaskedLM(config("RS", causal=False), dtype=torch.float64)
    classifier = SequenceClassifier(config("RS", causal=False), 3, dtype=torch.float64)
    rows = [(ids[b : b + 1, real], labels[b : b + 1, real]) for b, real in enumerate(mask)]
    count = int((labels[mask] != -100).sum())
    expected = sum(model(x, y, num_targets=count) for x, y in rows)
    options = {"key_mask": shard(mask), "group": group, "layout": layout}
    loss = model(shard(ids), shard(labels), **options)
    close(summed(group, [loss, *gradients(model, loss)]), [expected.detach(), *gradients(model, expected)])
    expected = torch.nn.functional.cross_entropy(torch.cat([classifier(x) for x, _ in rows]), classes)
    loss = classifier(shard(ids), classes, **options)
    close(summed(group, [loss, *gradients(classifier, loss)]), [expected.detach(), *gradients(classifier, expected)])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_encoders_over_two_ranks(layout: str) -> None:
    run_ranks(2, encoder_case, layout)


def short_case(group: dist.ProcessGroup, total: int, targets: bool) -> None:
    """Fewer tokens than ranks, no tokens, and no targets."""
    ids, labels = tokens(2, total)
    labels = labels if targets else torch.full_like(labels, -100)
    model = DecoderLM(config("RWS"), dtype=torch.float64)
    shard = lambda x: shard_sequence(x, group, dim=1)
    one = model(ids, labels)
    expected = [one.detach(), *gradients(model, one)]
    for mask in (None, torch.ones_like(ids, dtype=torch.bool)):
        loss = model(shard(ids), shard(labels), group=group, key_mask=None if mask is None else shard(mask))
        close(summed(group, [loss, *gradients(model, loss)]), expected)


@pytest.mark.parametrize(("total", "targets"), [(0, True), (1, True), (2, True), (7, False)])
def test_shards_without_tokens_or_targets(total: int, targets: bool) -> None:
    run_ranks(3, short_case, total, targets)


def one_mask_case(group: dist.ProcessGroup) -> None:
    ids = tokens(1, 8)[0]
    mask = torch.ones_like(ids, dtype=torch.bool) if dist.get_rank(group) == 0 else None
    DecoderLM(config("R"), dtype=torch.float64)(ids, key_mask=mask, group=group)


def test_a_mask_on_one_rank_alone_is_an_error() -> None:
    with pytest.raises(RankError, match="the ranks do not agree on") as caught:
        run_ranks(2, one_mask_case)
    assert "key_mask" in str(caught.value)


def compiled_case(group: dist.ProcessGroup, pattern: str) -> tuple[list[Tensor], int]:
    """Padded pieces through blocks compiled with fullgraph: gradients, and the number of graphs."""
    torch.compiler.reset()
    counters.clear()
    ids, mask, weight = compiled_inputs()
    model = DecoderLM(config(pattern), dtype=torch.float64)
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    shard = lambda x: shard_sequence(x, group, dim=1)
    carry, total = model.zero_carry(3), torch.zeros((), dtype=torch.float64)
    for piece, real, w in zip(ids.split(18, 1), mask.split(18, 1), weight.split(18, 1), strict=True):
        h, carry = model.hidden(shard(piece), carry, key_mask=shard(real), group=group)
        total = total + (h * shard(w)).sum()
    return summed(group, [total, *gradients(model, total)]), counters["stats"]["unique_graphs"]


def compiled_inputs() -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(3, TOTAL, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tokens(3)[0], padding(3), weight


def test_compiled_blocks_stay_one_graph() -> None:
    ids, mask, weight = compiled_inputs()
    model = DecoderLM(config("RW"), dtype=torch.float64)
    expected = sum((model.hidden(ids[b : b + 1, real])[0] * weight[b : b + 1, real]).sum() for b, real in enumerate(mask))
    right = [expected.detach(), *gradients(model, expected)]
    for found, graphs in run_ranks(2, compiled_case, "RW"):
        close(found, right)
        assert graphs == 4  # of each block two: the first piece's carry wants no gradient
