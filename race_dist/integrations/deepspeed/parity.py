"""Compare the gradient that DeepSpeed applies with the true gradient, on the ranks of this job:

torchrun --nproc-per-node 4 -m race_dist.integrations.deepspeed.parity
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from race_dist.integrations.deepspeed.engine import initialize, join
from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import RaceConfig
from race_dist.parallel import shutdown

VOCAB, LENGTH, ROWS = 31, 23, 2  # a length that no number of ranks divides
RATE = 2.0**14  # so large that weights are small beside a step: their difference is the gradient to float32 precision


class Case(NamedTuple):
    """One configuration. ``backward``: "engine" (``engine.backward(loss)``) or "tensor" (``loss.backward()``)."""

    stage: int
    sp: int
    dp: int
    clip: float = 0.0
    reduce_scatter: bool = True
    offload: bool = False
    bucket: int | None = None
    accumulate: int = 1
    backward: str = "engine"
    bfloat16: bool = False


class Ratio(NamedTuple):
    """The applied gradient compared with the true one.

    ``ratio``: the applied gradient projected on the true one, over all parameters; 1 is right. ``distance``: the norm of their
    difference, relative to the norm of the true one. ``worst``: the ratio of the parameter that is furthest from 1. ``spread``:
    the largest difference of a weight between ranks after the step. ``rounding``: the distance of a gradient that one process
    computes in float32 without DeepSpeed, which shows the error of float32 arithmetic alone.
    """

    ratio: float
    distance: float
    worst: float
    spread: float
    rounding: float


def cases(world: int) -> Iterator[Case]:
    """Every ZeRO stage and mesh of ``world`` ranks, with and without clipping, then other options that affect the reduction."""
    meshes = [(sp, world // sp) for sp in (1, 2, 4) if world % sp == 0]
    for stage in range(4):
        for sp, dp in meshes:
            yield from (Case(stage, sp, dp, clip) for clip in (0.0, 0.05))
    sp, dp = meshes[-1] if world < 4 else (2, 2)
    for stage in (1, 2, 3):
        yield Case(stage, sp, dp, reduce_scatter=False)
        yield Case(stage, sp, dp, offload=True)
        yield Case(stage, sp, dp, accumulate=2)
        yield Case(stage, sp, dp, backward="tensor")
        yield Case(stage, sp, dp, bfloat16=True)
    yield Case(3, sp, dp, reduce_scatter=False, bucket=600)  # some parameters are larger than the bucket, some are smaller
    yield Case(3, sp, dp, bucket=600)


def measure(case: Case) -> Ratio:
    """Take one SGD step under DeepSpeed and compare it with the gradient of one process. A collective: every rank calls it.

    Raises:
        ValueError: the configuration is refused.
    """
    device = join()
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        layer_pattern="RW",
        window=4,
        race=RaceConfig(num_tables=2, num_planes=3),
    )
    draw = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCAB, (2, case.accumulate, case.dp * ROWS, LENGTH), generator=draw)
    labels[:, -1, 3:9] = -100  # data-parallel groups have different numbers of targets
    true = _true_gradient(config, ids, labels, case)
    model = DecoderLM(config).to(device)
    before = {name: p.detach().double().cpu() for name, p in model.named_parameters()}
    engine, *_ = initialize(model=model, config=_deepspeed(case), optimizer=torch.optim.SGD(model.parameters(), lr=RATE))
    sequence_mesh = engine.race
    rows = slice(sequence_mesh.dp_rank * ROWS, (sequence_mesh.dp_rank + 1) * ROWS)
    for part in range(case.accumulate):
        x, y = (sequence_mesh.shard(t[part, rows].to(device)) for t in (ids, labels))
        loss = engine(x, y, num_targets=sequence_mesh.num_targets(y))
        engine.backward(loss) if case.backward == "engine" else loss.backward()
        engine.step()
    after = _weights(engine)
    engine.destroy()
    float32 = _true_gradient(config, ids, labels, case, torch.float32)
    return _compare(true, {name: (before[name] - w) / RATE for name, w in after.items()}, float32, device)


def _true_gradient(
    config: ModelConfig, ids: torch.Tensor, labels: torch.Tensor, case: Case, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """The gradient without DeepSpeed, in one process: in ``dtype``, or of bfloat16 weights if the case is bfloat16."""
    model = DecoderLM(config).bfloat16() if case.bfloat16 else DecoderLM(config, dtype=dtype)
    for x, y in zip(ids, labels, strict=True):
        (model(x, y) / len(ids)).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return {name: g * min(1.0, case.clip / float(norm)) if case.clip else g for name, g in gradients.items()}


def _deepspeed(case: Case) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case.stage, "reduce_scatter": case.reduce_scatter}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case.bucket is not None:
        zero["reduce_bucket_size"] = case.bucket
    precision = {"bf16": {"enabled": True}} if case.bfloat16 else {}
    return precision | {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_optimization": zero,
        "sequence_parallel_size": case.sp,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    """The full float32 weights, wherever DeepSpeed stores them."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param if engine.zero_optimization_stage() else lambda p: p.detach()
    return {name: whole(p).double().cpu().clone() for name, p in engine.module.named_parameters()}


def _compare(
    true: dict[str, torch.Tensor], applied: dict[str, torch.Tensor], float32: dict[str, torch.Tensor], device: torch.device
) -> Ratio:
    flat = lambda gradients: torch.cat([gradients[name].flatten() for name in true])
    expected, actual = flat(true), flat(applied)
    distance = lambda found: float((expected - found).norm() / expected.norm())
    ratios = [float((true[n] * applied[n]).sum() / true[n].square().sum()) for n in true]
    highest, lowest = (actual.to(device, copy=True) for _ in range(2))
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return Ratio(
        float(expected @ actual / (expected @ expected)),
        distance(actual),
        max(ratios, key=lambda ratio: abs(ratio - 1)),
        float((highest - lowest).abs().max() * RATE),
        distance(flat(float32)),
    )


def main() -> None:
    """Measure every case for this number of ranks; rank 0 prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    join()
    measured = []
    for case in cases(dist.get_world_size()):
        ratio = measure(case)
        measured.append(case._asdict() | ratio._asdict())
        if dist.get_rank() == 0:
            print(
                f"{case}: applied / true = {ratio.ratio:.7f}, distance {ratio.distance:.1e}, worst parameter "
                f"{ratio.worst:.7f}, ranks differ by {ratio.spread:.1e}",
                flush=True,
            )
    if dist.get_rank() == 0 and arguments.out is not None:
        import deepspeed

        report = {
            "command": f"torchrun --nproc-per-node {dist.get_world_size()} -m {__spec__.name} {' '.join(sys.argv[1:])}",
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "rows": measured,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutdown()


if __name__ == "__main__":
    main()
