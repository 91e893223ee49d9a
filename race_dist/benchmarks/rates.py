"""The planner's rates from a profile of a streamed step: its kernels sorted into matrix products, attention and
element-wise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from race_dist.planning import Cluster, Job, Layout, Rates
from race_dist.planning.clusters import GPU
from race_dist.planning.cost_model import attention_seconds, count_passes, elementwise_seconds, matmul_seconds
from race_dist.planning.roofline import Roofline

PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm")  # cuBLAS's names; PyTorch's on a CPU
MIN_RATE = 1e-3  # a profile without such kernels must not end a benchmark
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
    """ "products", "attention" or "element-wise" by a kernel's name; "" for copies between host and device."""
    name = kernel.lower()
    if name.startswith(("memcpy htod", "memcpy dtoh", "memset")):
        return ""
    if any(part in name for part in ATTENTION):
        return "attention"
    return "products" if any(part in name for part in PRODUCTS) else "element-wise"


def seconds_by_kind(kernels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by kind of kernels ``{"name", "ms"}``."""
    spent = {"products": 0.0, "attention": 0.0, "element-wise": 0.0}
    for kernel in kernels:
        kind = kind_of(kernel["name"])
        if kind:
            spent[kind] += kernel["ms"] / 1e3
    return spent


def measured_rates(job: Job, chunk_size: int, gpu: GPU, kernels: Sequence[Mapping[str, Any]], *, source: str) -> Rates:
    """The rates with which the planner predicts the measured times. Forward and backward, which the profile does not
    separate, keep the ratio of the defaults.

    Args:
        job: the profiled step: context, precision, and whether blocks were compiled.
        chunk_size: tokens per chunk.
        gpu: the planner's entry; "cpu" too.
        kernels: with their times over the whole step.
        source: origin of the rates, as text.
    """
    spent, layout, defaults = seconds_by_kind(kernels), Layout(1, 1, chunk_size), Rates()
    features = job.model.race.num_features
    ideal = Roofline(job, Cluster(gpu, 1), Rates(matmul=1.0, bandwidth=defaults.bandwidth, attention={features: (1.0, 1.0)}))
    forward, backward = attention_seconds(job, layout, ideal)
    attention = job.context * job.batch * (forward * count_passes(job, layout).forward + backward)
    slower = max(MIN_RATE, spent["attention"] / attention)
    matmul = max(MIN_RATE, _product_rate(job, layout, gpu, spent["products"]))
    slowdown = spent["element-wise"] / elementwise_seconds(job, layout, ideal)
    names = ("compiled_forward", "compiled_backward") if job.compiled else ("elementwise_forward", "elementwise_backward")
    scaled = {name: round(getattr(defaults, name) * slowdown, 3) for name in names}
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
    """The fraction of the peak at which matrix products take ``seconds``: some are bound by their bytes at any rate."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        slow = matmul_seconds(job, layout, Roofline(job, Cluster(gpu, 1), Rates(matmul=middle))) > seconds
        low, high = (middle, high) if slow else (low, middle)
    return high
