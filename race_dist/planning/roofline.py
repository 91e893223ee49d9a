"""Seconds of arithmetic and memory traffic on one device: the longer of the two at the rates that the device achieves."""

from __future__ import annotations

from dataclasses import dataclass

from race_dist.planning.clusters import Cluster
from race_dist.planning.device_rates import Rates
from race_dist.planning.layout import Job
from race_dist.planning.quantities import Cost


@dataclass(frozen=True)
class Roofline:
    """One device of a cluster at achieved rates."""

    job: Job
    cluster: Cluster
    rates: Rates

    @property
    def peak(self) -> float:
        """Operations per second that the vendor states for the job's precision."""
        return self.cluster.gpu.flops[self.job.precision]

    @property
    def bandwidth(self) -> float:
        """Bytes per second that element-wise kernels achieve."""
        return self.cluster.gpu.bandwidth * self.rates.bandwidth

    def matmul(self, cost: Cost) -> float:
        """Seconds of matrix products."""
        return max(cost.flops / (self.peak * self.rates.matmul), cost.bytes / self.bandwidth)

    def attention(self, cost: Cost, slowdown: float) -> float:
        """Seconds of the RACE attention: its roofline times the measured slowdown."""
        return slowdown * max(cost.flops / self.peak, cost.bytes / self.bandwidth)
