"""Compile every kernel of a call for a GPU that need not be present, and print the resources of each, as JSON.

    python -m tests.kernels.compile_only CAPABILITY SHARED_LIMIT [CALL ...]

With calls named (see CALLS): the pipelines that Hopper runs for them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from race_dist.kernels.plan import KERNELS, shared_bytes
from race_dist.ops import device
from race_dist.ops import triton as backend
from race_dist.ops.inputs import AttentionInputs
from race_dist.ops.triton.plan import plan_call

RECURRENT = {
    "tile_sums_fwd": "race_tile_sums_fwd_kernel",
    "fwd": "race_recurrent_fwd_kernel",
    "bwd_dq": "race_recurrent_bwd_dq_kernel",
    "tile_sums_bwd": "race_tile_sums_bwd_kernel",
    "bwd_dkv": "race_recurrent_bwd_dkv_kernel",
}
PIPELINED = {
    "tile_sums_fwd": "race_tile_sums_fwd_kernel",
    "fwd": "race_hopper_fwd_kernel",
    "bwd_dq": "race_hopper_bwd_dq_kernel",
    "bwd_dkv": "race_hopper_bwd_dkv_kernel",
}


class NoGPU:
    """Replaces Triton's driver: it names a target and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


CALLS: dict[str, dict[str, object]] = {
    "plain": {},
    "decay": {"decay": True, "normalization": "none"},
    "not causal": {"causal": False},
    "packed, grouped": {"documents": 3, "queries": 8},
    "many tables": {"tables": 32, "planes": 1, "decay": True},
    "many features": {"tables": 1, "planes": 8},
    "many features, decay": {"tables": 1, "planes": 7, "decay": True},
    "most features, decay": {"tables": 1, "planes": 8, "decay": True, "normalization": "none"},
    "many features, narrow": {"tables": 3, "planes": 5, "value_dim": 64},
    "float32 planes": {"wide": True},
    "trained planes, grouped": {"wide": True, "trained": True, "queries": 8},
    "float32 planes, many tables": {"wide": True, "tables": 32, "planes": 1, "decay": True},
    "trained planes, most features": {
        "wide": True,
        "trained": True,
        "tables": 1,
        "planes": 8,
        "decay": True,
        "normalization": "none",
    },
    "trained planes, many features": {"wide": True, "trained": True, "tables": 1, "planes": 7, "decay": True},
    "trained planes, not causal": {"wide": True, "trained": True, "causal": False},
}


def problem(
    *,
    decay: bool = False,
    normalization: str = "global",
    causal: bool = True,
    documents: int = 0,
    queries: int = 4,
    dim: int = 128,
    tables: int = 4,
    planes: int = 4,
    value_dim: int = 128,
    wide: bool = False,
) -> AttentionInputs:
    """A call's inputs as meta tensors. ``wide``: float32 planes."""
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
    log_decay = make(1, 8192, 4, dtype=torch.float32) if decay else None
    cu_seqlens = make(documents + 1, dtype=torch.int64) if documents else None
    hyperplanes = make(4, tables, planes, dim, dtype=torch.float32 if wide else torch.bfloat16)
    return AttentionInputs(
        make(1, 8192, queries, dim),
        make(1, 8192, 4, dim),
        make(1, 8192, 4, value_dim),
        hyperplanes,
        make(4, dtype=torch.float32),
        log_decay,
        None,
        cu_seqlens,
        None,
        causal,
        normalization,
    )  # type: ignore[arg-type]


def assembled(ptx: str) -> dict[str, int | str]:
    """What ptxas reports about a pipeline: bytes of register spills per thread, and why it serializes wgmma, if it does."""
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "kernel.ptx").write_text(ptx, encoding="utf-8")
        run = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    spills = re.search(r"(\d+) bytes spill stores", run.stderr)
    why = re.search(r"serialized due to (.*) in (the )?function", run.stderr)
    assert spills is not None, run.stderr
    return {"spills": int(spills[1]), "serialized": why[1] if why else ""}


def main() -> None:
    capability, limit, *names = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    driver.set_active(NoGPU(capability))
    device.supports_tma = lambda *tensors: capability >= 90
    device.has_pipelines = lambda device: capability == 90 and bool(names)
    device.shared_memory_limit = lambda device: limit
    triton.set_allocator(lambda *request: None)
    made: dict[str, CompiledKernel] = {}

    def getitem(self: JITFunction, grid: object) -> object:
        def run(*args: object, **options: object) -> None:
            made[self.__name__] = self.warmup(*args, grid=grid, **options)

        return run

    JITFunction.__getitem__ = getitem
    found: dict[str, dict[str, int | str]] = {}
    for call in names or ["plain"]:
        options = dict(CALLS[call])
        trained = bool(options.pop("trained", False))
        p = problem(**options)  # type: ignore[arg-type]
        saved = backend.forward(p)
        backend.backward(p, saved, torch.empty_like(saved.out), None, need_planes=trained)
        plan = plan_call(p, trained, tma=capability >= 90)
        for name in KERNELS:
            kernel = PIPELINED.get(name, "") if plan.pipelined else RECURRENT[name]
            if kernel:
                bound = limit if plan.pipelined and name in PIPELINED else shared_bytes(name, plan[name].spec)
                found[f"{call}: {kernel}"] = {
                    "shared": made[kernel].metadata.shared,
                    "bound": bound,
                    **(assembled(made[kernel].asm["ptx"]) if kernel.startswith("race_hopper_") else {}),
                }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
