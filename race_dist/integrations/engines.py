"""Which engine trains: the one place that knows them by name."""

from __future__ import annotations

from race_dist.training.config import TrainConfig
from race_dist.training.ranks import RankMesh
from race_dist.training.trainer import Trainer


def join(config: TrainConfig) -> RankMesh:
    """Join the job that the environment describes and take a place in the engine's mesh.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :meth:`race_dist.training.ranks.RankMesh.join`, or a setting that the engine has not.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronRankMesh

        return MegatronRankMesh.join(config)
    return RankMesh.join(config)


def make_trainer(config: TrainConfig, ranks: RankMesh) -> Trainer:
    """The trainer of ``config.engine`` on the place that :func:`join` took. All have the same data, losses, metrics and files.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :class:`race_dist.training.trainer.Trainer`, or a setting that the engine has not.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronRankMesh, MegatronTrainer

        assert isinstance(ranks, MegatronRankMesh)
        return MegatronTrainer(config, ranks)
    if config.engine == "deepspeed":
        from race_dist.integrations.deepspeed.trainer import DeepSpeedTrainer

        return DeepSpeedTrainer(config, ranks)
    return Trainer(config, ranks)
