"""Prefill and token-by-token generation: a model's carry is all that is stored of the text so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from race_dist import checks
from race_dist.models.backbone import ModelCarry
from race_dist.models.language import DecoderLM


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Sample one token id per row, ``[B]``, from logits ``[B, vocab]``.

    Args:
        temperature: 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least p.
        generator: random number generator of the sample.
        allowed: ``[vocab]`` bool on the logits' device, False for ids that are never sampled; None: all ids may be.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range, or the logits contain NaN or Inf.
    """
    checks.tensor("logits", logits, dtypes=checks.DTYPES, dim=2)
    _check_sampling(temperature, top_k, top_p)
    if generator is not None:
        checks.instance("generator", generator, torch.Generator)
    if checks.readable(logits) and not bool((logits < float("inf")).all() & (logits > float("-inf")).any(-1).all()):
        raise ValueError("logits hold NaN or Inf, from which no token can be sampled: the model has diverged")
    return _sample(logits, temperature, top_k, top_p, generator, allowed)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if checks.number("temperature", temperature, minimum=0, words="at least 0") and temperature < MIN_SAMPLING_VALUE:
        raise ValueError(f"temperature must be 0 (the most likely token) or at least {MIN_SAMPLING_VALUE:g}; got {temperature}")
    if top_k is not None:
        checks.integer("top_k", top_k, minimum=1, words="at least 1, or None")
    if (
        top_p is not None
        and checks.number("top_p", top_p, above=0, maximum=1, words="above 0 and at most 1, or None") < MIN_SAMPLING_VALUE
    ):
        raise ValueError(
            f"top_p must be at least {MIN_SAMPLING_VALUE:g} (temperature=0 takes the most likely token); got {top_p}"
        )


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    allowed: Tensor | None = None,
) -> Tensor:
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: finite at any temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
        surplus = ordered.cumsum(-1) - ordered >= top_p  # tokens after those that reach p
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(1, index, surplus), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


MIN_SAMPLING_VALUE = 1e-30  # of temperature and top_p: safe in float32


@dataclass(frozen=True)
class PromptState:
    """The state of a model after a text of any length, from which generation continues.

    Attributes:
        carry: the carry after the last token.
        hidden: ``[B, dim]``: the hidden state of the last token, from which the next token is sampled.
    """

    carry: ModelCarry
    hidden: Tensor


@torch.no_grad()
def prefill(
    model: DecoderLM, ids: Tensor, before: PromptState | None = None, *, chunk: int = 8192, key_mask: Tensor | None = None
) -> PromptState:
    """Run a model over a text, ``chunk`` tokens at a time. :func:`generate` continues from the state that this returns.

    Texts of several lengths go in one batch; padding may stand anywhere.

    Args:
        model: in eval or training mode; no gradients are computed.
        ids: ``[B, T]`` int, at least one token.
        before: the state of the text before ``ids``; None: ``ids`` begin the text.
        chunk: tokens of each row whose activations exist at a time.
        key_mask: ``[B, T]`` bool, False for padding. A row with only padding keeps its state ``before``.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range, or a row has no token.
    """
    checks.instance("model", model, DecoderLM)
    chunk = checks.integer("chunk", chunk, minimum=1, maximum=2**62)
    checks.tensor("ids", ids, dtypes=checks.INTEGERS, dim=2)
    if ids.shape[1] == 0:
        raise ValueError(f"ids must be [B, T] with at least one token; got {list(ids.shape)}")
    if before is not None:
        checks.instance("before", before, PromptState)
    if key_mask is not None:
        checks.tensor("key_mask", key_mask, dtypes=(torch.bool,), dim=2)
        _check_prompt_mask("ids", ids, key_mask, continued=before is not None)
    # float64 sketches: a float32 mass stops growing at 2**24 tokens
    carry = model.zero_carry(ids.shape[0], state_dtype=torch.float64) if before is None else before.carry
    hidden = None if before is None else before.hidden
    for start in range(0, ids.shape[1], chunk):
        real = None if key_mask is None else key_mask[:, start : start + chunk]
        h, after = model.hidden(ids[:, start : start + chunk], carry, key_mask=real)
        assert after is not None
        carry, hidden = after, h[:, -1] if real is None else _last_real(h, real, hidden)
    assert hidden is not None
    return PromptState(carry, hidden)


def _check_prompt_mask(name: str, ids: Tensor, key_mask: Tensor, *, continued: bool = False) -> Tensor:
    """The mask; ValueError unless it has the shape of ``ids`` and each text that begins has a token."""
    if key_mask.shape != ids.shape:
        raise ValueError(f"key_mask must be bool {list(ids.shape)} like {name}; got {list(key_mask.shape)}")
    if not continued and not bool(key_mask.any(1).all()):
        row = int(key_mask.any(1).long().argmin())
        raise ValueError(f"row {row} of key_mask is all False: its text needs at least one token")
    return key_mask


def _last_real(h: Tensor, real: Tensor, before: Tensor | None) -> Tensor:
    """``[B, dim]``: the hidden state of each row's last real token; ``before`` where a row has none."""
    count = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax(1)  # index of the last real token + 1; 0: none
    last = h.take_along_dim((count - 1).clamp(min=0)[:, None, None], 1)[:, 0]
    return last if before is None else torch.where(count[:, None] > 0, last, before)


def generate(
    model: DecoderLM,
    prompt_ids: Tensor | PromptState,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prefill_chunk: int = 8192,
    allowed: Tensor | int | None = None,
    key_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield ``max_new_tokens`` times the next token of each row, ``[B]`` int64.

    The prompt is prefilled ``prefill_chunk`` tokens at a time. After that every token takes the same time and no additional
    memory, except in full softmax layers, which store every key.

    Args:
        model: in eval or training mode; no gradients are computed.
        prompt_ids: ``[B, T]`` or ``[T]`` int, at least one token; or the state of a prompt that was prefilled before.
        max_new_tokens: 0 or more.
        temperature: 0 takes the most likely token.
        top_k, top_p: as for :func:`sample`.
        seed: of the random numbers.
        prefill_chunk: tokens of the prompt whose activations exist at a time.
        allowed: ids that may be sampled, where the vocabulary is padded: ``[vocab]`` bool, or a number n for the ids below n.
            None: all.
        key_mask: bool like prompt_ids, False for padding, which may stand anywhere: for prompts of several lengths. Each row
            gets the tokens that it would get alone.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range.
    """
    checks.instance("model", model, DecoderLM)
    if isinstance(prompt_ids, PromptState) and key_mask is not None:
        raise ValueError(
            "key_mask belongs to a prompt's tokens, but prompt_ids is a PromptState: give the mask to "
            "prefill(model, ids, before, key_mask=...)"
        )
    if not isinstance(prompt_ids, PromptState):
        checks.tensor("prompt_ids", prompt_ids, dtypes=checks.INTEGERS)
        prompt_ids = prompt_ids[None] if prompt_ids.dim() == 1 else prompt_ids
        if prompt_ids.dim() != 2 or prompt_ids.shape[1] == 0:
            raise ValueError(f"prompt_ids must be [T] or [B, T] with at least one token; got {list(prompt_ids.shape)}")
        if key_mask is not None:
            key_mask = checks.tensor("key_mask", key_mask, dtypes=(torch.bool,))
            key_mask = _check_prompt_mask("prompt_ids", prompt_ids, key_mask[None] if key_mask.dim() == 1 else key_mask)
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, minimum=0, words="at least 0")
    _check_sampling(temperature, top_k, top_p)
    seed = checks.integer("seed", seed, minimum=0, maximum=2**64 - 1)
    prefill_chunk = checks.integer("prefill_chunk", prefill_chunk, minimum=1, maximum=2**62, words="at least 1")
    return _generate_tokens(
        model,
        prompt_ids,
        key_mask,
        max_new_tokens,
        prefill_chunk,
        seed,
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "allowed": None if allowed is None else _mask(allowed, model),
        },
    )


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
            raise ValueError("allowed is False for every id: there is nothing to sample")
    else:
        got = f"{allowed.dtype} {list(allowed.shape)}" if isinstance(allowed, Tensor) else repr(allowed)
        raise ValueError(f"allowed must be bool [vocab_size] = [{size}], or a number of ids; got {got}")
    return mask.to(model.embed.weight.device)


def _generate_tokens(
    model: DecoderLM,
    prompt: Tensor | PromptState,
    key_mask: Tensor | None,
    max_new_tokens: int,
    prefill_chunk: int,
    seed: int,
    sampling: dict[str, Any],
) -> Iterator[Tensor]:
    state = prefill(model, prompt, chunk=prefill_chunk, key_mask=key_mask) if isinstance(prompt, Tensor) else prompt
    generator = torch.Generator(state.hidden.device).manual_seed(seed)
    for step in range(max_new_tokens):
        with torch.no_grad():
            token = sample(model.logits(state.hidden), generator=generator, **sampling)
        yield token
        if step + 1 < max_new_tokens:
            state = prefill(model, token[:, None], state)
