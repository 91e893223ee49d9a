"""Which engine trains: the one place that knows them by name."""

from __future__ import annotations

from race_dist.training.config import TrainConfig
from race_dist.training.ranks import Ranks
from race_dist.training.trainer import Trainer


def join(config: TrainConfig) -> Ranks:
    """Join the job that the environment describes and take a place in the engine's mesh.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :meth:`race_dist.training.ranks.Ranks.join`, or a setting that the engine has not.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronRanks

        return MegatronRanks.join(config)
    return Ranks.join(config)


def make_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """The trainer of ``config.engine`` on the place that :func:`join` took. All have the same data, losses, metrics and files.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :class:`race_dist.training.trainer.Trainer`, or a setting that the engine has not.
    """
    if config.engine == "megatron":
        from race_dist.integrations.megatron.training import MegatronRanks, MegatronTrainer

        assert isinstance(ranks, MegatronRanks)
        return MegatronTrainer(config, ranks)
    if config.engine == "deepspeed":
        from race_dist.integrations.deepspeed.trainer import DeepSpeedTrainer

        return DeepSpeedTrainer(config, ranks)
    return Trainer(config, ranks)
