"""Exact training of a whole model with activation memory that does not grow with the sequence."""

from race_dist.streaming.carry_stack import Keep
from race_dist.streaming.checkpoint import DamagedStepError, OtherStepError, StepCheckpoint
from race_dist.streaming.chunks import Tokens
from race_dist.streaming.progress import Progress, StepInterrupted
from race_dist.streaming.step import streamed_backward, streamed_loss, streamed_prompt

__all__ = [
    "DamagedStepError",
    "Keep",
    "OtherStepError",
    "Progress",
    "StepCheckpoint",
    "StepInterrupted",
    "Tokens",
    "streamed_backward",
    "streamed_loss",
    "streamed_prompt",
]
