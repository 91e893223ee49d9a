"""Exact training of a whole model with activation memory that does not grow with the sequence."""

from race_dist.streaming.carries import Keep
from race_dist.streaming.step import Progress, streamed_backward, streamed_loss
from race_dist.streaming.text import Tokens

__all__ = ["Keep", "Progress", "Tokens", "streamed_backward", "streamed_loss"]
