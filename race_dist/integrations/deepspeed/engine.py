"""initialize(): create the process groups, replace the attention, start DeepSpeed and correct the scale of its gradients."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist import checks
from race_dist.distributed.mesh import DEFAULT_TIMEOUT
from race_dist.integrations.deepspeed.config import (
    SEQUENCE_PARALLEL_SIZE,
    check_compatible,
    gradient_scale,
    read_config,
    resolve_auto,
)
from race_dist.integrations.deepspeed.config_checks import validate_with_deepspeed
from race_dist.integrations.deepspeed.module_injection import swap_attention
from race_dist.integrations.deepspeed.mpu import SequenceParallelMPU
from race_dist.nn import RaceCore
from race_dist.parallel import all_reduce_sum, build_mesh, group_size, init_distributed, shard_sequence


@dataclass(frozen=True)
class SequenceParallelMesh:
    """The dp x sp mesh of ranks, as ``engine.race``: which ranks share this rank's sequences.

    Attributes:
        sp_group: the ranks that share this rank's sequences; None for one rank.
        sp, dp: number of ranks per sequence, and number of such groups.
        dp_rank: index of this rank's group.
        layout: order of the shards.
    """

    sp_group: ProcessGroup | None
    sp: int
    dp: int
    dp_rank: int
    layout: str = "contiguous"

    def shard(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """This rank's shard of ``x``, which every rank holds."""
        return shard_sequence(x, self.sp_group, dim=dim, layout=self.layout).contiguous()

    def num_targets(self, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The number by which each rank divides its summed loss, so that the gradient is that of the mean over all targets of
        all ranks: the global number of targets / dp. ``labels`` are this rank's shard. A collective: every rank calls it."""
        checks.tensor("labels", labels)
        checks.integer("ignore_index", ignore_index)
        world = dist.group.WORLD if dist.is_initialized() else None
        return all_reduce_sum((labels != ignore_index).sum(), world).double().clamp(min=1) / self.dp


def join(*, device: str | torch.device | None = None, timeout: float = DEFAULT_TIMEOUT) -> torch.device:
    """Join the job that the environment describes (torchrun, the deepspeed launcher, a plain process) and return this rank's
    device. :func:`initialize` calls it; call it yourself if you need the device earlier."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    timeout = checks.seconds("timeout", timeout)
    place = init_distributed(device=device, timeout=timeout)
    os.environ.setdefault("LOCAL_RANK", str(place.index or 0))  # DeepSpeed's engine reads it
    if place.type == "cpu":
        _leave_out_shared_memory_op()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(get_accelerator().communication_backend_name())  # uses the process group that exists
    return place


def _leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed on the CPU from compiling a shared-memory all-reduce, which takes a minute and is used by its inference
    engine only."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize(
    *,
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    timeout: float = DEFAULT_TIMEOUT,
    mpu: Any = None,
    mesh_param: Any = None,
    sequence_mesh: SequenceParallelMesh | None = None,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a model whose attention is RACE Attention over ranks that share sequences.

        engine, optimizer, _, _ = initialize(model=model, config="configs/deepspeed-zero3.json")
        loss = engine(engine.race.shard(input_ids), engine.race.shard(labels), num_targets=...)
        engine.backward(loss)
        engine.step()

    It reads ``"sequence_parallel_size"`` and ``"race_attention"`` (see :class:`RaceSection`) from the DeepSpeed configuration.
    The loss of each rank is its share of the mean loss of its sequences: shares are summed over the ranks of a sequence and
    averaged over the data-parallel groups, as DeepSpeed does. The gradient that is applied (and clipped) is then the true one,
    for ZeRO 0 to 3, with ``engine.backward(loss)`` and with ``loss.backward()``.

    Args:
        model: a model of this package, of transformers, or with ``DistributedAttention`` or :class:`SketchAttention` modules.
            Its attention is replaced in place if the configuration has ``"race_attention"``.
        config: a dictionary or the path of a JSON file.
        timeout: seconds after which a collective fails that not all ranks have joined.
        mpu, mesh_param: DeepSpeed's own arguments; refused if ranks share sequences.
        sequence_mesh: an existing mesh; None: a new mesh in which neighbouring ranks share a sequence.
        **options: further arguments of ``deepspeed.initialize``: optimizer, model_parameters, lr_scheduler, training_data, ...

    Returns:
        DeepSpeed's ``(engine, optimizer, dataloader, lr_scheduler)``; the engine has ``race``, a :class:`SequenceParallelMesh`.

    Raises:
        ValueError: a setting with which gradients would be wrong (the message gives the reason and the fix), or an invalid
            configuration.
    """
    import deepspeed
    from deepspeed.utils import groups

    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise TypeError(f"model must be a torch.nn.Module with parameters; got {checks.typed_repr(model)}")
    if mpu is not None and not any(name.startswith("get_") and "parallel" in name for name in dir(mpu)):
        raise TypeError(
            f"mpu must be an object with DeepSpeed's mpu interface, as Megatron's parallel_state; got {checks.typed_repr(mpu)}"
        )
    if mesh_param is not None and not (isinstance(mesh_param, list | tuple) and len(mesh_param) == 2):
        raise TypeError(
            f"mesh_param must be two numbers of ranks, data-parallel and sequence-parallel; got {checks.typed_repr(mesh_param)}"
        )
    timeout = checks.seconds("timeout", timeout)
    sequence_mesh = _sequence_mesh_option(sequence_mesh, options)
    _check_options(**options)
    settings = read_config(config)
    join(timeout=timeout)
    sp = dist.get_world_size() if settings.sp is None else settings.sp
    has_bfloat16_weights = next(model.parameters()).dtype == torch.bfloat16
    ds_config = resolve_auto(settings.config | {SEQUENCE_PARALLEL_SIZE: sp}, bfloat16=has_bfloat16_weights)
    check_compatible(ds_config, sp, mpu=mpu, mesh_param=mesh_param)
    validate_with_deepspeed(ds_config, None if mesh_param is not None else mpu)
    if sp > 1 and isinstance(model, deepspeed.PipelineModule):
        raise ValueError(
            f'"{SEQUENCE_PARALLEL_SIZE}": {sp} with a PipelineModule has not been tested: train without pipeline stages'
        )
    layout = "contiguous" if settings.race is None else settings.race.layout
    sequence_mesh = sequence_mesh or _build_sequence_mesh(sp, layout, timeout)
    before = {id(p) for p in model.parameters()}
    swap_attention(model, settings.race, sequence_mesh.sp_group, sequence_mesh.layout)
    _check_trained({name: p for name, p in model.named_parameters() if id(p) not in before}, **options)
    if sequence_mesh.sp_group is not None:
        mpu = SequenceParallelMPU(sequence_mesh.sp_group)
    elif isinstance(groups.mpu, SequenceParallelMPU):
        groups.mpu = None  # left by an earlier engine: DeepSpeed would keep using it
    # parameter sizes must be read before ZeRO-3 partitions the parameters
    _scale_gradients(model, ds_config, sp)
    result = deepspeed.initialize(model=model, config=ds_config, mpu=mpu, mesh_param=mesh_param, **options)
    for module in model.modules():
        if isinstance(module, RaceCore):
            module.reset_constants(next(module.parameters(), next(model.parameters())))
    result[0].race = sequence_mesh
    return result


def _sequence_mesh_option(sequence_mesh: object, options: dict[str, Any]) -> SequenceParallelMesh | None:
    """The mesh that the caller passes, also under its old name ``shared``, which is removed from ``options``."""
    if "shared" in options:
        message = (
            "initialize(shared=...) is now initialize(sequence_mesh=...); the old name stops working with the next release"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        sequence_mesh = options.pop("shared")
    if sequence_mesh is None:
        return None
    return checks.instance("sequence_mesh", sequence_mesh, SequenceParallelMesh)


def _check_options(*, optimizer: Any = None, lr_scheduler: Any = None, model_parameters: Any = None, **others: Any) -> None:
    """Raise TypeError for an option of ``deepspeed.initialize`` of a wrong type."""
    for name, value, kind in (
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("lr_scheduler", lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    ):
        if value is not None and not (isinstance(value, kind) or hasattr(value, "step") or callable(value)):
            raise TypeError(f"{name} must be a {kind.__name__} or a function that creates one; got {checks.typed_repr(value)}")
    if model_parameters is None:
        return
    entries = list(model_parameters) if isinstance(model_parameters, list | tuple) else []
    wrong = [entry for entry in entries if not isinstance(entry, Tensor | Mapping)]
    if wrong or not isinstance(model_parameters, Iterable) or isinstance(model_parameters, str | bytes | Mapping | Tensor):
        raise TypeError(
            "model_parameters must be a list of parameters, or of groups of them; got "
            f"{checks.typed_repr(wrong[0] if wrong else model_parameters)}"
        )


def _check_trained(
    added: Mapping[str, nn.Parameter], *, optimizer: Any = None, model_parameters: Any = None, **others: Any
) -> None:
    """Raise ValueError if the optimizer was created before the attention was replaced and lacks the new parameters."""
    if isinstance(optimizer, torch.optim.Optimizer):
        listed = [p for group in optimizer.param_groups for p in group["params"]]
    elif isinstance(model_parameters, list | tuple):
        listed = [p for entry in model_parameters for p in (entry["params"] if isinstance(entry, Mapping) else [entry])]
    else:
        return  # DeepSpeed takes the parameters from the model later
    seen = {id(p) for p in listed}
    missing = [name for name, p in added.items() if id(p) not in seen]
    if missing:
        raise ValueError(
            f"the optimizer was created before the attention was replaced and lacks {len(missing)} new parameters "
            f"({', '.join(missing[:3])}, ...): pass optimizer as a function of the parameters, as in "
            "optimizer=lambda parameters: torch.optim.AdamW(parameters), or convert the model first"
        )


def _build_sequence_mesh(sp: int, layout: str, timeout: float) -> SequenceParallelMesh:
    world = dist.get_world_size()
    if world % sp:
        raise ValueError(
            f'"{SEQUENCE_PARALLEL_SIZE}": {sp} does not divide the number of ranks, {world}: '
            f"start a multiple of {sp} or change it"
        )
    if sp == 1:
        return SequenceParallelMesh(None, 1, world, dist.get_rank(), layout)
    mesh = build_mesh(world // sp, sp, timeout=timeout)
    group = mesh["sp"].get_group()
    return SequenceParallelMesh(group, group_size(group), world // sp, dist.get_rank() // sp, layout)


def _scale_gradients(model: nn.Module, config: Mapping[str, Any], sp: int) -> None:
    """Correct the scale of DeepSpeed's reduction with a gradient hook on each parameter, for every way to call backward."""
    for handle in vars(model).pop("_race_gradient_hooks", ()):  # hooks of an earlier engine
        handle.remove()
    handles = []
    for parameter in model.parameters():
        factor = gradient_scale(config, sp, getattr(parameter, "ds_numel", parameter.numel()))
        if factor != 1 and parameter.requires_grad:
            handles.append(parameter.register_hook(lambda gradient, factor=factor: gradient * factor))
    vars(model)["_race_gradient_hooks"] = handles
