"""Text generation with a trained model: prefill of prompts of any length, sampling, and saved prompt state."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from race_dist.files import DamagedFileError, load_tensors, save_tensors
from race_dist.models import DecoderLM, PromptState, generate, prefill
from race_dist.training.consistency import tensors_digest

CHUNK = 8192  # tokens per forward pass of the prefill
_FORMAT = "race-dist context 1"


class Codec(Protocol):
    """Text to tokens and back.

    Attributes:
        known_ids: ``[n]`` int64, the ids that stand for text. A model's vocabulary may be larger.
    """

    known_ids: Tensor

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        """Token ids, ``[n]`` int64 tensors, of a text that is given as pieces of UTF-8."""
        ...

    def decoder(self) -> Callable[[int | None], str]:
        """A function that takes one token at a time and returns the text that is complete; None returns the rest."""
        ...


class ByteCodec:
    """A token is a byte. Bytes that are not UTF-8 decode to U+FFFD."""

    known_ids = torch.arange(256)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        return (torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces if piece)

    def decoder(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(b"", final=True) if token is None else decoder.decode(bytes([token]))


class TokenizerCodec:
    """The tokens of a ``tokenizer.json``, as the tokenizer encodes the whole text, without added special tokens."""

    def __init__(self, file: Path) -> None:
        from race_dist.training.data.tokenizer import TextTokenizer

        self._text = TextTokenizer(file)
        self._tokenizer = self._text.tokenizer
        self.known_ids = torch.from_numpy(self._text.known_ids)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        return (torch.from_numpy(ids) for ids in self._text.encode(pieces) if len(ids))

    def decoder(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream  # type: ignore[import-not-found, unused-ignore]

        stream, waiting = DecodeStream(skip_special_tokens=False), list[int]()

        def take(token: int | None) -> str:
            if token is None:  # the bytes of an incomplete character
                return str(self._tokenizer.decode(waiting, skip_special_tokens=False)) if waiting else ""
            waiting.append(token)
            text = stream.step(self._tokenizer, token) or ""
            if text:
                waiting.clear()
            return text

        return take


def codec_for(tokenizer: Path | None) -> Codec:
    """The codec of a tokenizer file; None: bytes."""
    return ByteCodec() if tokenizer is None else TokenizerCodec(tokenizer)


def read_text(
    model: DecoderLM, pieces: Iterable[bytes], codec: Codec, before: PromptState | None = None
) -> tuple[PromptState, int]:
    """Prefill a text of any length, in chunks.

    Args:
        model: reads the text.
        pieces: the text, as pieces of UTF-8.
        codec: of the model's tokens.
        before: the state after an earlier text; None: the text begins here.

    Returns:
        The prompt state after the text, and the number of its tokens.

    Raises:
        ValueError: the prompt is empty, or has a token that the model does not know.
    """
    device, context, count = model.embed.weight.device, before, 0
    for ids in _chunks(codec.encode(pieces)):
        if int(ids.max()) >= model.config.vocab_size:
            raise ValueError(
                f"the prompt has the token {int(ids.max())}, but the model knows {model.config.vocab_size} "
                "tokens: its tokenizer is not the one that the model was trained with"
            )
        context = prefill(model, ids[None].to(device), context, chunk=CHUNK)
        count += len(ids)
    if context is None:
        raise ValueError("the prompt is empty; give at least one character to go on from")
    return context, count


class Head:
    """Passes on a text in pieces, and keeps its beginning.

    Attributes:
        text: the first ``size`` bytes of the text, without an incomplete character at the end.
        whole: whether that is the whole text.
    """

    def __init__(self, pieces: Iterable[bytes], size: int) -> None:
        self._pieces, self._size, self._kept = pieces, size, b""
        self.whole = True

    @property
    def text(self) -> str:
        return self._kept.decode(errors="ignore")

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            room = self._size - len(self._kept)
            self.whole = self.whole and len(piece) <= room
            self._kept += piece[:room]
            yield piece


def _chunks(tokens: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tokens, ``CHUNK`` at a time, so that the result does not depend on the pieces."""
    buffer, size = [], 0
    for piece in tokens:
        buffer.append(piece)
        size += len(piece)
        if size >= CHUNK:
            ids = torch.cat(buffer)
            full = size - size % CHUNK
            yield from ids[:full].split(CHUNK)
            buffer, size = [ids[full:]], size - full
    if size:
        yield torch.cat(buffer)


def write_text(
    model: DecoderLM,
    context: PromptState,
    codec: Codec,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Generate text from a prompt state; yields it as soon as characters are complete.

    Ids that the codec does not know (of a padded vocabulary) are never sampled.

    Args:
        model: its training mode is restored.
        context: the prompt state, from :func:`read_text` or :func:`load_context`.
        codec: of the model's tokens.
        tokens: number of tokens to generate.
        temperature: 0 is greedy sampling.
        top_k, top_p: sample from the k most likely tokens; from the most likely tokens whose probabilities add up to p.
        seed: of the samples.
    """
    decode = codec.decoder()
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[codec.known_ids[codec.known_ids < model.config.vocab_size]] = True
    drawn = generate(model, context, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, allowed=allowed)
    texts = (decode(int(token)) for token in drawn)
    yield from (text for text in texts if text)
    rest = decode(None)
    if rest:
        yield rest


def stream_text(model: DecoderLM, prompt: str, *, codec: Codec | None = None, **options: Any) -> Iterator[str]:
    """Generate text after a prompt: :func:`read_text`, then :func:`write_text` with ``options``."""
    codec = codec or ByteCodec()
    context, _ = read_text(model, [prompt.encode()], codec)
    return write_text(model, context, codec, **options)


def save_context(file: Path, context: PromptState, model: DecoderLM, tokens: int) -> None:
    """Save the prompt state of a text of ``tokens`` tokens as safetensors with checksums, atomically. Raises OSError."""
    tensors = {f"carry.{n}": t for n, t in enumerate(context.carry.tensors())}
    metadata = {"format": _FORMAT, "tokens": str(tokens), "model": _fingerprint(model)}
    save_tensors(file, {**tensors, "hidden": context.hidden}, metadata)


def load_context(file: Path, model: DecoderLM) -> tuple[PromptState, int]:
    """Load a prompt state that :func:`save_context` has written; returns it and the number of its tokens.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or belongs to another model.
    """
    device = model.embed.weight.device
    try:
        tensors, metadata = load_tensors(file)
    except DamagedFileError as error:
        raise DamagedFileError(f"{file} is damaged or no context: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} is no context that --save-context wrote")
    if metadata.get("model") != _fingerprint(model):
        raise ValueError(f"{file} was read by another model, or by other weights of this one; read the text again")
    empty = model.zero_carry(1, state_dtype=torch.float64)
    expected = {f"carry.{n}": t for n, t in enumerate(empty.tensors())} | {"hidden": model.norm.weight.expand(1, -1)}
    position = f"carry.{len(empty.tensors()) - 1}"  # a scalar for all rows, or [B] after a padded text
    mismatched = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in tensors
        or name not in expected
        or (tensors[name].dim() != expected[name].dim() and (name != position or tensors[name].dim() > 1))
    ]
    if mismatched or not metadata.get("tokens", "").isdecimal():
        raise DamagedFileError(
            f"{file} is damaged: {min(mismatched, default='the number of tokens')} is missing or of another shape; "
            "read the text again"
        )
    carry = empty.with_tensors(tuple(tensors[f"carry.{n}"].to(device) for n in range(len(tensors) - 1)))
    return PromptState(carry, tensors["hidden"].to(device)), int(metadata["tokens"])


def _fingerprint(model: DecoderLM) -> str:
    return tensors_digest(model.named_parameters())[:16] + json.dumps(model.config.layer_kinds)
