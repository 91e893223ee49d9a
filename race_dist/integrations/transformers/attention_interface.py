"""``attn_implementation="race"``: RACE Attention as one of transformers' attention functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from race_dist.integrations.transformers.batch_sequence import BatchSequence, batch_sequence
from race_dist.integrations.transformers.settings import CONFIG_ENTRY, IMPLEMENTATION, Settings
from race_dist.nn import RaceConfig, RaceCore


def register() -> None:
    """Register ``attn_implementation="race"`` with transformers, with a mask function that passes the padding mask on."""
    AttentionInterface.register(IMPLEMENTATION, race_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, race_mask)


def race_mask(*args: Any, attention_mask: Tensor | None = None, kv_length: int | None = None, **kwargs: Any) -> Tensor | None:
    """The unchanged padding mask ``[B, keys]``; RACE Attention itself handles causality and packed documents.

    Raises:
        ValueError: the model combines another pattern with the causal mask.
    """
    if kwargs.get("use_vmap") or "or_mask" in getattr(kwargs.get("mask_function"), "__qualname__", ""):
        raise ValueError(
            'attn_implementation="race" attends to all earlier tokens of a document; this model adds its own '
            "pattern to the attention mask: use another implementation"
        )
    size = kwargs.get("local_size")
    if size is not None and kv_length is not None and kv_length > size:
        raise ValueError(
            f"the model has a sliding window of {size} tokens and {kv_length} keys; RACE Attention attends to all "
            "earlier tokens: set config.sliding_window = None (or its chunk size), or use another implementation"
        )
    if kv_length is not None and kwargs.get("q_length") is not None:
        last = int(kwargs.get("q_offset", 0)) + kwargs["q_length"]
    else:
        last = None if kwargs.get("cache_position") is None else int(kwargs["cache_position"][-1]) + 1  # transformers 4
    if kv_length is not None and last is not None and last != kv_length + kwargs.get("kv_offset", 0):
        raise ValueError(
            f"the cache has places for {kv_length} keys, of which {last} are used: RACE Attention decodes with a "
            "DynamicCache (the default), so leave cache_implementation out"
        )
    return attention_mask if attention_mask is None or kv_length is None else attention_mask[:, -kv_length:]


def race_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    race_sequence: BatchSequence | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the attention layer; its ``config.race_attention["options"]`` holds fields of :class:`RaceConfig` that
            need no parameters (num_tables, num_planes, beta_init, seed, ...). ``scaling`` is ignored: ``beta_init`` sets
            the sharpness of the hash.
        query: ``[B, Hq, T, D]``, after rotary positions.
        key, value: ``[B, Hkv, Tk, D]``: cached keys and values, then those of the query's tokens.
        attention_mask: ``[B, Tk]`` from :func:`race_mask`.
        position_ids, cu_seq_lens_q: packed documents.
        race_sequence: the description of the rows that the DecoderHook has computed for all layers, or None.

    Returns:
        ``[B, T, Hq, D]``, and None in the place of attention weights.

    Raises:
        ValueError: dropout, a sliding window, a logit cap, attention weights or another unsupported feature is requested.
    """
    padded_length = query.shape[2]
    # a shard without tokens holds one placeholder token
    if race_sequence is not None and not race_sequence.sequence.length:
        query, key, value = (x[:, :, :0] for x in (query, key, value))
    batch, _, length, _ = query.shape
    keys = key.shape[2]
    _check_supported(module, dropout, sliding_window, softcap, keys, kwargs)
    if keys != length and getattr(module, "is_causal", True) is False:
        raise ValueError(
            f"layer {getattr(module, 'layer_idx', None)} attends from {length} tokens to {keys} others: RACE "
            "Attention computes no cross attention: use another implementation"
        )
    core = _race_core(module, query, key)
    if race_sequence is None or keys != length:
        rows = batch_sequence(
            batch,
            keys,
            query.device,
            attention_mask=attention_mask,
            cu_seqlens=cu_seq_lens_q,
            position_ids=position_ids if keys == length else None,
        )
    else:
        rows = race_sequence
    if keys != length:  # the cache holds all keys: outputs are needed for the last rows only
        query = F.pad(query, (0, 0, keys - length, 0))
    q, k, v = (rows.fold(x.transpose(1, 2)) for x in (query, key, value))
    out, _ = core(q, k, v, None, rows.sequence)
    out = rows.unfold(out)[:, keys - length :]
    return F.pad(out, (0, 0, 0, 0, 0, padded_length - length)), None


def _check_supported(
    module: nn.Module, dropout: float, window: int | None, softcap: float | None, keys: int, others: dict[str, Any]
) -> None:
    layer = getattr(module, "layer_idx", None)
    if dropout:
        raise ValueError(
            f"layer {layer} drops attention weights (dropout = {dropout}); RACE Attention has no weights to drop: "
            "set config.attention_dropout = 0"
        )
    if window is not None and keys > window:
        raise ValueError(
            f"layer {layer} has a sliding window of {window} tokens and {keys} keys; RACE Attention attends to all "
            "earlier tokens: set config.sliding_window = None, or keep such layers softmax"
        )
    if softcap is not None:
        raise ValueError(
            f"layer {layer} caps its logits (softcap = {softcap}); RACE Attention has no logits: use another implementation"
        )
    if others.get("s_aux") is not None:
        raise ValueError(f"layer {layer} has attention sinks; RACE Attention has none: use another implementation")
    biases = [name for name in ("position_bias", "attention_bias", "attn_bias", "alibi") if others.get(name) is not None]
    if biases:
        raise ValueError(
            f"layer {layer} adds a {biases[0]} to its logits; RACE Attention has no logits: use another implementation"
        )
    config = getattr(module, "config", None)
    if others.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError("output_attentions=True asks for attention weights, which RACE Attention does not have: leave it out")


def _race_core(module: Any, query: Tensor, key: Tensor) -> RaceCore:
    """The RaceCore of a layer, created on first use. It has no parameters and adds nothing to a checkpoint."""
    core = getattr(module, "race_core", None)
    shape = (query.shape[1], key.shape[1], query.shape[3], getattr(module, "is_causal", True) is not False)
    core_options = (repr(getattr(module.config, CONFIG_ENTRY, None)), shape)
    if not isinstance(core, RaceCore) or module.race_core_options != core_options:
        core = module.race_core = _make_core(module, *shape, device=query.device)
        module.race_core_options = core_options
    if core.planes.device != query.device or (query.dtype == torch.float64) != (core.planes.dtype == torch.float64):
        core.to(device=query.device, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    return core


def _make_core(module: Any, heads: int, kv_heads: int, head_dim: int, causal: bool, *, device: torch.device) -> RaceCore:
    config = (
        Settings.of(module.config)
        .implementation_config()
        .with_model_dims(dim=heads * head_dim, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    )
    if not causal:
        config = RaceConfig.model_validate(config.model_dump() | {"causal": False})
    return _without_parameters(RaceCore(config, getattr(module, "layer_idx", None) or 0, device=device))


def _without_parameters(core: RaceCore) -> RaceCore:
    """Turn parameters (scales of one) into constant buffers."""
    for part in core.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            del part._parameters[name]
            part.register_buffer(name, parameter.detach(), persistent=False)
    return core
