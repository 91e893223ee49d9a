"""The learning rate schedule and weight decay."""

from __future__ import annotations

import math

import pytest
from torch import nn

from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import RaceConfig
from race_dist.training.config import OptimConfig
from race_dist.training.optim import build_optimizer, learning_rate, set_learning_rate


def test_the_rate_warms_up_linearly_and_decays_along_a_cosine() -> None:
    config = OptimConfig(lr=2e-3, final_lr=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([2e-4 * n for n in range(1, 11)])
    assert max(rates) == pytest.approx(2e-3)
    assert rates[59] == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5))  # half way down
    assert rates[-1] == pytest.approx(2e-4)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_without_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.0, warmup_steps=0)
    assert learning_rate(0, 4, config) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(3, 4, config) == pytest.approx(0.0)


def test_weight_decay_applies_to_linear_layers_only() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(8, 4),
            "mix": nn.Linear(4, 4),
            "conv": nn.Conv1d(4, 4, 3, groups=4),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 8, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    model["head"].weight = model["embed"].weight
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    assert named == {
        "embed.weight": 0.0,
        "mix.weight": 0.3,
        "mix.bias": 0.0,
        "conv.weight": 0.0,
        "conv.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "frozen.weight": None,
        "frozen.bias": None,
    }


def test_planes_have_their_own_learning_rate() -> None:
    config = OptimConfig(lr=1e-2, planes_lr=5e-2, warmup_steps=2)
    model = DecoderLM(ModelConfig(vocab_size=8, dim=8, num_layers=2, num_heads=2, race=RaceConfig(train_planes=True)))
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, learning_rate(0, 10, config))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(1 for _ in model.parameters())
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(2.5e-2 if name.endswith(".planes") else 5e-3), name
    assert len(build_optimizer(model, OptimConfig()).param_groups) == 2
