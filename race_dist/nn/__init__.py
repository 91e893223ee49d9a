"""Layers: RACE attention, softmax attention beside it, their parts and their carries."""

from race_dist.nn.config import RaceConfig, SoftmaxConfig
from race_dist.nn.conv import ShortConv
from race_dist.nn.convolve import ConvolvedCarry
from race_dist.nn.core import RaceCore
from race_dist.nn.init import Drawn, Embedding, Linear, initialize
from race_dist.nn.norm import RMSNorm
from race_dist.nn.race import RaceAttention, RaceCarry
from race_dist.nn.rope import rotate, rotation
from race_dist.nn.sequence import Sequence, Span
from race_dist.nn.softmax import FullAttention, HistoryCarry
from race_dist.nn.tail import TailCarry
from race_dist.nn.window import WindowAttention

__all__ = [
    "ConvolvedCarry",
    "Drawn",
    "Embedding",
    "FullAttention",
    "HistoryCarry",
    "Linear",
    "RMSNorm",
    "RaceAttention",
    "RaceCarry",
    "RaceConfig",
    "RaceCore",
    "Sequence",
    "ShortConv",
    "SoftmaxConfig",
    "Span",
    "TailCarry",
    "WindowAttention",
    "initialize",
    "rotate",
    "rotation",
]
