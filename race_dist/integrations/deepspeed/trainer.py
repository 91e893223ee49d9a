"""``race-dist train --engine deepspeed``: the native trainer's data, losses and files, DeepSpeed's optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from race_dist.integrations.deepspeed.config import RACE_SECTION, SEQUENCE_PARALLEL_SIZE
from race_dist.integrations.deepspeed.engine import SequenceParallelMesh, initialize
from race_dist.models import DecoderLM
from race_dist.parallel import DataParallelModel, all_reduce_sum
from race_dist.training.checkpoint import CheckpointManager, SavedCheckpoint
from race_dist.training.config import TrainConfig
from race_dist.training.consistency import check_ranks_consistent
from race_dist.training.data.batches import Batch, training_batch
from race_dist.training.guards import Verdict
from race_dist.training.optim import build_optimizer, learning_rate
from race_dist.training.ranks import RankMesh
from race_dist.training.step import FullSequenceStep, materialize, micro_batches, sequence_shard
from race_dist.training.trainer import StepResult, Trainer

STATES = ("exp_avg", "exp_avg_sq")


class EngineReplica(DataParallelModel):
    """The model that a DeepSpeed engine holds, called through the engine."""

    def __init__(self, engine: Any, group: ProcessGroup | None) -> None:
        super().__init__(engine.module, group, is_sharded=True)
        self.engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights by name, whole, on every rank."""
        return ((name, whole_weight(p)) for name, p in self.model.named_parameters())


class EngineStep(FullSequenceStep):
    """A global batch's gradients, left where DeepSpeed keeps them."""

    def __init__(self, config: TrainConfig, ranks: RankMesh, engine: Any) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.replica: DataParallelModel = EngineReplica(engine, ranks.world)

    def gradients(self, batch: Batch) -> Tensor:
        """See :class:`race_dist.training.step.StepMethod`; ``engine.step()`` has to follow."""
        parts, ranks = self.config.optim.accumulate, self.ranks
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        scale = ranks.dp * parts  # DeepSpeed averages over replicas and over the parts
        for n, rows in enumerate(micro_batches(batch.rows_of_dp_rank(ranks.dp_rank, ranks.dp), parts)):
            part = batch.shard(rows, sequence_shard(ranks))
            cu_seqlens = None if part.cu_seqlens is None else part.cu_seqlens.to(ranks.device)
            loss = self.engine(
                part.inputs.to(ranks.device),
                part.labels.to(ranks.device),
                cu_seqlens=cu_seqlens,
                num_targets=max(1, batch.targets) / scale,
            )
            self.engine.backward(loss)
            if n + 1 < parts:
                self.engine.step()  # counts the part; the last one's makes the step
            total += loss.detach().double()
        return total / scale


class DeepSpeedTrainer(Trainer):
    """A :class:`Trainer` whose parameters, gradients and optimizer states DeepSpeed holds.

    ``config.deepspeed`` is the DeepSpeed configuration; what the run's own configuration says (batch, mesh, clipping,
    precision) is filled in. Checkpoints are those of the native trainer, and go on at any ZeRO stage and mesh.
    """

    engine: Any

    def _build(self) -> None:
        config, ranks = self.config, self.ranks
        settings = deepspeed_config(config, ranks)
        self.model = DecoderLM(config.model, dtype=torch.float32, device="meta")
        if config.compile:
            for block in self.model.blocks:
                block.compile()
        materialize(self.model, ranks.device, config.init)
        check_ranks_consistent(config, self.corpus, self.model, ranks.world)
        optimizer: Any = build_optimizer(self.model, config.optim)
        sequence_mesh = SequenceParallelMesh(ranks.sp_group, ranks.sp, ranks.dp, ranks.dp_rank, ranks.layout)
        self.engine, self.optimizer, _, _ = initialize(
            model=self.model, config=settings, optimizer=optimizer, sequence_mesh=sequence_mesh
        )
        self.method = EngineStep(config, ranks, self.engine)

    def train_step(self, flags: Sequence[bool] = (), batch: Batch | None = None) -> StepResult:
        """One optimizer step; as in the native trainer, but the gradient is seen after it was applied: what the guard would
        skip is only said.

        Raises:
            FloatingPointError: the loss is not finite (the weights are left as they were), or the gradient is not.
        """
        config, data = self.config, self.config.data
        if batch is None:
            batch = training_batch(
                self.train, seed=config.seed, position=self.position, batch_size=data.batch_size, context=data.context
            )
        share = self.method.gradients(batch)
        shared = torch.stack([share, *(share.new_tensor(float(f)) for f in flags)])
        loss, *raised = all_reduce_sum(shared, self.ranks.world).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {loss}; try a lower optim.lr or a longer optim.warmup_steps"
            )
        norm = self._apply(learning_rate(self.step, config.steps, config.optim))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient's norm is {norm}; go on from the last checkpoint with a lower optim.lr"
            )
        self.step += 1
        self.position += 1
        verdict = self.guard.judge(loss, norm)
        self.guard.bad_in_a_row = 0
        return StepResult(loss, norm, tuple(f > 0 for f in raised), Verdict(alarm=verdict.bad or verdict.alarm))

    def _apply(self, rate: float) -> float:
        """Let DeepSpeed step; the norm of the whole gradient, before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        whole = [p.grad for p in self.model.parameters() if p.grad is not None] if self._is_plain else []
        norm = float(torch.nn.utils.get_total_norm(whole)) if whole else None
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    @property
    def _is_plain(self) -> bool:
        """Whether DeepSpeed steps the AdamW as it is, on the model's own parameters: ZeRO-0 in float32."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)

    @property
    def _base(self) -> Any:
        """The AdamW inside."""
        return self.engine.optimizer if self._is_plain else self.engine.optimizer.optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Whole, on rank 0; nothing on the others: a checkpoint is written once. A collective."""
        steps = next((s["step"] for s in self._base.state.values() if "step" in s), 0.0)
        _link_states(self.engine.optimizer)
        tensors: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            found = {f"model.{name}": whole_weight(p)}
            found |= {f"optim.{name}.{kind}": self._whole_state(p, kind) for kind in STATES if p.requires_grad}
            if self.ranks.rank == 0:
                tensors |= {key: value.to("cpu", copy=True) for key, value in found.items()}
                tensors |= {f"optim.{name}.step": torch.tensor(float(steps))} if p.requires_grad else {}
        return tensors

    def _whole_state(self, p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.step:
            return torch.zeros(getattr(p, "ds_shape", p.shape))
        state: Tensor = self._base.state[p][kind] if self._is_plain else safe_get_full_optimizer_state(p, kind)
        return state

    def _load(self, store: CheckpointManager, saved: SavedCheckpoint) -> None:
        """Read a checkpoint, a parameter's tensors at a time, and hand them to DeepSpeed."""
        if saved.step:
            self._make_states()
        taken = torch.zeros(())  # steps of AdamW; fewer than the run's where a guard has skipped some
        for name, p in self.model.named_parameters():
            shape = getattr(p, "ds_shape", p.shape)
            kinds = ("step", *STATES) if p.requires_grad else ()
            read = {f"model.{name}": torch.empty(shape)}
            read |= {f"optim.{name}.{kind}": torch.empty(shape if kind in STATES else ()) for kind in kinds}
            store.load(saved, read)
            taken = read.get(f"optim.{name}.step", taken)
            self._put(p, read[f"model.{name}"], {kind: read[f"optim.{name}.{kind}"] for kind in kinds} if saved.step else {})
        if saved.step:
            for state in self._base.state.values():
                state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(taken))

    def _make_states(self) -> None:
        """AdamW makes its states in its first step; a step of rate 0 on gradients of 0 makes them and changes no weight."""
        config = self.config
        batch = training_batch(
            self.train, seed=config.seed, position=0, batch_size=config.data.batch_size, context=config.data.context
        )
        handles = [p.register_hook(torch.zeros_like) for p in self.model.parameters() if p.requires_grad]
        self.method.gradients(batch)
        self._apply(0.0)
        _link_states(self.engine.optimizer)
        for handle in handles:
            handle.remove()

    def _put(self, p: nn.Parameter, weight: Tensor, states: Mapping[str, Tensor]) -> None:
        import deepspeed
        from deepspeed import utils

        device, sharded = self.ranks.device, hasattr(p, "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=sharded):
            p.copy_(weight)
        if sharded:
            utils.safe_set_local_fp32_param(p, _own_part(p, weight).to(device))
        elif not self._is_plain:
            utils.safe_set_full_fp32_param(p, weight.to(device))
        for kind in (kind for kind in STATES if kind in states):
            if self._is_plain:
                self._base.state[p][kind].copy_(states[kind])
            elif sharded:
                utils.safe_set_local_optimizer_state(p, _own_part(p, states[kind]).to(device), kind)
            else:
                utils.safe_set_full_optimizer_state(p, states[kind].to(device), kind)


def _own_part(p: Any, whole: Tensor) -> Tensor:
    """What this rank holds of a parameter that ZeRO-3 has divided: equal parts of it, flat, the last ones padded.

    (``safe_set_full_fp32_param`` of DeepSpeed 0.19.8 does not pad, and fails for parameters that do not divide.)
    """
    size = p.ds_tensor.numel()
    rank, world = dist.get_rank(p.ds_process_group), dist.get_world_size(p.ds_process_group)
    flat = torch.zeros(size * world)
    flat[: whole.numel()] = whole.flatten()
    return flat[rank * size : (rank + 1) * size]


def _link_states(optimizer: Any) -> None:
    """DeepSpeed's ZeRO-1 and 2 look up where a parameter's optimizer states are after the first group's first step, when those
    of later groups do not exist yet (0.19.8): look again."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)


def whole_weight(p: nn.Parameter) -> Tensor:
    """A parameter in float32, whole, on every rank. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(p)
    return (p if whole is None else whole).detach().float()


def deepspeed_config(config: TrainConfig, ranks: RankMesh) -> dict[str, Any]:
    """``config.deepspeed`` with what the run's configuration says filled in.

    Raises:
        ValueError: the two say different things, or one asks for what the other has not.
    """
    if config.precision == "float64":
        raise ValueError('precision = "float64" is not known to DeepSpeed; take engine = "native"')
    if config.parallel.sharding != "none":
        raise ValueError(
            f'parallel.sharding = "{config.parallel.sharding}" beside engine = "deepspeed": leave it out and set '
            "deepspeed.zero_optimization.stage"
        )
    tree = dict(config.deepspeed)
    if config.compile and (tree.get("zero_optimization") or {}).get("stage") == 3:
        raise ValueError(
            "compile = true traces blocks whose weights ZeRO-3 has taken apart, which fails: set compile = false, "
            "or deepspeed.zero_optimization.stage to at most 2"
        )
    for key, instead in (("optimizer", "optim"), ("scheduler", "optim.lr, optim.warmup_steps and optim.final_lr")):
        if tree.get(key, "auto") != "auto":
            raise ValueError(f"deepspeed.{key} is not read by race-dist train: set {instead} of the run")
        tree.pop(key, None)
    parts = config.optim.accumulate
    ours: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // ranks.dp // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": config.optim.clip,
        SEQUENCE_PARALLEL_SIZE: ranks.sp,
    }
    for key, value in ours.items():
        if tree.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"deepspeed.{key} = {tree[key]!r} but the run's configuration makes it {value!r}: leave it out or "
                "make them agree"
            )
    layout = (tree.pop(RACE_SECTION, None) or {}).get("layout", ranks.layout)
    if layout != ranks.layout:
        raise ValueError(
            f"deepspeed.{RACE_SECTION}.layout = {layout!r} but parallel.layout = {ranks.layout!r}: make them agree"
        )
    if (tree.get("bf16") or {}).get("enabled", "auto") == "auto":
        tree["bf16"] = (tree.get("bf16") or {}) | {"enabled": config.precision == "bfloat16"}
    # the run's AdamW is torch's: DeepSpeed need not know it, nor compile its own for offloaded states
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | tree | ours
