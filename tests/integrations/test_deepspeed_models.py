"""Models under DeepSpeed with sequence parallelism: Ulysses, transformers, ALST's tiles, checkpoints, refused settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import spawn_ranks
from tests.integrations import deepspeed_ranks
from tests.integrations.once import once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the two ranks, from one launch; they must be equal."""

    def launch() -> dict[str, Any]:
        outcomes = spawn_ranks(2, deepspeed_ranks.everything, str(tmp_path_factory.mktemp("deepspeed")), timeout=60.0)
        assert not any(o.error for o in outcomes), "\n".join(o.error or "" for o in outcomes)
        return dict(outcomes[0].value)

    return dict(once(tmp_path_factory, "deepspeed-models", launch))


def job(found: dict[str, Any], name: str) -> Any:
    assert not isinstance(found[name], str), found[name]
    return found[name]


def test_sketch_attention_over_shards_is_that_of_one_rank(found: dict[str, Any]) -> None:
    errors = job(found, "drop_in")
    assert len(errors) == 4
    assert max(errors.values()) < 1e-10, errors


def test_ulysses_modules_are_replaced_and_train_alike(found: dict[str, Any]) -> None:
    result = job(found, "swap_ulysses")
    assert result["kind"] == "SketchAttention"
    assert result["error"] < 1e-5


def test_a_run_resumes_bitwise_at_each_zero_stage(found: dict[str, Any]) -> None:
    result = job(found, "resume")
    assert set(result) == {0, 1, 2, 3}
    for stage, (whole, resumed) in result.items():
        assert whole == resumed, f"ZeRO-{stage}"
        assert len(set(whole)) == 3


def test_stages_have_the_same_losses(found: dict[str, Any]) -> None:
    losses = [whole for whole, _ in job(found, "resume").values()]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_transformers_models_train_as_on_one_rank(found: dict[str, Any]) -> None:
    errors = job(found, "transformers")
    assert set(errors) == {"ZeRO-1", "ZeRO-3", "ZeRO-1 tiled", "ZeRO-3 tiled"}
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mpu", "lets the weights of these ranks diverge under ZeRO-3: leave mpu out"),
        ("mesh", "gradients are not summed over the ranks that share a sequence: leave it out"),
        ("mesh_param", "gradients are not summed over the ranks that share a sequence: leave it out"),
        ("one bit", "exchanges compressed momenta instead of gradients"),
        ("predivide", "change the scale"),
        ("prescale", "change the scale"),
        ("mics", '"zero_optimization.mics_shard_size" reduces over its own groups'),
        ("hpz", '"zero_optimization.zero_hpz_partition_size" reduces over its own groups'),
        ("indivisible", "3 does not divide the number of ranks, 2"),
        ("size", "must be an integer of at least 1, or \"auto\"; got '2'"),
        ("section", '"race_attention": unknown key num_plane; did you mean num_planes?'),
        ("layout", '"race_attention": layout'),
        ("softmax", "layers [0, 1] are softmax attention and would attend to their own shard only"),
        ("linear", "Linear has no attention that supports sequence parallelism"),
        ("late", "the optimizer was created before the attention was replaced and lacks 14 new parameters"),
        ("ulysses", 'give "race_attention" in the DeepSpeed configuration to replace it'),
    ],
)
def test_settings_with_wrong_gradients_are_refused(found: dict[str, Any], name: str, message: str) -> None:
    assert message in job(found, "refusals")[name]


def test_the_wirings_that_are_refused_or_made_up_for_are_wrong_in_the_installed_deepspeed(found: dict[str, Any]) -> None:
    """If this fails, DeepSpeed has changed, and docs/deepspeed.md and deepspeed/config.py must be updated."""
    result = job(found, "raw")
    for diverging in ("mesh", "mpu"):
        assert result[diverging][0] > 0.1, diverging
    apart, ratio = result["reduce-scatter"]
    assert apart == 0
    assert ratio == pytest.approx(0.5, abs=1e-5)


def test_bytes_do_not_depend_on_the_length(found: dict[str, Any]) -> None:
    sizes = job(found, "launch_sizes")
    assert sizes["1024"] == sizes["4096"] > 0


def test_sketch_attention_refuses_unsupported_arguments() -> None:
    import torch

    from race_dist.integrations.deepspeed import SketchAttention
    from race_dist.nn import RaceConfig

    with pytest.raises(ValueError, match=r"short_conv, decay needs the layer's input"):
        SketchAttention(RaceConfig(num_heads=2, head_dim=4, short_conv=4, decay="token"))
    module, x = SketchAttention(RaceConfig(num_heads=2, head_dim=4)), torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match="does not apply rotary positions"):
        module(x, x, x, 0, (x, x))
    with pytest.raises(ValueError, match="takes no mask"):
        module(x, x, x, 0, None, torch.ones(5, 5))
    with pytest.raises(ValueError, match="batch_dim_idx must be 0 or 1; got 2"):
        module(x, x, x, 2)


def test_the_old_names_of_the_mesh_work_with_a_warning() -> None:
    from race_dist.integrations import deepspeed

    with pytest.warns(DeprecationWarning, match="is now race_dist.integrations.deepspeed.SequenceParallelMesh"):
        assert deepspeed.Shared is deepspeed.SequenceParallelMesh
    with (
        pytest.warns(DeprecationWarning, match=r"is now initialize\(sequence_mesh=...\)"),
        pytest.raises(TypeError, match="sequence_mesh must be a SequenceParallelMesh; got int 3"),
    ):
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config={}, shared=3)
