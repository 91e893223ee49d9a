"""Which engine trains a run: the one place that knows the engines by name."""

from __future__ import annotations

from typing import Any

from race_dist.training.config import TrainConfig
from race_dist.training.engine import CheckModel, Engine, NativeEngine
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.trainer import Trainer


def join(config: TrainConfig) -> RankMesh:
    """Join the job that the environment describes and take a place in the engine's mesh.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :meth:`race_dist.training.rank_mesh.RankMesh.join`, or a setting that the engine does not have.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronRankMesh

        return MegatronRankMesh.join(config)
    return RankMesh.join(config)


def build_engine(config: TrainConfig, mesh: Any, check_model: CheckModel) -> Engine:
    """The engine that ``config.engine`` names, on the mesh that :func:`join` returned.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: a setting that the engine does not have.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronEngine

        return MegatronEngine(config, mesh, check_model)
    if config.engine == "deepspeed":
        from race_dist.integrations.deepspeed.training import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh, check_model)
    return NativeEngine(config, mesh, check_model)


def make_trainer(config: TrainConfig, mesh: RankMesh) -> Trainer:
    """A trainer with the engine that ``config.engine`` names. Data, losses, metrics and files are the same for all engines.

    Raises:
        ImportError, ValueError: as :class:`race_dist.training.trainer.Trainer` and :func:`build_engine`.
    """
    return Trainer(config, mesh, build_engine)
