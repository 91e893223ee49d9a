"""The planner: predicts memory, communication and time of a training run before GPUs are requested.

from race_dist.planning import Cluster, Job, find_gpu, recommend
plan = recommend(Job(model_config, context=75_000_000), Cluster(find_gpu("gh200"), 8))
"""

from race_dist.planning.clusters import GPUS, Cluster, find_gpu
from race_dist.planning.device_rates import Rates, load_rates
from race_dist.planning.layer_costs import LayerCost, layer_cost, register_layer_cost
from race_dist.planning.layout import Job, Layout, parse_count
from race_dist.planning.memory import Memory, memory
from race_dist.planning.plan import Choices, Plan, largest_context, make_plan, recommend
from race_dist.planning.race_costs import RaceCost
from race_dist.planning.report import limits, print_report, to_json
from race_dist.planning.softmax_costs import SoftmaxCost, WindowCost

for _cost in (RaceCost("R"), SoftmaxCost("S"), WindowCost("W")):
    register_layer_cost(_cost)

__all__ = [
    "GPUS",
    "Choices",
    "Cluster",
    "Job",
    "LayerCost",
    "Layout",
    "Memory",
    "Plan",
    "Rates",
    "find_gpu",
    "largest_context",
    "layer_cost",
    "limits",
    "load_rates",
    "make_plan",
    "memory",
    "parse_count",
    "print_report",
    "recommend",
    "register_layer_cost",
    "to_json",
]
