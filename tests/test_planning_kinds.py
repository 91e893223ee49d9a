"""A kind of mixing layer that the package does not know: an error without a cost, a plan with one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import LayerKind, MixingLayer, layer_kind, register_layer_kind
from race_dist.nn.registry import unregister_layer_kind
from race_dist.planning import Cluster, Job, Layout, find_gpu, make_plan
from race_dist.planning.layer_costs import LayerCost, norm_activations
from race_dist.planning.parameter_counts import parameter_count
from race_dist.planning.quantities import ActivationBytes, ChunkShape, Cost, LinearShape


class Twice(LayerKind):
    """Another letter for window layers."""

    letter, name, options_name = "T", "second window", "softmax"

    def build(self, model: ModelConfig, layer: int, **options: object) -> MixingLayer:  # type: ignore[override]
        return layer_kind("W").build(model, layer, **options)  # type: ignore[arg-type]


class TwiceCost(LayerCost):
    """The methods that a cost must have; parameters are counted from the layer itself."""

    def linear_layers(self, m: ModelConfig) -> list[LinearShape]:
        return [LinearShape(m.dim, m.dim)] * 4

    def activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        return ActivationBytes(norm_activations(job))

    def compiled_activations(self, job: Job, chunk: ChunkShape) -> ActivationBytes:
        return ActivationBytes(0)

    def elementwise_traffic(self, job: Job) -> tuple[float, float]:
        return 0.0, 0.0

    def head_cost(self, job: Job, chunk: ChunkShape) -> tuple[Cost, Cost]:
        return Cost(1, 1), Cost(2, 2)

    def definition_flops(self, m: ModelConfig) -> float:
        return 1.0

    def state_numbers(self, m: ModelConfig) -> int:
        return 1000


@pytest.fixture
def kind() -> Iterator[LayerKind]:
    registered = register_layer_kind(Twice())
    yield registered
    unregister_layer_kind("T")


def test_a_kind_without_a_cost_is_an_error_that_names_it(kind: LayerKind) -> None:
    model = ModelConfig(vocab_size=256, dim=32, num_layers=2, num_heads=2, layer_pattern="T")
    with pytest.raises(ValueError, match=r"the planner has no cost for layers of kind T \(second window\): give its LayerKind"):
        make_plan(Job(model, 4096), Layout(1, 1, 1024), Cluster(find_gpu("h100"), 1))


def test_a_kind_with_a_cost_is_planned(kind: LayerKind) -> None:
    kind.cost = TwiceCost("T")
    model = ModelConfig(vocab_size=256, dim=32, num_layers=3, num_heads=2, layer_pattern="TTR")
    assert parameter_count(model) == sum(p.numel() for p in DecoderLM(model).parameters())
    plan = make_plan(Job(model, 4096), Layout(1, 2, 1024), Cluster(find_gpu("h100"), 2))
    states = plan.memory.kinds["chunk-start states"]
    only_race = make_plan(
        Job(model.model_copy(update={"num_layers": 1, "layer_pattern": "R"}), 4096),
        Layout(1, 2, 1024),
        Cluster(find_gpu("h100"), 2),
    )
    assert states == only_race.memory.kinds["chunk-start states"] + 2 * 2 * 8 * 1000  # two layers, two chunks, float64
    assert plan.exchange.bytes["sketches (scan)"] > only_race.exchange.bytes["sketches (scan)"]
