"""Layers: RACE attention, window and full softmax attention, their parts and carries, and the registry of layer kinds."""

from race_dist.nn.config import RaceConfig, SoftmaxConfig
from race_dist.nn.full_attention import FullAttention, FullKind, HistoryCarry
from race_dist.nn.head_partition import HeadAxis, HeadPartition, HeadRange
from race_dist.nn.initialization import Embedding, Linear, SeededModule, initialize
from race_dist.nn.mixing_layer import LayerCarry, MixingLayer
from race_dist.nn.norm import RMSNorm
from race_dist.nn.race import RaceAttention, RaceCarry, RaceKind
from race_dist.nn.race_core import RaceCore
from race_dist.nn.recurrence import TokenSpan, run_recurrence
from race_dist.nn.registry import (
    LayerKind,
    ModelShape,
    kinds_in,
    layer_kind,
    register_layer_kind,
    registered_kinds,
    streamable_letters,
    unregister_layer_kind,
)
from race_dist.nn.rope import rotate, rotation
from race_dist.nn.sequence import Sequence, Span
from race_dist.nn.short_conv import ConvolvedCarry, ShortConv
from race_dist.nn.tail_carry import TailCarry
from race_dist.nn.window import WindowAttention, WindowKind
from race_dist.renamed_modules import renamed_attribute

for _kind in (RaceKind(), WindowKind(), FullKind()):
    register_layer_kind(_kind)

__all__ = [
    "ConvolvedCarry",
    "Embedding",
    "FullAttention",
    "HeadAxis",
    "HeadPartition",
    "HeadRange",
    "HistoryCarry",
    "LayerCarry",
    "LayerKind",
    "Linear",
    "MixingLayer",
    "ModelShape",
    "RMSNorm",
    "RaceAttention",
    "RaceCarry",
    "RaceConfig",
    "RaceCore",
    "SeededModule",
    "Sequence",
    "ShortConv",
    "SoftmaxConfig",
    "Span",
    "TailCarry",
    "TokenSpan",
    "WindowAttention",
    "initialize",
    "kinds_in",
    "layer_kind",
    "register_layer_kind",
    "registered_kinds",
    "rotate",
    "rotation",
    "run_recurrence",
    "streamable_letters",
    "unregister_layer_kind",
]

RENAMED = {"Drawn": "SeededModule"}


def __getattr__(name: str) -> object:
    return renamed_attribute(__name__, RENAMED, name)
