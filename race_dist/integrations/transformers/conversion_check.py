"""Check that a RACE layer can replace an attention module, by running the model on three tokens.

The parameters of a module do not show what its ``forward`` does with them: it may clip a projection, apply a norm after the
attention, a gate or a scale. The model therefore runs once with an attention function that records its arguments. A RACE layer
may replace the module only if it computes the same queries, keys and values from the same input, and the same output from the
same heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from race_dist.integrations.transformers.projections import Projections
from race_dist.nn import rotate

RECORDING_IMPLEMENTATION = "race_recording"
TOKENS = 3
# tensors that may be passed to an attention function without affecting RACE Attention
HARMLESS_TENSORS = ("position_ids", "cache_position", "position_embeddings")


@dataclass
class AttentionCall:
    """The recorded inputs and outputs of one call of an attention module.

    Attributes:
        x: input ``[B, T, dim]`` of the module.
        kwargs: keyword arguments of the module.
        q, k, v: arguments of the attention function, ``[B, H, T, D]``, after rotary positions; None if none was called.
        mask: the pattern that the model combines with the causal mask, or another mask; None if there is none.
        attention_kwargs: the other arguments of the attention function.
        heads: output of the attention function, ``[B, T, Hq * D]``.
        y: output of the module.
    """

    x: Tensor
    kwargs: dict[str, Any]
    y: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Any = None
    attention_kwargs: dict[str, Any] | None = None
    heads: Tensor | None = None


@dataclass(frozen=True)
class Pattern:
    """A pattern beside the causal mask: a window or chunk of ``size`` tokens, or an unknown pattern (None)."""

    size: int | None


@torch.no_grad()
def run(decoder: nn.Module) -> None:
    """Run a decoder on three tokens, in evaluation mode, without a cache."""
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        embedding = decoder.get_input_embeddings()  # type: ignore[operator]
        count = embedding.weight.shape[0]
        ids = torch.arange(3, 3 + TOKENS, device=embedding.weight.device)[None] % count
        decoder(input_ids=ids, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode


def record_calls(decoder: nn.Module, attentions: Mapping[int, nn.Module]) -> dict[int, AttentionCall]:
    """Run the decoder and record the call of each given module, by layer index. Modules that are not called are missing."""
    calls: dict[int, AttentionCall] = {}
    functions: dict[int, dict[str, Any]] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **attention_kwargs: Any
    ) -> tuple[Tensor, None]:
        out = value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()
        functions[id(module)] = {
            "q": query,
            "k": key,
            "v": value,
            "mask": attention_mask,
            "attention_kwargs": attention_kwargs,
            "heads": out.flatten(2),
        }
        return out, None

    def recorder(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            y = out[0] if isinstance(out, tuple) else out
            calls[index] = AttentionCall(x, kwargs, y, **functions.get(id(module), {}))

        return hook

    handles = [module.register_forward_hook(recorder(index), with_kwargs=True) for index, module in attentions.items()]
    try:
        with _implementation(decoder, attention):
            run(decoder)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _mask(*_: Any, **how: Any) -> Pattern | None:
    """A mask function that returns the pattern of the mask instead of the mask."""
    function = getattr(how.get("mask_function"), "__qualname__", "")
    if how.get("local_size") is not None:
        return Pattern(int(how["local_size"]))
    return Pattern(None) if how.get("use_vmap") or "or_mask" in function or "bidirectional" in function else None


@contextmanager
def _implementation(decoder: nn.Module, attention: Any) -> Iterator[None]:
    AttentionInterface.register(RECORDING_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(RECORDING_IMPLEMENTATION, _mask)
    found: list[Any] = [getattr(module, "config", None) for module in decoder.modules()]
    configs = {id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation_internal = RECORDING_IMPLEMENTATION
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(RECORDING_IMPLEMENTATION, None)


def check_equivalent(
    call: AttentionCall, attention: nn.Module, projections: Projections, where: str, *, longest: int | None, rotated: bool
) -> None:
    """Raise ValueError, naming the module, unless the projections alone reproduce the arguments of its attention function.

    Args:
        call: the recorded call of the module.
        attention: the module.
        projections: the submodules that a RACE layer would take over.
        where: name of the module in errors.
        longest: longest sequence of the model: a sliding window of that size has no effect.
        rotated: whether the RACE layer applies the model's rotary positions to queries and keys.
    """
    leave = "leave this layer out of layers (it stays softmax)"
    if call.q is None or call.k is None or call.v is None or call.heads is None:
        raise ValueError(
            f"{where} does not call transformers' attention function, so its other operations cannot be checked: {leave}"
        )
    _check_arguments(call, where, longest, leave)
    with torch.no_grad():
        own = dict(zip(("queries", "keys", "values"), projections.project(attention, call.x), strict=True))
        y = projections.output(attention, call.heads)
    for (name, x), expected in zip(own.items(), (call.q, call.k, call.v), strict=True):
        x = x.unflatten(-1, (-1, projections.head_dim)).transpose(1, 2)
        if name != "values":
            x, expected = _comparable(x, expected, call.kwargs.get("position_embeddings"), rotated)
        if not _close(x, expected):
            turned = ", other rotary positions" if rotated else ""
            raise ValueError(
                f"{where} computes its {name} by more than {', '.join(_parts(projections, name))} (a "
                f"scale, a clip, another order or width of heads{turned}): {leave}"
            )
    if not _close(y, call.y):
        raise ValueError(
            f"{where} computes its output by more than {projections.names[-1]} (a gate, a norm or a scale "
            f"after the attention): {leave}"
        )


def _check_arguments(call: AttentionCall, where: str, longest: int | None, leave: str) -> None:
    attention_kwargs = call.attention_kwargs or {}
    size = call.mask.size if isinstance(call.mask, Pattern) else None
    windows = [int(n) for n in (size, attention_kwargs.get("sliding_window")) if n is not None]
    if windows and (longest is None or min(windows) < longest):
        raise ValueError(
            f"{where} attends to a sliding window or chunk of {min(windows)} tokens, but a RACE layer attends to all earlier "
            f"tokens: {leave}, or create the model without windows (config.sliding_window = None)"
        )
    if call.mask is not None and size is None:
        raise ValueError(f"{where} has its own attention mask in addition to the causal one (a bias or pattern): {leave}")
    if attention_kwargs.get("softcap") is not None:
        raise ValueError(
            f"{where} caps its logits (softcap = {attention_kwargs['softcap']}), but RACE Attention has no logits: {leave}, "
            "or create the model without a cap"
        )
    more = [name for name, value in attention_kwargs.items() if isinstance(value, Tensor) and name not in HARMLESS_TENSORS]
    if more:
        raise ValueError(f"{where} passes {', '.join(more)} to its attention, which RACE Attention does not support: {leave}")


def _parts(projections: Projections, name: str) -> tuple[str, ...]:
    index = ("queries", "keys", "values").index(name)
    norm = (projections.norms[index],) if projections.norms is not None and index < 2 else ()
    return (projections.names[min(index, len(projections.names) - 2)], *norm)


def _comparable(x: Tensor, expected: Tensor, embeddings: Any, rotated: bool) -> tuple[Tensor, Tensor]:
    """Make queries or keys before rotary positions, ``x [B, H, T, D]``, comparable with the model's, ``expected``.

    If the RACE layer applies rotary positions too, they are applied to the halves of each head here. Otherwise only the first
    token is compared: at position 0 nothing is rotated, though some models scale it there (YaRN).
    """
    if not isinstance(embeddings, tuple) or not isinstance(embeddings[0], Tensor):
        return x[:, :, :1], expected[:, :, :1]
    cos, sin = (t.to(x.dtype) for t in embeddings)
    if not rotated:
        x, turned = x[:, :, :1], min(cos.shape[-1], x.shape[-1])
        return torch.cat([x[..., :turned] * cos.flatten()[0], x[..., turned:]], -1), expected[:, :, :1]
    if cos.dim() != 3 or cos.shape[-1] != x.shape[-1]:  # a part of each head, or axes of images
        return x, expected[..., :0]
    half = x.shape[-1] // 2
    return rotate(x.transpose(1, 2), cos[..., :half], sin[..., :half]).transpose(1, 2), expected


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    limit = max(1e-4, 8 * torch.finfo(a.dtype).eps)
    return bool((a - b).abs().amax() <= limit * b.abs().amax().clamp(min=1e-30))
