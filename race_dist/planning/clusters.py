"""GPU types, their links and memories, from a small table; and a cluster of one type."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """One GPU's connection to a network: latency in seconds, bandwidth in bytes per second in one direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        name: on the command line.
        memory: bytes that the driver reports.
        bandwidth: bytes per second of its memory, as its vendor states.
        flops: dense operations per second by the dtype of a matrix product, as its vendor states (bfloat16 on tensor cores,
            float32 on the vector units: TF32 is off unless asked for; float64 on whichever is faster).
        per_node: devices per node.
        intra_node, inter_node: links of one device inside a node and between nodes.
        host: bytes per second to host memory, in one direction.
        host_memory: bytes of host memory per device.
        reserve: bytes that the driver, its libraries and fragmentation of the allocator take.
    """

    name: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    per_node: int
    intra_node: Link
    inter_node: Link
    host: float
    host_memory: int
    reserve: int


def _gpu(
    name: str,
    gib: float,
    bandwidth: float,
    bf16: float,
    fp32: float,
    fp64: float,
    per_node: int,
    inside: float,
    between: float,
    host: float,
    host_gib: int,
) -> GPU:
    """Table row: bandwidths in GB/s, peaks in TFLOP/s. Links: achieved bandwidth; 15 and 25 microseconds to start, about
    what NCCL needs for a small message inside a node and between nodes. Reserve: 1 GiB of context and libraries, and 4%
    of the memory in the allocator's gaps."""
    return GPU(
        name,
        int(gib * GIB),
        bandwidth * 1e9,
        {"bfloat16": bf16 * 1e12, "float32": fp32 * 1e12, "float64": fp64 * 1e12},
        per_node,
        Link(15e-6, inside * 1e9),
        Link(25e-6, between * 1e9),
        host * 1e9,
        host_gib * GIB,
        GIB + int(0.04 * gib * GIB),
    )


# Memory: what the driver lists. Peaks and memory bandwidth: vendors' data sheets (SXM forms). Links: two thirds of
# NVLink's rated bandwidth in one direction; 90% of one 400 Gb/s (H100, H200, B200) or 200 Gb/s (A100, GH200) adapter a
# device. Host: PCIe 4 or 5, or 90% of C2C. Host memory: of the usual node, divided by its devices.
_TABLE = (
    #    name          GiB    GB/s  bf16  fp32 fp64 node inside between host hostGiB
    _gpu("a100-80gb", 80.0, 2039, 312, 19.5, 19.5, 8, 200, 22, 25, 128),
    _gpu("h100-80gb", 79.6, 3350, 989, 67, 67, 8, 300, 45, 50, 192),
    _gpu("h200-141gb", 140.4, 4800, 989, 67, 67, 8, 300, 45, 50, 192),
    _gpu("gh200-96gb", 95.6, 4000, 989, 67, 67, 4, 100, 22, 400, 110),
    _gpu("gh200-144gb", 140.4, 4900, 989, 67, 67, 4, 100, 22, 400, 440),
    _gpu("b200", 179.0, 8000, 2250, 75, 37, 8, 600, 45, 50, 192),
)
# Two cores of a server with AVX-512, as a run on a laptop or in a test sees them; a rates file says it better.
_CPU = GPU(
    "cpu",
    4 * GIB,
    10e9,
    {"bfloat16": 0.1e12, "float32": 0.1e12, "float64": 0.05e12},
    1,
    Link(50e-6, 2e9),
    Link(100e-6, 1e9),
    10e9,
    4 * GIB,
    0,
)
GPUS = {gpu.name: gpu for gpu in (*_TABLE, _CPU)}
_SHORT = {
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "gh200": "gh200-96gb",
    "gh200-96": "gh200-96gb",
    "gh200-144": "gh200-144gb",
    "b200-180gb": "b200",
}


def find_gpu(name: str) -> GPU:
    """The table's entry of a GPU type; case is ignored, and the memory size may be omitted.

    Raises:
        ValueError: the table has no such type.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = _SHORT.get(key, key)
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown GPU type {name!r}: {hint}known are {', '.join(GPUS)}")
    return GPUS[key]


def match_gpu(device_name: str) -> GPU | None:
    """The table's entry for a driver's device name such as "NVIDIA H100 80GB HBM3", or None. It compares the chip's name only:
    peaks do not depend on the memory size."""
    for name in sorted(GPUS, key=len, reverse=True):
        if name.split("-")[0] in device_name.lower():
            return GPUS[name]
    return None


@dataclass(frozen=True)
class Cluster:
    """``count`` GPUs of one type, ``per_node`` per node.

    Raises:
        ValueError: a number is less than 1.
    """

    gpu: GPU
    count: int
    per_node: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"the number of GPUs must be at least 1; got {self.count}")
        if self.per_node < 0:
            raise ValueError(f"GPUs per node must be at least 1; got {self.per_node}")
        if self.per_node == 0:
            object.__setattr__(self, "per_node", self.gpu.per_node)

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.gpu.name == "cpu"

    @property
    def usable(self) -> int:
        """Bytes of one GPU that tensors may use."""
        return self.gpu.memory - self.gpu.reserve

    @property
    def unit(self) -> str:
        """The word for one device in sentences; its plural takes an s."""
        return "machine" if self.on_cpu else "GPU"

    def link(self, ranks: int) -> Link:
        """The slowest link that a collective over ``ranks`` neighbouring GPUs crosses."""
        return self.gpu.intra_node if ranks <= self.per_node else self.gpu.inter_node

    def link_name(self, ranks: int) -> str:
        """:meth:`link` in words."""
        return "inside a node" if ranks <= self.per_node else "between nodes"
