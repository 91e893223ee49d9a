"""The bidirectional encoder sees tokens on both sides and no padding."""

from __future__ import annotations

import pytest
import torch

from race_dist.models import MaskedLM, ModelConfig, SequenceClassifier
from race_dist.nn import RaceConfig

VOCAB = 17


def config(pattern: str = "RS", **more: object) -> ModelConfig:
    base = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "layer_pattern": pattern,
        "ffn_dim": 24,
        "race": RaceConfig(causal=False, num_tables=2, num_planes=2),
    }
    return ModelConfig(**(base | more))


@pytest.mark.parametrize("pattern", ["R", "S", "RS"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pattern: str, side: str) -> None:
    masked = MaskedLM(config(pattern, rope_base=None), dtype=torch.float64)
    classifier = SequenceClassifier(config(pattern, rope_base=None), 3, dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (1, 9))
    padded = torch.randint(0, VOCAB, (1, 14))
    kept = slice(5, None) if side == "left" else slice(None, 9)
    padded[:, kept] = ids
    mask = torch.zeros(1, 14, dtype=torch.bool)
    mask[:, kept] = True
    torch.testing.assert_close(masked(padded, key_mask=mask)[:, kept], masked(ids))
    torch.testing.assert_close(classifier(padded, key_mask=mask), classifier(ids))


def test_both_sides_are_seen_and_every_parameter_learns() -> None:
    net = MaskedLM(config(), dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (1, 8))
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % VOCAB
    assert not torch.allclose(net(ids)[0, 0], net(other)[0, 0])
    labels = torch.full_like(ids, -100)
    labels[0, 3] = 2
    net(ids, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_classifier_loss() -> None:
    net = SequenceClassifier(config(), 4, dtype=torch.float64)
    ids, labels = torch.randint(0, VOCAB, (3, 8)), torch.tensor([0, 3, 1])
    loss = net(ids, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(net(ids), labels))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"MaskedLM needs race.causal = False: make it with race=RaceConfig\(causal=False"):
        MaskedLM(config(race=RaceConfig()))
    with pytest.raises(ValueError, match="a W layer is causal"):
        MaskedLM(config("RW"))
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        SequenceClassifier(config(), 1)
    with pytest.raises(ValueError, match=r"labels must be int64 \[B\] = \[2\]"):
        SequenceClassifier(config(), 2)(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
