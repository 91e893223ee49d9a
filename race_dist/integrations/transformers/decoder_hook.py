"""The hook in front of a transformers decoder: it describes the batch once for all layers, and sets the ranks that share it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from race_dist.distributed.communication import check_group
from race_dist.integrations.transformers.batch_sequence import BatchSequence, CachedTokens, batch_sequence
from race_dist.integrations.transformers.cache import RaceCacheLayer, check_cache
from race_dist.integrations.transformers.layer import RaceSelfAttention
from race_dist.integrations.transformers.settings import IMPLEMENTATION
from race_dist.parallel import check_same_on_all_ranks
from race_dist.parallel.sharding import check_layout

CACHES = ("cache", "past_key_values")
ATTENTION_NAMES = ("self_attn", "attention")  # of a block


class DecoderHook:
    """A forward pre-hook: describe the rows of the batch and pass the description to every layer, as ``race_sequence``.

    If there is padding and the caller gives no positions, the hook adds positions that count real tokens only. A shard without
    tokens, which transformers' own layers cannot reshape, is replaced by one token whose outputs are removed afterwards.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.group: ProcessGroup | None = None
        self.layout = "contiguous"
        self.implementation = ""  # the one that was set when the group was set: another one might see its own shard only
        parameters = inspect.signature(type(decoder).forward).parameters
        self._names = list(parameters)
        self._accepts_kwargs = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = dict(zip(self._names[1:], args)) | kwargs  # the first is self
        x = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
        if not isinstance(x, Tensor):
            return args, kwargs
        converted = any(isinstance(attention_module(block), RaceSelfAttention) for block in decoder.layers)
        is_race = decoder.config._attn_implementation == IMPLEMENTATION
        if self.group is not None and decoder.config._attn_implementation != self.implementation:
            raise ValueError(
                f"the attention implementation was changed to {decoder.config._attn_implementation!r} after "
                "sequence_parallel was called: call it again"
            )
        if not converted and not is_race:
            return args, kwargs
        if call.get("output_attentions") or decoder.config.output_attentions:
            raise ValueError("output_attentions=True asks for attention weights, which RACE layers do not have: leave it out")
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        if cache is not None and converted:
            check_cache(cache)
        if self.group is not None and cache is not None:
            raise ValueError("decoding over a shared sequence is not supported: pass use_cache=False, or generate on one rank")
        return_carry = converted and self.group is None and (cache is not None or self._will_cache(decoder, call))
        mask = call.get("attention_mask")
        rows = batch_sequence(
            x.shape[0],
            x.shape[1],
            x.device,
            attention_mask=mask,
            position_ids=call.get("position_ids"),
            cu_seqlens=call.get("cu_seq_lens_q"),
            cached=_cached_tokens(cache),
            return_carry=return_carry,
            group=self.group,
            layout=self.layout,
        )
        if self._accepts_kwargs:
            call["race_sequence"] = rows
        if call.get("position_ids") is None and (self.group is not None or mask is not None) and "position_ids" in self._names:
            positions = rows.sequence.positions
            call["position_ids"] = positions[None] if positions.dim() == 1 else positions
        if self.group is not None and is_race and not x.shape[1]:
            call |= _placeholder_token(x, "input_ids" if call.get("input_ids") is not None else "inputs_embeds")
        return (), call

    @staticmethod
    def _will_cache(decoder: Any, call: dict[str, Any]) -> bool:
        """Whether the decoder will create a cache that later calls continue from. In training it does not."""
        wanted = call.get("use_cache")
        if wanted is None:
            wanted = getattr(decoder.config, "use_cache", False)
        return bool(wanted) and not decoder.training


def attention_module(block: nn.Module) -> nn.Module | None:
    """The attention module of a decoder's block, under the names that transformers gives it."""
    found = (getattr(block, name, None) for name in ATTENTION_NAMES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _placeholder_token(x: Tensor, name: str) -> dict[str, Any]:
    """The arguments that replace a shard ``x [B, 0, ...]`` without tokens."""
    position = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    return {name: x.new_zeros(x.shape[0], 1, *x.shape[2:]), "position_ids": position, "attention_mask": None}


def _remove_placeholder_outputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: remove the outputs of the token that stands for a shard without tokens."""
    rows = kwargs.get("race_sequence")
    if not isinstance(rows, BatchSequence) or rows.sequence.length or not hasattr(output, "last_hidden_state"):
        return output
    if output.last_hidden_state.shape[1]:
        output.last_hidden_state = output.last_hidden_state[:, :0]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(h[:, :0] for h in output.hidden_states)
    return output


def _cached_tokens(cache: Any) -> CachedTokens:
    """The tokens in a cache, as a RACE layer of the cache has counted them. Without such a layer the position is None."""
    if cache is None:
        return CachedTokens(0, 0)
    counted = next((layer for layer in cache.layers if isinstance(layer, RaceCacheLayer)), None)
    return CachedTokens(int(cache.get_seq_length())) if counted is None else CachedTokens(counted.seen, counted.position)


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of decoder layers inside a language model.

    Raises:
        TypeError: the model is not a transformers decoder.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: a transformers model is needed; got {type(model).__name__}")
    decoder = model.base_model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise TypeError(
            f"{type(model).__name__} has no list of decoder layers, as Llama, Qwen, Mistral and GPT-NeoX class models have"
        )
    return decoder


def install_decoder_hook(model: nn.Module) -> DecoderHook:
    """The hook of a model's decoder, installed on first use."""
    decoder = decoder_of(model)
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(hook, DecoderHook):
            return hook
    hook = DecoderHook(decoder)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    decoder.register_forward_hook(_remove_placeholder_outputs, with_kwargs=True)
    return hook


def softmax_layers(model: nn.Module) -> list[int]:
    """Indices of the layers whose attention is not RACE."""
    decoder = decoder_of(model)
    if model.config._attn_implementation == IMPLEMENTATION:  # type: ignore[union-attr]
        return []
    converted = {m.layer_idx for m in decoder.modules() if isinstance(m, RaceSelfAttention)}
    return [i for i in range(len(decoder.layers)) if i not in converted]  # type: ignore[arg-type]


def sequence_parallel(model: nn.Module, group: ProcessGroup | None, *, layout: str = "contiguous") -> None:
    """Let the ranks of ``group`` share every sequence: from now on each rank calls the model with its shard.

    :func:`shard_batch` shards a batch. Each rank's loss is then its share of the mean loss of the batch: losses and gradients
    are summed over the ranks. ``group=None`` switches sequence parallelism off.

    Raises:
        ValueError: a layer is softmax attention, which would see its own shard only, or the models of the ranks differ.
    """
    check_group(group)
    layout = check_layout(layout)
    others = softmax_layers(model)
    if others and group is not None:
        raise ValueError(
            f"layers {others} are softmax attention and would attend to their own shard only: convert all layers, or "
            f'use attn_implementation="{IMPLEMENTATION}"'
        )
    hook = install_decoder_hook(model)
    hook.group, hook.layout = group, layout
    hook.implementation = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    if group is not None:
        check_same_on_all_ranks(
            {"the model's configuration": _config_text(model), "the layout": layout},
            group,
            what="the model that shares sequences",
        )
        if not any(isinstance(h, _ShardedLabelsCheck) for h in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_ShardedLabelsCheck(hook), with_kwargs=True)


class _ShardedLabelsCheck:
    """A forward pre-hook of a model whose sequences are sharded: refuse labels without what their loss needs."""

    def __init__(self, hook: DecoderHook) -> None:
        self._hook = hook

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._hook.group is None or kwargs.get("labels") is None:
            return
        missing = [name for name in ("shift_labels", "num_items_in_batch") if kwargs.get(name) is None]
        if missing:
            raise ValueError(
                f"labels of a shard need {' and '.join(missing)}: the target of a shard's last token lies on "
                "another rank, and a share is divided by the whole batch's targets; shard_batch gives both"
            )


def _config_text(model: nn.Module) -> str:
    config = model.config.to_diff_dict()  # type: ignore[union-attr, operator]
    return repr({k: config[k] for k in sorted(config) if k not in ("_name_or_path", "transformers_version")})[:3000]
