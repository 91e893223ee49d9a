"""Text from a byte model, as it is written."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch

from race_dist.models import DecoderLM, generate


def stream_text(model: DecoderLM, prompt: str, *, tokens: int, temperature: float = 1.0, top_k: int | None = None,
                top_p: float | None = None, seed: int = 0) -> Iterator[str]:
    """Yield what the model writes after ``prompt``, ``tokens`` bytes of it, piece by piece.

    A character of several bytes comes when it is whole; bytes that are no UTF-8 come as U+FFFD.

    Args:
        model: over bytes; it is left in the mode it was in.
        prompt: at least one character.
        tokens: bytes to write.
        temperature: 0 always takes the likeliest byte.
        top_k, top_p: draw from the k likeliest bytes, from the likeliest that together reach p.
        seed: of the draws.

    Raises:
        ValueError: the prompt is empty or an argument is out of its range.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character to go on from")
    ids = torch.frombuffer(bytearray(prompt.encode()), dtype=torch.uint8).long().to(model.embed.weight.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate(model, ids, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        text = decoder.decode(bytes(token.tolist()))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
