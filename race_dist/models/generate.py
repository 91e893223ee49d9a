"""Token-by-token generation: the carry is all that is kept of the past."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from race_dist.models.backbone import ModelCarry
from race_dist.models.language import DecoderLM


def sample(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, allowed: Tensor | None = None) -> Tensor:
    """One token id a row, ``[B]``, of logits ``[B, vocab]``.

    Args:
        temperature: 0 takes the most likely token.
        top_k: draw from the k most likely only.
        top_p: draw from the fewest most likely tokens whose probabilities reach p.
        generator: of the draw.
        allowed: ``[vocab]`` bool, False for ids that are never drawn, on the logits' device; None: all may be.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
        surplus = ordered.cumsum(-1) - ordered >= top_p  # what is likelier reaches p already
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(1, index, surplus), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Context:
    """What a model remembers of a text, whatever its length: enough to go on from it.

    Attributes:
        carry: after the last token.
        hidden: ``[B, dim]``: the last token's hidden state, from which the next one is drawn.
    """

    carry: ModelCarry
    hidden: Tensor


@torch.no_grad()
def read(model: DecoderLM, ids: Tensor, before: Context | None = None, *, chunk: int = 8192) -> Context:
    """Go through a text, ``chunk`` tokens at a time.

    Args:
        model: in eval or training mode, no gradients are taken.
        ids: ``[B, T]`` int, at least one token.
        before: what came before it; None: it is the beginning.
        chunk: tokens of each row whose activations exist at a time.
    """
    # float64: a float32 mass that is fed single tokens stops growing at 2**24
    carry = model.zero_carry(ids.shape[0], state_dtype=torch.float64) if before is None else before.carry
    for piece in ids.split(chunk, dim=1):
        h, after = model.hidden(piece, carry)
        assert after is not None
        carry = after
    return Context(carry, h[:, -1])


def generate(model: DecoderLM, prompt_ids: Tensor | Context, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0,
             prefill_chunk: int = 8192, allowed: Tensor | int | None = None) -> Iterator[Tensor]:
    """Yield ``max_new_tokens`` times the next token of each row, ``[B]`` int64.

    The prompt goes through the model ``prefill_chunk`` tokens at a time; after it every token costs the same time and no
    more memory (but for full softmax layers, which keep every key).

    Args:
        model: in eval or training mode, no gradients are taken.
        prompt_ids: ``[B, T]`` or ``[T]`` int, at least one token, or what was read already.
        max_new_tokens: 0 or more.
        temperature: 0 takes the most likely token.
        top_k, top_p: draw from the k likeliest tokens, from the likeliest that together reach p.
        seed: of the draws.
        prefill_chunk: tokens of the prompt at a time.
        allowed: ids that may be drawn, where the vocabulary is padded: ``[vocab]`` bool, or a number n for the ids below n.
            None: all.

    Raises:
        ValueError: an argument is out of its range.
    """
    if isinstance(prompt_ids, Tensor):
        prompt_ids = prompt_ids[None] if prompt_ids.dim() == 1 else prompt_ids
        if prompt_ids.dim() != 2 or prompt_ids.shape[1] == 0:
            raise ValueError(f"prompt_ids must be [T] or [B, T] with at least one token; got {list(prompt_ids.shape)}")
    checks = (("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
              ("temperature", temperature, temperature >= 0, "at least 0"),
              ("top_k", top_k, top_k is None or top_k >= 1, "at least 1, or None"),
              ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
              ("prefill_chunk", prefill_chunk, prefill_chunk >= 1, "at least 1"))
    for name, value, fits, expected in checks:
        if not fits:
            raise ValueError(f"{name} must be {expected}; got {value}")
    return _steps(model, prompt_ids, max_new_tokens, prefill_chunk, seed,
                  {"temperature": temperature, "top_k": top_k, "top_p": top_p,
                   "allowed": None if allowed is None else _mask(allowed, model)})


def _mask(allowed: Tensor | int, model: DecoderLM) -> Tensor:
    """``[vocab]`` bool on the model's device."""
    size = model.config.vocab_size
    if isinstance(allowed, int) and not isinstance(allowed, bool):
        if not 1 <= allowed <= size:
            raise ValueError(f"allowed must be from 1 to vocab_size = {size}; got {allowed}")
        mask = torch.arange(size) < allowed
    elif isinstance(allowed, Tensor) and allowed.dtype == torch.bool and tuple(allowed.shape) == (size,):
        mask = allowed
        if not bool(mask.any()):
            raise ValueError("allowed is False for every id: there is nothing to draw")
    else:
        got = f"{allowed.dtype} {list(allowed.shape)}" if isinstance(allowed, Tensor) else repr(allowed)
        raise ValueError(f"allowed must be bool [vocab_size] = [{size}], or a number of ids; got {got}")
    return mask.to(model.embed.weight.device)


def _steps(model: DecoderLM, prompt: Tensor | Context, max_new_tokens: int, prefill_chunk: int, seed: int,
           choice: dict[str, Any]) -> Iterator[Tensor]:
    context = read(model, prompt, chunk=prefill_chunk) if isinstance(prompt, Tensor) else prompt
    generator = torch.Generator(context.hidden.device).manual_seed(seed)
    for step in range(max_new_tokens):
        with torch.no_grad():
            token = sample(model.logits(context.hidden), generator=generator, **choice)
        yield token
        if step + 1 < max_new_tokens:
            context = read(model, token[:, None], context)
