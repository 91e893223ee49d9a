"""Invalid options raise errors that name the value and the fix."""

from __future__ import annotations

import pytest

from race_dist.models import ModelConfig
from race_dist.nn import RaceConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_planes": 11}, "num_planes must be from 1 to 10.*got 11"),
        ({"num_tables": 0}, "num_tables must be at least 1; got 0"),
        ({"beta_init": -1.0}, "beta_init must be positive and finite, .*; got -1"),
        ({"beta_init": (1.0, 2.0), "num_heads": 4}, "beta_init has 2 numbers for 4 key/value heads"),
        ({"short_conv": 1}, "short_conv must be 0 .* got 1"),
        ({"decay": "slow"}, "'none', 'multiscale' or 'token'"),
        ({"causal": False, "decay": "token"}, "decay='token' needs an order .* set decay='none'"),
        ({"causal": False, "normalization": "none"}, "set normalization='global'"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads = 6 must be a multiple of num_kv_heads = 4"),
        ({"dim": 10, "num_heads": 4}, "dim = 10 is no multiple of num_heads = 4"),
        ({"dim": 12, "num_heads": 4, "decay": "none"}, "even head_dim; got 3"),
        ({"rope_base": 0.5}, "rope_base must be above 1; got 0.5"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"planes": 4}, "unknown key planes; did you mean num_planes"),
    ],
)
def test_race_config(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaceConfig(**fields)


MODEL = {"vocab_size": 9, "dim": 16, "num_layers": 3, "num_heads": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1; got 0"),
        ({"layer_pattern": "RX"}, "layer_pattern is a string of R = RACE, .* got 'RX'"),
        ({"layer_pattern": ""}, "layer_pattern is a string"),
        ({"window": 1}, "window must be at least 2"),
        ({"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"num_heads": 5}, "dim = 16 is no multiple of num_heads = 5"),
        ({"race": {"dim": 32}}, r"race.dim = 32 but the model's dim = 16: leave race.dim out"),
        ({"race": {"head_dim": 8}, "head_dim": 4}, r"race.head_dim = 8 but the model's head_dim = 4"),
        ({"norm_eps": 0.0}, "norm_eps must be at least 1e-30; got 0"),
    ],
)
def test_model_config(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(MODEL | fields))


def test_the_model_fills_the_race_config() -> None:
    config = ModelConfig(**MODEL, num_kv_heads=2, rope_base=5000.0, layer_pattern="RRW", race=RaceConfig(decay="none"))
    race = config.race
    assert (race.dim, race.num_heads, race.num_kv_heads, race.resolved_head_dim, race.rope_base) == (16, 4, 2, 4, 5000.0)
    given = lambda **fields: ModelConfig(**MODEL, rope_base=5000.0, race=RaceConfig(**fields)).race.rope_base
    assert given() is None
    assert given(rope_base=700.0) == 700.0
    assert given(decay="none", rope_base=None) is None
    assert RaceConfig().resolved_rope_base() is None
    assert RaceConfig(causal=False).resolved_rope_base() == 10000.0
    assert config.layer_kinds == "RRW"
    assert config.resolved_ffn_dim == 64
    again = ModelConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.race.rope_base == 5000.0


def test_every_field_says_what_it_is() -> None:
    for kind in (RaceConfig, ModelConfig):
        assert all(field.description for field in kind.model_fields.values())
