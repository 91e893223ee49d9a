"""The configuration: TOML, overrides, and error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from race_dist.training.config import ParallelConfig, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = "[model]\ndim = 16\nnum_layers = 1\nnum_heads = 2\nnum_kv_heads = 1\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text("steps = 30\n" + MODEL + "[optim]\nlr = 1e-3\nwarmup_steps = 5\n")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_overrides_are_toml_values_or_bare_words(config: Path) -> None:
    changed = load_config(
        config,
        [
            "steps=40",
            "optim.lr=3e-4",
            "data.path=/some/where.txt",
            "name = mine",
            "model.race.num_planes=5",
            "parallel.sp=2",
            'sample.prompt="a = b"',
        ],
    )
    assert (changed.steps, changed.optim.lr, changed.data.path, changed.name) == (40, 3e-4, "/some/where.txt", "mine")
    assert changed.model.race.num_planes == 5
    assert changed.parallel.sp == 2
    assert changed.sample.prompt == "a = b"
    assert changed.optim.warmup_steps == 5  # what is not overridden stays


def test_a_byte_model_has_256_tokens(config: Path) -> None:
    assert load_config(config).model.vocab_size == 256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"tiny.toml: unknown key optim.learning_rate; did you mean optim.lr\?"),
        ("optim.zzz=1", r"tiny.toml: unknown key optim.zzz; known are accumulate, beta1"),
        ("optim.warmup=1", r"unknown key optim.warmup; did you mean optim.warmup_steps\?"),
        ("optimizer.lr=1", r"unknown key optimizer; did you mean optim\?"),
        ("model.num_head=2", r"unknown key model.num_head; did you mean model.num_heads\?"),
        ("model.race.tables=2", r"unknown key model.race.tables; did you mean model.race.num_tables\?"),
        ("steps=0", r"tiny.toml: steps must be at least 1; got 0"),
        ("steps=many", r"steps must be a whole number; got 'many'"),
        ("optim.lr=nan", r"optim.lr must be a finite number; got nan"),
        ("optim.warmup_steps=30", r"optim.warmup_steps is 30, which leaves none of the 30 steps"),
        ("name=../elsewhere", r"name must match pattern"),
        ("precision=float16", r"precision must be 'float32', 'bfloat16' or 'float64'; got 'float16'"),
        ("model.race.num_planes=11", r"num_planes must be from 1 to 10"),
        ("data=5", r"data must be a table; got 5"),
        ("steps", r"--override 'steps' is not of the form a.b=value"),
        ("=5", r"is not of the form a.b=value"),
        ("steps.more=5", r"steps is a value, not a table"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(config: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(config, [override])
    assert "\n" not in str(caught.value)


def test_an_override_sets_one_key_only(config: Path) -> None:
    assert load_config(config, ["data.path=1\nsteps=99"]).steps == 30


def test_files_that_are_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad.toml is not valid TOML: .*line 1"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").touch()
    with pytest.raises(ValueError, match=r"empty.toml: model is missing"):
        load_config(tmp_path / "empty.toml")


def test_a_configuration_survives_json(config: Path) -> None:
    loaded = load_config(config, ["model.race.short_conv=3", "model.rope_base=5e5", "seed=7"])
    again = parse_config(json.loads(loaded.to_json()))
    assert again.model.race == loaded.model.race
    assert again.model.rope_base == 5e5
    assert again.to_json() == loaded.to_json()
    assert again.optim == loaded.optim


def test_one_seed_sets_all_seeds(config: Path) -> None:
    loaded = load_config(config, ["seed=7"])
    assert (loaded.model.seed, loaded.model.race.seed) == (7, 7)
    loaded = load_config(config, ["seed=7", "model.seed=1", "model.race.seed=2"])
    assert (loaded.model.seed, loaded.model.race.seed) == (1, 2)


@pytest.mark.parametrize(
    ("dp", "sp", "world", "mesh"),
    [(None, None, 4, (1, 4)), (2, None, 4, (2, 2)), (None, 1, 4, (4, 1)), (2, 2, 4, (2, 2)), (None, None, 1, (1, 1))],
)
def test_the_mesh_takes_all_ranks(dp: int | None, sp: int | None, world: int, mesh: tuple[int, int]) -> None:
    assert ParallelConfig(dp=dp, sp=sp).mesh(world) == mesh


@pytest.mark.parametrize(("dp", "sp", "world"), [(3, None, 4), (None, 3, 4), (2, 2, 3), (None, 2, 1), (8, None, 4)])
def test_a_mesh_that_does_not_fit_names_the_ranks_it_needs(dp: int | None, sp: int | None, world: int) -> None:
    with pytest.raises(ValueError, match=rf"ranks, but {world} (was|were) started; start"):
        ParallelConfig(dp=dp, sp=sp).mesh(world)
