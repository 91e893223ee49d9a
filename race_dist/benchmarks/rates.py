"""What a profiled streamed step says of the planner's rates: kernels sorted into products, attention and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from race_dist.planning import Cluster, Job, Layout, Rates
from race_dist.planning.clusters import GPU
from race_dist.planning.cost_model import Roofline, attention_seconds, count_passes, elementwise_seconds, matmul_seconds

PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm")  # cuBLAS's names; PyTorch's on a CPU
LEAST = 1e-3  # of a rate: a profile without such kernels is not the end of a benchmark
ATTENTION = (
    "race_tile_sums_",
    "race_scan_",
    "race_recurrent_",
    "race_materialized_",
    "race_hopper_",
    "race_unproject_",
    "race_decode_",
    "race_dist::attention",
)  # race_dist.kernels; the operator, on a CPU


def kind_of(kernel: str) -> str:
    """ "products", "attention" or "element-wise" of a kernel's name; copies between host and device are none ("")."""
    name = kernel.lower()
    if name.startswith(("memcpy htod", "memcpy dtoh", "memset")):
        return ""
    if any(part in name for part in ATTENTION):
        return "attention"
    return "products" if any(part in name for part in PRODUCTS) else "element-wise"


def seconds_by_kind(kernels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of ``{"name", "ms"}`` each."""
    spent = {"products": 0.0, "attention": 0.0, "element-wise": 0.0}
    for kernel in kernels:
        kind = kind_of(kernel["name"])
        if kind:
            spent[kind] += kernel["ms"] / 1e3
    return spent


def measured_rates(job: Job, chunk_size: int, gpu: GPU, kernels: Sequence[Mapping[str, Any]], *, source: str) -> Rates:
    """The rates at which the planner predicts what was measured. What one number cannot tell apart (forward and backward)
    keeps the proportion of the defaults.

    Args:
        job: the profiled step: its context, precision, and whether blocks were compiled.
        chunk_size: of its chunks.
        gpu: as the planner knows it; "cpu" too.
        kernels: with their times over the whole step.
        source: in words.
    """
    spent, layout, defaults = seconds_by_kind(kernels), Layout(1, 1, chunk_size), Rates()
    features = job.model.race.num_features
    ideal = Roofline(job, Cluster(gpu, 1), Rates(matmul=1.0, bandwidth=defaults.bandwidth, attention={features: (1.0, 1.0)}))
    forward, backward = attention_seconds(job, layout, ideal)
    attention = job.context * job.batch * (forward * count_passes(job, layout).forward + backward)
    slower = max(LEAST, spent["attention"] / attention)
    matmul = max(LEAST, _product_rate(job, layout, gpu, spent["products"]))
    rest = spent["element-wise"] / elementwise_seconds(job, layout, ideal)
    names = ("compiled_forward", "compiled_backward") if job.compiled else ("elementwise_forward", "elementwise_backward")
    scaled = {name: round(getattr(defaults, name) * rest, 3) for name in names}
    return Rates(
        **{
            **asdict(defaults),
            **scaled,
            "source": source,
            "matmul": round(matmul, 3),
            "attention": {features: (round(slower, 3), round(slower, 3))},
        }
    )


def _product_rate(job: Job, layout: Layout, gpu: GPU, seconds: float) -> float:
    """The fraction of the peak at which products take so long: some are bound by their bytes at any rate."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        slow = matmul_seconds(job, layout, Roofline(job, Cluster(gpu, 1), Rates(matmul=middle))) > seconds
        low, high = (middle, high) if slow else (low, middle)
    return high
