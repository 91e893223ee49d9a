"""Text from a trained model: prompts of any length are read once, and what the model remembers of one can be kept."""

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

CHUNK = 8192  # tokens of a prompt whose activations exist at a time
_FORMAT = "race-dist context 1"


class Codec(Protocol):
    """Text to tokens and back.

    Attributes:
        known_ids: ``[n]`` int64, the ids that stand for text. A model's vocabulary may be larger.
    """

    known_ids: Tensor

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        """Token ids ``[n]`` int64 of a text that comes in pieces of UTF-8."""
        ...

    def decoder(self) -> Callable[[int | None], str]:
        """Takes token after token and gives what text has become whole; None: gives the rest."""
        ...


class ByteCodec:
    """A token is a byte. Bytes that are no UTF-8 decode to U+FFFD."""

    known_ids = torch.arange(256)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        return (torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces if piece)

    def decoder(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(b"", final=True) if token is None else decoder.decode(bytes([token]))


class TokenizerCodec:
    """Tokens of a ``tokenizer.json``: those that the tokenizer gives for the whole text, without special tokens around it."""

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
            if token is None:  # the bytes of a character that was not finished
                return str(self._tokenizer.decode(waiting, skip_special_tokens=False)) if waiting else ""
            waiting.append(token)
            text = stream.step(self._tokenizer, token) or ""
            if text:
                waiting.clear()
            return text

        return take


def codec_for(tokenizer: Path | None) -> Codec:
    """Of a tokenizer file; None: of bytes."""
    return ByteCodec() if tokenizer is None else TokenizerCodec(tokenizer)


def read_text(
    model: DecoderLM, pieces: Iterable[bytes], codec: Codec, before: PromptState | None = None
) -> tuple[PromptState, int]:
    """Go through a text of any length; returns what the model remembers of it, and the number of its tokens.

    Raises:
        ValueError: there is nothing to go on from, or a token that the model does not know.
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
    """A text in pieces, handed on as they come; its beginning is kept.

    Attributes:
        text: the first ``size`` bytes of what was handed on, as far as they are whole characters.
        whole: whether that is all of it.
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
    """The same tokens, ``CHUNK`` at a time however they came: so a text is always read alike."""
    held, size = [], 0
    for piece in tokens:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK:
            whole = torch.cat(held)
            full = size - size % CHUNK
            yield from whole[:full].split(CHUNK)
            held, size = [whole[full:]], size - full
    if size:
        yield torch.cat(held)


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
    """Yield what the model writes after a context, ``tokens`` tokens of it, as whole characters come.

    Ids that the codec does not know (of a padded vocabulary) are never drawn.

    Args:
        model: it is left in the mode it was in.
        context: from :func:`read_text` or :func:`load_context`.
        codec: of the model's tokens.
        tokens: how many to write.
        temperature: 0 always takes the likeliest token.
        top_k, top_p: draw from the k likeliest tokens, from the likeliest that together reach p.
        seed: of the draws.
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
    """Yield what the model writes after ``prompt``: :func:`read_text`, then :func:`write_text` with ``options``."""
    codec = codec or ByteCodec()
    context, _ = read_text(model, [prompt.encode()], codec)
    return write_text(model, context, codec, **options)


def save_context(file: Path, context: PromptState, model: DecoderLM, tokens: int) -> None:
    """Write what a model remembers of a text of ``tokens`` tokens, as safetensors with checksums; the file appears when it is
    complete. Raises OSError where it cannot be written."""
    tensors = {f"carry.{n}": t for n, t in enumerate(context.carry.tensors())}
    metadata = {"format": _FORMAT, "tokens": str(tokens), "model": _fingerprint(model)}
    save_tensors(file, {**tensors, "hidden": context.hidden}, metadata)


def load_context(file: Path, model: DecoderLM) -> tuple[PromptState, int]:
    """The context that :func:`save_context` wrote, and how many tokens were read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another model.
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
    wanted = {f"carry.{n}": t for n, t in enumerate(empty.tensors())} | {"hidden": model.norm.weight.expand(1, -1)}
    position = f"carry.{len(empty.tensors()) - 1}"  # one for all rows, or [B] behind a padded text
    odd = [
        name
        for name in wanted.keys() | tensors.keys()
        if name not in tensors
        or name not in wanted
        or (tensors[name].dim() != wanted[name].dim() and (name != position or tensors[name].dim() > 1))
    ]
    if odd or not metadata.get("tokens", "").isdecimal():
        raise DamagedFileError(
            f"{file} is damaged: {min(odd, default='the number of tokens')} is missing or of another shape; read the text again"
        )
    carry = empty.with_tensors(tuple(tensors[f"carry.{n}"].to(device) for n in range(len(tensors) - 1)))
    return PromptState(carry, tensors["hidden"].to(device)), int(metadata["tokens"])


def _fingerprint(model: DecoderLM) -> str:
    return tensors_digest(model.named_parameters())[:16] + json.dumps(model.config.layer_kinds)
