"""Protocols of the quality benchmark: their content, errors, and the order of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from race_dist.benchmarks.quality.protocol import Protocol, Run, load_protocol, settings_digest
from race_dist.benchmarks.quality.report import markdown, summary, write_report
from race_dist.benchmarks.quality.run import Results, pending
from race_dist.benchmarks.quality.variants import build_model, model_config, parameter_count, state_bytes

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "quality").glob("*.toml"))


def protocol(**changes: object) -> Protocol:
    base: dict[str, object] = {
        "name": "p",
        "steps": 4,
        "seeds": [3, 4],
        "rates": [1e-3, 2e-3],
        "optim": {"warmup_steps": 1},
        "language": {},
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2},
        "variant": [{"name": "a"}, {"name": "b", "rates": [5e-3], "model": {"layer_pattern": "W", "window": 4}}],
    }
    return Protocol.check(base | changes)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_protocol_of_the_repository_builds_its_models(config: Path) -> None:
    """On the meta device: parameters within one percent of the protocol's number."""
    loaded = load_protocol(config)
    for variant in loaded.variant:
        model_config(loaded, variant, 0)
    if loaded.parameters is not None:
        for variant in loaded.variant[:4]:
            count = parameter_count(build_model(loaded, variant, 0, "meta"))
            assert count == pytest.approx(loaded.parameters, rel=0.01), variant.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall": {"train": [{"length": 64, "pairs": 4}], "test": [{"length": 64, "pairs": 4}]}}, "give one task"),
        ({"language": None}, "give one task"),
        ({"variant": [{"name": "a"}, {"name": "a"}]}, "a is there twice"),
        ({"steps": 2, "optim": {"warmup_steps": 2}}, "leaves none of the 2 steps"),
        ({"rates": [0.0]}, "rates"),
        ({"seeds": [-1]}, "seeds"),
        ({"variants": []}, "unknown key"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        protocol(**changes)
    assert "\n" not in str(error.value)


def test_queries_must_fit_their_sequence() -> None:
    kind = {"length": 64, "pairs": 17}
    with pytest.raises(ValueError, match="need a length of 68; got 64"):
        protocol(language=None, recall={"train": [kind], "test": [kind]})


def test_a_variant_that_is_no_model_is_named() -> None:
    broken = protocol(variant=[{"name": "wide", "model": {"dims": 3}}])
    with pytest.raises(ValueError, match=r"variant 'wide': unknown key model.dims; did you mean model.dim\?"):
        model_config(broken, broken.variant[0], 0)
    baseline = protocol(variant=[{"name": "baseline", "mixer": "gated_delta", "model": {"layer_pattern": "W"}}])
    with pytest.raises(ValueError, match="layer_pattern needs an R"):
        model_config(baseline, baseline.variant[0], 0)
    with pytest.raises(ValueError, match="no such variant; there are: a; b"):
        protocol().chosen(["c"])


def test_rates_come_first_and_seeds_get_the_best(tmp_path: Path) -> None:
    p = protocol()
    results = Results(tmp_path / "r.json", p)
    keys = lambda: [run.key for run in pending(p, results)]
    assert keys() == [("a", 1e-3, 3), ("b", 5e-3, 3), ("a", 2e-3, 3)]
    results.add(Run(p.variant[0], 1e-3, 3), {"bits_per_byte": 2.0})
    results.add(Run(p.variant[1], 5e-3, 3), {"failed": "no memory"})
    assert keys() == [("a", 2e-3, 3)]  # every rate of b failed
    results.add(Run(p.variant[0], 2e-3, 3), {"bits_per_byte": 1.5})
    assert keys() == [("a", 2e-3, 4)]
    again = Results(tmp_path / "r.json", p)
    assert [run.key for run in pending(p, again)] == [("b", 5e-3, 3), ("a", 2e-3, 4)]  # failed runs are retried


def test_results_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    p, path = protocol(), tmp_path / "r.json"
    results = Results(path, p)
    results.add(Run(p.variant[0], 1e-3, 3), {"bits_per_byte": 2.0})
    Results(path, protocol(about="another text", seeds=[3, 4, 5], rates=[1e-3]))
    with pytest.raises(ValueError, match="runs of 'a' that were made with other settings"):
        Results(path, protocol(steps=5))
    with pytest.raises(ValueError, match="results of the protocol 'p', not of 'q'"):
        Results(path, protocol(name="q"))
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"r.json"):
        Results(path, p)


def test_the_digest_depends_on_what_decides_a_run() -> None:
    p = protocol()
    same, other = protocol(seeds=[9]), protocol(batch_size=8)
    assert settings_digest(p, p.variant[0]) == settings_digest(same, same.variant[0])
    assert settings_digest(p, p.variant[0]) != settings_digest(other, other.variant[0])
    assert settings_digest(p, p.variant[0]) != settings_digest(p, p.variant[1])


def test_feed_forwards_even_the_parameters_out() -> None:
    p = protocol(
        parameters=40_000,
        variant=[{"name": "R"}, {"name": "S", "model": {"layer_pattern": "S"}}, {"name": "delta", "mixer": "gated_delta"}],
    )
    counts = [parameter_count(build_model(p, v, 0)) for v in p.variant]
    assert all(count == pytest.approx(40_000, abs=3 * 16 * 16 * 2) for count in counts)
    small = protocol(parameters=1000)
    with pytest.raises(ValueError, match="raise it or make the model smaller"):
        build_model(small, small.variant[0], 0)


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("R", 2 * (2 * (32 * 9 + 1) + 3 * 32)),  # mass and values of 32 buckets and the decay per head; tails of q and k
        ("W", 2 * (3 * 2 * 16)),
        ("S", 2 * (2 * 10 * 16)),
    ],
)
def test_bytes_of_state(pattern: str, numbers: int) -> None:
    p = protocol(
        variant=[{"name": "m", "model": {"layer_pattern": pattern, "window": 4, "race": {"num_tables": 2, "num_planes": 4}}}]
    )
    assert state_bytes(build_model(p, p.variant[0], 0), 10) == 2 * numbers


def test_a_page_says_what_was_found(tmp_path: Path) -> None:
    p = protocol()
    results = Results(tmp_path / "r.json", p)
    task = {"text": "t", "digest": "d" * 64, "training_bytes": 1000, "passes": 2.5}
    common = {"parameters": 10, "state_bytes": 2048, "seconds": 1.0, "by_position": [2.0, 1.0], "task": task}
    for rate, seed, bits in ((1e-3, 3, 2.0), (2e-3, 3, 1.5), (2e-3, 4, 1.7)):
        results.add(Run(p.variant[0], rate, seed), {"bits_per_byte": bits, **common})
    results.add(Run(p.variant[1], 5e-3, 3), {"failed": "no memory"})
    (row,) = summary(results.data)
    assert (row["mean"], row["low"], row["high"], row["rate"], row["seeds"]) == (pytest.approx(1.6), 1.5, 1.7, 2e-3, [3, 4])
    page = markdown(results.data)
    assert "| a | 1.6000 | 1.5000 to 1.7000 | 2 | 0.002 (0.001, 0.002) |" in page
    assert "read 2.50 times" in page
    assert "b, lr 0.005, seed 3: no memory" in page
    paths = write_report(results.data, tmp_path / "r.json")
    assert [path.suffix for path in paths] == [".md", ".png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["bits_per_byte"] == 2.0
