"""RACE Attention under DeepSpeed: sequence parallelism that exchanges sketches, with correct gradients for ZeRO 0 to 3."""

from importlib.util import find_spec

if find_spec("deepspeed") is None:
    raise ImportError("race_dist.integrations.deepspeed needs DeepSpeed: pip install 'race-dist[deepspeed]'")

from race_dist.integrations.deepspeed.attention import SketchAttention
from race_dist.integrations.deepspeed.config import RaceSection
from race_dist.integrations.deepspeed.engine import SequenceParallelMesh, initialize, join
from race_dist.integrations.deepspeed.module_injection import swap_attention
from race_dist.renamed_modules import renamed_attribute

__all__ = ["RaceSection", "SequenceParallelMesh", "SketchAttention", "initialize", "join", "swap_attention"]

RENAMED = {"Shared": "SequenceParallelMesh"}


def __getattr__(name: str) -> object:
    return renamed_attribute(__name__, RENAMED, name)
