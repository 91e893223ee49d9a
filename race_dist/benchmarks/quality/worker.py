"""One run of a protocol: build the model, train it, measure it, in a separate process, so that a failure ends no other run."""

from __future__ import annotations

import json
import math
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from race_dist.benchmarks.quality.language import Language
from race_dist.benchmarks.quality.protocol import Protocol, Run
from race_dist.benchmarks.quality.recall import Recall
from race_dist.benchmarks.quality.steps import Steps, autocast
from race_dist.benchmarks.quality.variants import build_model, parameter_count, state_bytes
from race_dist.models import DecoderLM
from race_dist.training.optim import learning_rate

CURVE = 24  # points of the training loss that are kept
UNTIMED = 20  # first steps, which compile kernels and are not timed


def work(connection: Connection, protocol: str, variant: int, rate: float, seed: int, device: str, threads: int | None) -> None:
    """Entry point of the process: train, and send the result as JSON; ``{"failed": reason}`` after an error."""
    settings = Protocol.model_validate_json(protocol)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = train(settings, Run(settings.variant[variant], rate, seed), torch.device(device))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        result = {"failed": f"{type(error).__name__}: {str(error)[:500]} ({frame.name}, line {frame.lineno})"}
    connection.send_bytes(json.dumps(result).encode())
    connection.close()


def train(protocol: Protocol, run: Run, device: torch.device) -> dict[str, Any]:
    """The result of a run as JSON: measurements, parameters, state, training curve and time.

    ``seconds`` extrapolates the steps after the first few: with concurrent runs on the device it says little about the model.
    """
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    bfloat16 = protocol.precision == "bfloat16"
    task = Language(protocol, run, device) if protocol.language is not None else Recall(protocol, run, device)
    model = build_model(protocol, run.variant, run.seed, device)
    optim = protocol.optim.model_copy(update={"lr": run.rate, "planes_lr": run.variant.planes_lr})
    steps = Steps(model, task, optim, bfloat16=bfloat16, device=device)
    compiled = protocol.compiled and compile_blocks(model, steps)
    losses, clocked, start = torch.zeros(protocol.steps, device=device), 0, time.perf_counter()
    for number in range(protocol.steps):
        if number == min(UNTIMED, protocol.steps - 1):
            synchronize(device)
            clocked, start = protocol.steps - number, time.perf_counter()
        losses[number] = steps.step(number, learning_rate(number, protocol.steps, optim))
    curve = [
        [int(part[-1]) + 1, round(float(losses[part].mean()), 4)]
        for part in torch.arange(protocol.steps).tensor_split(min(CURVE, protocol.steps))
    ]
    seconds = (time.perf_counter() - start) / clocked * protocol.steps
    if not all(math.isfinite(point[1]) for point in curve):
        return {"failed": f"the loss is NaN or Inf after {next(s for s, v in curve if not math.isfinite(v))} steps"}
    with autocast(device, bfloat16=bfloat16):
        measured = task.measure(model.eval())
    peak = {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)} if device.type == "cuda" else {}
    return {
        **measured,
        "parameters": parameter_count(model),
        "ffn_dim": model.config.resolved_ffn_dim,
        "state_bytes": state_bytes(model, task.context),
        "seconds": round(seconds, 2),
        "compiled": compiled,
        "graphs": len(steps.graphs),
        **peak,
        "curve": curve,
        "task": task.header(),
    }


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compile_blocks(model: DecoderLM, steps: Steps) -> bool:
    """Compile the blocks and test them; False where that fails, and the model then runs without a compiler."""
    blocks = list(model._blocks())
    for block in blocks:
        block.compile(dynamic=False)
    try:
        steps.try_loss()
    except Exception as error:
        print(f"without torch.compile: {type(error).__name__}: {str(error)[:300]}", flush=True)
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True
