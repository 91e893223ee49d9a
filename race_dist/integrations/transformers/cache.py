"""The recurrent state of a converted layer, as one layer of a transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from race_dist.nn import RaceCarry


class RaceCacheLayer(CacheLayerMixin):
    """The carry of a RACE layer and the number of tokens it has seen. Its size does not depend on that number.

    Attributes:
        carry: the state that the layer continues from; None before the first token.
        seen: number of tokens, padding included.
        position: position of the next token, which counts real tokens only: one number, or ``[B]`` if there was padding.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.carry: RaceCarry | None = None
        self.seen = 0
        self.position: Tensor | int = 0

    def advance(self, carry: RaceCarry, tokens: int, position: Tensor | int) -> None:
        """Store the carry after ``tokens`` more tokens, and the position after them."""
        self.carry, self.seen, self.position, self.is_initialized = carry, self.seen + tokens, position, True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the layer creates its own state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "this cache layer belongs to a RACE layer, which keeps no keys and values: the cache was made for another model"
        )

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + length, 0

    def _map_tensors(self, change: Any) -> None:
        if self.carry is not None:
            self.carry = self.carry.with_tensors(tuple(change(t) for t in self.carry.tensors()))
        if isinstance(self.position, Tensor) and self.position.dim():
            self.position = change(self.position)

    def reset(self) -> None:
        self.carry, self.seen, self.position, self.is_initialized = None, 0, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_tensors(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Do nothing: the layer moves its carry to the device of its input."""

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "a RACE layer cannot forget the last tokens it has seen: decode without an assistant model, prompt "
            "lookup or anything else that removes tokens from the cache"
        )


def cache_layer(cache: Cache, index: int) -> RaceCacheLayer:
    """The entry of layer ``index`` in ``cache``, created on first use.

    Raises:
        TypeError: the cache is not a DynamicCache, or its entry holds keys and values.
    """
    check_cache(cache)
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if not isinstance(layer, RaceCacheLayer):
        if layer.get_seq_length():
            raise TypeError(f"layer {index} of the cache holds keys and values: the cache was made for another model")
        layer = cache.layers[index] = RaceCacheLayer()
    return layer


def check_cache(cache: object) -> None:
    """Raise TypeError unless the cache is a DynamicCache."""
    if not isinstance(cache, DynamicCache):
        raise TypeError(
            f"RACE layers decode with a DynamicCache (the default); got {type(cache).__name__}: leave cache_implementation out"
        )


def cached_bytes(cache: Cache) -> int:
    """The number of bytes of all tensors in a cache."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a cache of transformers; got {type(cache).__name__}")
    tensors: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, RaceCacheLayer):
            tensors += () if layer.carry is None else layer.carry.tensors()
        else:
            tensors += [t for t in (layer.keys, layer.values) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
