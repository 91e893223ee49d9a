"""Compile every kernel of a call for a card that need not be there, and print what each takes, as JSON.

    python -m tests.kernels.compile_only CAPABILITY SHARED_LIMIT
"""

from __future__ import annotations

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from race_dist.kernels.plan import shared_bytes
from race_dist.ops import triton as backend
from race_dist.ops.problem import Problem


class NoCard:
    """Stands in for Triton's driver: names a target, runs nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    capability, limit = int(sys.argv[1]), int(sys.argv[2])
    driver.set_active(NoCard(capability))
    backend.unsupported = lambda p: None
    backend._bulk = lambda *tensors: capability >= 90
    backend.triton.set_allocator(lambda *request: None)
    backend._shared_limit = lambda device: limit
    shared: dict[str, int] = {}

    def getitem(self: JITFunction, grid: object) -> object:
        def run(*args: object, **options: object) -> None:
            shared[self.__name__] = self.warmup(*args, grid=grid, **options).metadata.shared
        return run

    JITFunction.__getitem__ = getitem
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
    p = Problem(make(1, 8192, 8, 128), make(1, 8192, 8, 128), make(1, 8192, 8, 128), make(8, 4, 4, 128),
                make(8, dtype=torch.float32), None, None, None, None, True, "global")
    saved = backend.forward(p)
    backend.backward(p, saved, torch.empty_like(saved.out), None, need_planes=False)
    names = {"sums": "tile_sums", "out": "walk_out", "queries": "walk_queries", "query_sums": "tile_query_sums",
             "keys": "walk_keys"}
    plan = backend._plan(p, False, capability >= 90)
    print(json.dumps({name: {"shared": shared[kernel], "bound": shared_bytes(name, plan[name].spec)}
                      for name, kernel in names.items()}))


if __name__ == "__main__":
    main()
