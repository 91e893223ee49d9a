"""RACE Attention in transformers models: ``attn_implementation="race"``, ``convert``, sequence parallelism.

Importing this package registers the implementation.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("race_dist.integrations.transformers needs transformers: pip install 'race-dist[transformers]'")

from race_dist.integrations.transformers.attention_interface import race_attention_forward, race_mask, register
from race_dist.integrations.transformers.cache import RaceCacheLayer, cached_bytes
from race_dist.integrations.transformers.checkpoint_patches import install
from race_dist.integrations.transformers.convert import build, convert, freeze_all_but, from_pretrained, trained_parts
from race_dist.integrations.transformers.decoder_hook import sequence_parallel
from race_dist.integrations.transformers.layer import RaceSelfAttention
from race_dist.integrations.transformers.parallel import ShardedLoader, sequence_parallel_trainer, shard_batch

register()
install(build)

__all__ = [
    "RaceCacheLayer",
    "RaceSelfAttention",
    "ShardedLoader",
    "cached_bytes",
    "convert",
    "freeze_all_but",
    "from_pretrained",
    "race_attention_forward",
    "race_mask",
    "register",
    "sequence_parallel",
    "sequence_parallel_trainer",
    "shard_batch",
    "trained_parts",
]
