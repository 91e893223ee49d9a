"""The planner's predictions for the measured calls."""

from __future__ import annotations

from race_dist import RaceConfig
from race_dist.benchmarks.attention import Shape
from race_dist.benchmarks.scaling.job import Job
from race_dist.models import ModelConfig
from race_dist.planning import Job as Planned
from race_dist.planning import Layout, Rates, make_plan
from race_dist.planning.communication_cost import scan_seconds
from race_dist.planning.cost_model import attention_seconds
from race_dist.planning.roofline import Roofline
from race_dist.training.config import TrainConfig


def attention_milliseconds(job: Job, shape: Shape, count: int) -> float:
    """Forward + backward of one attention call of ``count`` ranks: local computation, and the part of the exchange that is
    not hidden."""
    race = RaceConfig(num_tables=shape.tables, num_planes=shape.planes, normalization="global", decay="none", short_conv=0)
    model = ModelConfig(vocab_size=256, dim=shape.heads * shape.head_dim, num_layers=1, num_heads=shape.heads, race=race)
    cluster, rates = job.cluster(count), Rates()
    planned = Planned.checked(model, shape.length * count, 1, "bfloat16" if shape.dtype == "bfloat16" else "float32")
    local = [s * shape.length for s in attention_seconds(planned, Layout(1, count), Roofline(planned, cluster, rates))]
    half_state = 4 * shape.heads * shape.tables * 2**shape.planes * (shape.head_dim + 1) / 2
    one, link = 0.0, cluster.link(count)
    if count > 1:
        one = scan_seconds(count, half_state, link, ranks_per_node=cluster.per_node)
    exposed = sum(max(0.0, one - rates.overlap * part / 4) + max(0.0, one - rates.overlap * part / 2) for part in local)
    return 1e3 * (sum(local) + exposed)


def step_seconds(job: Job, config: TrainConfig, tokens: int, chunk_size: int, count: int) -> float:
    """Seconds of one streamed step of ``count`` ranks."""
    planned = Planned(config.model, tokens, 1, config.precision, config.compile)
    return make_plan(planned, Layout(1, count, chunk_size), job.cluster(count)).step
