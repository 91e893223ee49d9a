"""Which engine trains: the one place that knows them by name."""

from __future__ import annotations

from race_dist.training.config import TrainConfig
from race_dist.training.ranks import Ranks
from race_dist.training.trainer import Trainer


def make_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """The trainer of ``config.engine``; all have the same data, losses, metrics, checkpoints and files.

    Raises:
        ImportError: the engine is not installed; the message names the extra.
        ValueError: as :class:`race_dist.training.trainer.Trainer`, or a setting that the engine has not.
    """
    if config.engine == "deepspeed":
        from race_dist.integrations.deepspeed.trainer import DeepSpeedTrainer

        return DeepSpeedTrainer(config, ranks)
    return Trainer(config, ranks)
