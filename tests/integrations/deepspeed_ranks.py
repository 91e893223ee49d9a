"""The jobs that two ranks run under DeepSpeed for test_deepspeed_models.py, in one launch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from race_dist.integrations.deepspeed import SketchAttention, initialize
from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import RaceConfig
from race_dist.parallel import count_bytes, shard_sequence
from tests.integrations.hf_models import build, tokens

LENGTH = 24


def everything(group: Any, folder: str) -> dict[str, Any]:
    """Run every job; return its result, or its traceback, by name."""
    jobs: list[Callable[[str], Any]] = [drop_in, swap_ulysses, resume, transformers, refusals, launch_sizes, raw]
    found: dict[str, Any] = {}
    for job in jobs:
        try:
            found[job.__name__] = job(folder)
        except Exception:
            found[job.__name__] = traceback.format_exc()
    return found


def settings(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "sequence_parallel_size": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    } | more


def world() -> Any:
    return dist.group.WORLD


def heads(model_axis: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Unsharded q, k, v with 4 and 2 heads; the sequence is dimension ``model_axis``."""
    draw = torch.Generator().manual_seed(3)
    shape = (2, LENGTH) if model_axis == 1 else (LENGTH, 2)
    return tuple(torch.randn(*shape, n, 8, generator=draw, dtype=dtype) for n in (4, 2, 2))


def drop_in(folder: str) -> dict[str, float]:
    """Errors of SketchAttention on shards against one rank: outputs and gradients, for both tensor layouts."""
    errors = {}
    for axis in (0, 1):
        for layout in ("contiguous", "zigzag"):
            config = RaceConfig(num_heads=4, num_kv_heads=2, head_dim=8)
            whole = [x.requires_grad_() for x in heads(axis)]
            alone, shared = (SketchAttention(config, g, layer=1, layout=layout).double() for g in (None, world()))
            expected = alone(*whole, 1 - axis)
            weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
            (expected * weight).sum().backward()
            cut = lambda x, axis=axis, layout=layout: shard_sequence(x.detach(), world(), dim=axis, layout=layout)
            mine = [cut(x).requires_grad_() for x in whole]
            out = shared(*mine, 1 - axis)
            (out * cut(weight)).sum().backward()
            pairs = [(out, cut(expected)), *((m.grad, cut(w.grad)) for m, w in zip(mine, whole, strict=True))]
            for p, q in zip(shared.parameters(), alone.parameters(), strict=True):
                dist.all_reduce(p.grad)
                pairs.append((p.grad, q.grad))
            errors[f"{axis} {layout}"] = max(float((a - b).abs().max()) for a, b in pairs)
    return errors


class UlyssesBlock(nn.Module):
    """A typical Ulysses block: projections around DistributedAttention, ``[T, B, H, D]``."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        from deepspeed.sequence.layer import DistributedAttention

        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.out = nn.Linear(16, 3 * 32), nn.Linear(32, 16)
        self.attention = DistributedAttention(nn.Identity(), group, scatter_idx=2, gather_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out = self.attention(*(t.unflatten(-1, (4, 8)) for t in (q, k, v)), 1)
        return self.out(out.flatten(2)).square().sum()


def swap_ulysses(folder: str) -> dict[str, Any]:
    """Pass a Ulysses model to initialize: the new class of its attention, and the error of its gradients against one rank."""
    torch.manual_seed(0)
    model = UlyssesBlock(world())
    torch.manual_seed(0)
    alone = UlyssesBlock(world())
    x = torch.randn(LENGTH, 2, 16)
    alone.attention = SketchAttention(RaceConfig(num_heads=4, head_dim=8))
    alone(x).backward()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    engine, *_ = initialize(
        model=model,
        config=settings(1, race_attention={"num_planes": 4}),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    )
    engine.backward(engine(engine.race.shard(x, dim=0)))
    engine.step()
    kind = type(model.attention).__name__
    step = weights - torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "core" not in n])
    true = torch.cat([p.grad.flatten() for n, p in alone.named_parameters() if "core" not in n])
    engine.destroy()
    return {"kind": kind, "error": float((step - true).norm() / true.norm())}


def language_model() -> DecoderLM:
    return DecoderLM(ModelConfig(vocab_size=97, dim=16, num_layers=2, num_heads=2, num_kv_heads=1))


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids, labels = (engine.race.shard(tokens(2, LENGTH, seed=2 * step + n)) for n in (0, 1))
        loss = engine(ids, labels)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def resume(folder: str) -> dict[int, tuple[list[float], list[float]]]:
    """The last three losses without interruption, and after loading a DeepSpeed checkpoint, by ZeRO stage."""
    found = {}
    for stage in range(4):
        start = lambda stage=stage: initialize(
            model=language_model(),
            config=settings(stage, optimizer={"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}),
        )[0]
        engine = start()
        whole = train(engine, range(6))
        engine.destroy()
        engine = start()
        train(engine, range(3))
        engine.save_checkpoint(str(Path(folder) / str(stage)))
        engine.destroy()
        engine = start()
        engine.load_checkpoint(str(Path(folder) / str(stage)))
        found[stage] = (whole[3:], train(engine, range(3, 6)))
        engine.destroy()
    return found


def tile(model: Any) -> None:
    """Replace the MLPs by ALST's tiled MLP, as its documentation says."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    for layer in model.model.layers:
        mlp = layer.mlp
        original = type(mlp).forward
        mlp.forward = lambda x, mlp=mlp, original=original: TiledMLP.apply(original, mlp, x, 3, list(mlp.parameters()))


def tiled_loss(model: Any, hidden: Tensor, targets: Tensor, count: float) -> Tensor:
    """The loss by ALST's fused logits and loss."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss(head: Any, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(x), y, reduction="sum") / count

    return TiledFusedLogitsLoss.apply(loss, model.lm_head, hidden, targets, None, 3, [model.lm_head.weight], "sum")


class TiledModel(nn.Module):
    """A transformers model that computes its loss in tiles."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, shift_labels: Tensor, num_items_in_batch: Tensor, **batch: Any) -> Tensor:
        batch.pop("labels")
        hidden = self.model.model(**batch, use_cache=False)[0]
        return tiled_loss(self.model, hidden, shift_labels, float(num_items_in_batch))


def transformers(folder: str) -> dict[str, float]:
    """Errors of a converted Llama's step under ZeRO with sequence parallelism and ALST's tiles, against one rank."""
    from race_dist.integrations.transformers import convert, sequence_parallel, shard_batch

    errors = {}
    ids = tokens(2, LENGTH)
    whole = {"input_ids": ids, "labels": ids.masked_fill(ids < 20, -100)}
    for stage in (1, 3):
        for tiled in (False, True):
            alone = convert(build("llama")).train()
            alone(**shard_batch(whole, None), use_cache=False).loss.backward()
            true = {n: p.grad.clone() for n, p in alone.named_parameters()}
            model = build("llama").train()
            section = {"race_attention": {"layout": "zigzag" if stage == 3 else "contiguous"}}
            before = {n: p.detach().clone() for n, p in convert(build("llama")).named_parameters()}
            handed: nn.Module = model
            if tiled:
                convert(model)
                sequence_parallel(model, world(), layout=section["race_attention"]["layout"])
                tile(model)
                handed, section = _WithSketch(TiledModel(model)), {}
            engine, *_ = initialize(
                model=handed,
                config=settings(stage, **section),
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=2.0**10),
            )
            batch = shard_batch(whole, engine.race.sp_group, layout="zigzag" if stage == 3 else "contiguous")
            out = engine(**batch) if tiled else engine(**batch, use_cache=False).loss
            engine.backward(out)
            engine.step()
            from deepspeed.utils import safe_get_full_fp32_param

            after = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
            step = torch.cat([(before[n] - after[n]).flatten() / 2.0**10 for n in true])
            flat = torch.cat([g.flatten() for g in true.values()])
            errors[f"ZeRO-{stage}{' tiled' if tiled else ''}"] = float((step - flat).norm() / flat.norm())
            engine.destroy()
    return errors


class _WithSketch(nn.Module):
    """A wrapper of the trained module, for a model whose sequence parallelism the caller has set up."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.unused = SketchAttention(RaceConfig(num_heads=1, head_dim=4, train_beta=False, qk_norm=False))

    def forward(self, **batch: Any) -> Tensor:
        return self.inner(**batch)


def refusals(folder: str) -> dict[str, str]:
    """The error messages of initialize for settings that would train wrongly."""
    said = {}

    class Mpu:
        def get_data_parallel_group(self) -> Any:
            return world()

    attempts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "mpu": ({}, {"mpu": Mpu()}),
        "mesh": ({"data_parallel_size": 1}, {}),
        "mesh_param": ({}, {"mesh_param": (1, 2)}),
        "one bit": ({"optimizer": {"type": "OneBitAdam"}}, {}),
        "predivide": ({"gradient_predivide_factor": 2.0}, {}),
        "prescale": ({"prescale_gradients": True}, {}),
        "mics": ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, {}),
        "hpz": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, {}),
        "indivisible": ({"sequence_parallel_size": 3}, {}),
        "size": ({"sequence_parallel_size": "2"}, {}),
        "section": ({"race_attention": {"num_plane": 4}}, {}),
        "layout": ({"race_attention": {"layout": "ring"}}, {}),
    }
    for name, (config, options) in attempts.items():
        try:
            initialize(model=language_model(), config=settings(1) | config, **options)
            said[name] = "nothing"
        except (ValueError, TypeError) as error:
            said[name] = str(error)
    late = build("llama")
    try:
        initialize(model=late, config=settings(1, race_attention={}), optimizer=torch.optim.SGD(late.parameters(), lr=1.0))
        said["late"] = "nothing"
    except ValueError as error:
        said["late"] = str(error)
    for name, model in (("softmax", build("llama")), ("linear", nn.Linear(2, 2)), ("ulysses", UlyssesBlock(world()))):
        try:
            initialize(model=model, config=settings(1))
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def raw(folder: str) -> dict[str, tuple[float, float]]:
    """DeepSpeed without this package, in configurations that users write: the largest difference of the ranks' weights after
    a step, and the applied gradient divided by the true one."""
    import deepspeed
    from deepspeed.utils import groups

    from race_dist.integrations.deepspeed.mpu import SequenceParallelMPU

    class DataParallel(SequenceParallelMPU):
        def get_data_parallel_group(self) -> Any:
            return alone

        def get_data_parallel_world_size(self) -> int:
            return 1

        def get_data_parallel_rank(self) -> int:
            return 0

        def get_sequence_data_parallel_group(self) -> Any:
            return alone

        def get_sequence_data_parallel_world_size(self) -> int:
            return 1

        def get_sequence_data_parallel_rank(self) -> int:
            return 0

    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    ids, labels = tokens(2, LENGTH), tokens(2, LENGTH, seed=1)
    true = language_model()
    true(ids, labels).backward()
    found = {}
    wirings: dict[str, tuple[int, Any, dict[str, Any]]] = {
        "mesh": (1, None, {"data_parallel_size": 1}),
        "reduce-scatter": (3, SequenceParallelMPU(world()), {}),
        "mpu": (3, DataParallel(world()), {}),
    }
    for name, (stage, mpu, more) in wirings.items():
        groups.mpu = None
        model = language_model()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        engine, *_ = deepspeed.initialize(
            model=model, config=settings(stage, **more), mpu=mpu, optimizer=torch.optim.SGD(model.parameters(), lr=2.0**10)
        )
        x, y = (shard_sequence(t, world(), dim=1).contiguous() for t in (ids, labels))
        engine.backward(engine(x, y, group=world()))
        engine.step()
        applied = {}
        for n, p in model.named_parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                applied[n] = (before[n] - p.detach()) / 2.0**10
        step, goal = (
            torch.cat([g[n].flatten() for n in before]) for g in (applied, {n: p.grad for n, p in true.named_parameters()})
        )
        highest, lowest = step.clone(), step.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        found[name] = (float((highest - lowest).norm() / goal.norm()), float(step @ goal / (goal @ goal)))
        groups.mpu = groups.mesh_device = None
    return found


def launch_sizes(folder: str) -> dict[str, int]:
    """Bytes that one attention call passes to collectives, forward and backward, by sequence length."""
    found = {}
    for length in (1024, 4096):
        module = SketchAttention(RaceConfig(num_heads=4, num_kv_heads=2, head_dim=16), world())
        draw = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(1, length // 2, n, 16, generator=draw, requires_grad=True) for n in (4, 2, 2))
        with count_bytes() as count:
            module(q, k, v).sum().backward()
        found[str(length)] = count.bytes
    return found
