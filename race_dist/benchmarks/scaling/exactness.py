"""Exactness of context parallelism compared with one rank: attention, a training step, a streamed step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from race_dist import RaceConfig, race_attention
from race_dist.benchmarks.scaling.job import Job
from race_dist.hashing import sample_planes
from race_dist.models import DecoderLM, ModelConfig
from race_dist.parallel import Layout, all_reduce_sum, shard_sequence
from race_dist.streaming import streamed_backward

LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
FLOAT32_LIMIT = 1e-5  # relative error against one rank
NOISE, ROUNDING = 2.0, 2.0**-9  # limit as a multiple of bfloat16's own error on one rank; and at least one rounding


def measure(job: Job) -> dict[str, Any]:
    """Relative errors of all ranks against one rank: float32, and bfloat16 with the error of bfloat16 itself for comparison."""
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layout in LAYOUTS:
            result[f"attention {name} {layout}"] = _attention(job, dtype, layout)
            for pattern in ("R", "RW"):
                result[f"step {pattern} {name} {layout}"] = _step(job, pattern, dtype, layout)
        result[f"streamed step {name}"] = _step(job, "R", dtype, None)
    for name, errors in result.items():
        job.say(f"{name}: {errors}")
    return {**result, "all_ok": all(errors["ok"] for errors in result.values())}


def _verdict(errors: dict[str, float], noise: dict[str, float] | None) -> dict[str, Any]:
    limit = {name: FLOAT32_LIMIT if noise is None else max(ROUNDING, NOISE * noise[name]) for name in errors}
    return {"errors": errors, "noise": noise, "ok": all(errors[name] <= limit[name] for name in errors)}


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _attention(job: Job, dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
    base, length = job.sizes.base, job.sizes.exact
    generator = torch.Generator(job.device).manual_seed(0)
    shape = (1, length, base.heads, base.head_dim)
    full = [torch.randn(shape, generator=generator, device=job.device).to(dtype) for _ in range(4)]
    planes = sample_planes(base.tables, base.planes, base.head_dim, seed=0, device=job.device, dtype=dtype)
    names = ("out", "dq", "dk", "dv")

    def run(tensors: Sequence[Tensor], *, shared: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        q, k, v = leaves
        out = race_attention(q, k, v, planes.to(q.dtype), 2.0, group=job.group(job.size) if shared else None, layout=layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    shard = lambda x: shard_sequence(x, job.group(job.size), dim=1, layout=layout)
    single_rank, group_results = run(full, shared=False), run([shard(x) for x in full], shared=True)
    errors = {
        name: job.max_over_ranks(_error(a, shard(b))) for name, a, b in zip(names, group_results, single_rank, strict=True)
    }
    if dtype == torch.float32:
        return _verdict(errors, None)
    exact = run([t.float() for t in full], shared=False)
    return _verdict(
        errors, {name: job.max_over_ranks(_error(a, b)) for name, a, b in zip(names, single_rank, exact, strict=True)}
    )


def _step(job: Job, pattern: str, dtype: torch.dtype, layout: Layout | None) -> dict[str, Any]:
    """Loss and gradient of a whole model; ``layout`` None is a streamed step."""
    base, length = job.sizes.base, job.sizes.exact // 4
    model = DecoderLM(
        ModelConfig(
            vocab_size=256,
            dim=base.heads * base.head_dim // 2,
            num_layers=2,
            num_heads=base.heads // 2,
            layer_pattern=pattern,
            window=min(128, length // 4),
            race=RaceConfig(num_tables=base.tables, num_planes=base.planes),
        )
    ).to(job.device)
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, 256, (1, length), generator=generator).to(job.device) for _ in range(2))

    def run(bfloat16: bool, group: Any) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast(job.device.type, torch.bfloat16) if bfloat16 else nullcontext():
            if layout is None:
                loss = streamed_backward(
                    model, ids, labels, chunk_size=-(-length // (3 * (job.size if group else 1))), group=group
                )
                return loss, _flat(model)
            local = [shard_sequence(x, group, dim=1, layout=layout).contiguous() for x in (ids, labels)]
            loss = model(*local, group=group, layout=layout, num_targets=length)
            loss.backward()
        return all_reduce_sum(loss, group), all_reduce_sum(_flat(model), group)

    bfloat16, names = dtype == torch.bfloat16, ("loss", "gradient")
    single_rank, group_results = run(bfloat16, None), run(bfloat16, job.group(job.size))
    errors = {name: job.max_over_ranks(_error(a, b)) for name, a, b in zip(names, group_results, single_rank, strict=True)}
    if not bfloat16:
        return _verdict(errors, None)
    exact = run(False, None)
    return _verdict(errors, {name: _error(a, b) for name, a, b in zip(names, single_rank, exact, strict=True)})


def _flat(model: DecoderLM) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
