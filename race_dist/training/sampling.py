"""Text from a trained model: prompts of any length are read once, and what the model remembers of one can be kept."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from race_dist.models import Context, DecoderLM, generate, read
from race_dist.outputs import check_output_file
from race_dist.training.agreement import tensors_digest

CHUNK = 8192  # tokens of a prompt whose activations exist at a time
_FORMAT = "race-dist context 1"


class Codec(Protocol):
    """Text to tokens and back."""

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        """Token ids ``[n]`` int64 of a text that comes in pieces of UTF-8."""
        ...

    def decoder(self) -> Callable[[int | None], str]:
        """Takes token after token and gives what text has become whole; None: gives the rest."""
        ...


class ByteCodec:
    """A token is a byte. Bytes that are no UTF-8 decode to U+FFFD."""

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        return (torch.frombuffer(bytearray(piece), dtype=torch.uint8).long() for piece in pieces if piece)

    def decoder(self) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(b"", final=True) if token is None else decoder.decode(bytes([token]))


class TokenizerCodec:
    """Tokens of a ``tokenizer.json``; long texts are cut behind lines, as packing does."""

    def __init__(self, file: Path) -> None:
        from race_dist.training.packed import load_tokenizer

        self._tokenizer = load_tokenizer(file)

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tensor]:
        from race_dist.training.packed import lines_of

        for text in lines_of(pieces):
            ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
            if ids:
                yield torch.tensor(ids, dtype=torch.int64)

    def decoder(self) -> Callable[[int | None], str]:
        from tokenizers.decoders import DecodeStream  # type: ignore[import-not-found, unused-ignore]

        stream = DecodeStream(skip_special_tokens=False)
        return lambda token: "" if token is None else stream.step(self._tokenizer, token) or ""


def codec_for(tokenizer: Path | None) -> Codec:
    """Of a tokenizer file; None: of bytes."""
    return ByteCodec() if tokenizer is None else TokenizerCodec(tokenizer)


def read_text(model: DecoderLM, pieces: Iterable[bytes], codec: Codec, before: Context | None = None) -> tuple[Context, int]:
    """Go through a text of any length; returns what the model remembers of it, and the number of its tokens.

    Raises:
        ValueError: there is nothing to go on from.
    """
    device, context, count = model.embed.weight.device, before, 0
    for ids in _chunks(codec.encode(pieces)):
        context = read(model, ids[None].to(device), context, chunk=CHUNK)
        count += len(ids)
    if context is None:
        raise ValueError("the prompt is empty; give at least one character to go on from")
    return context, count


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


def write_text(model: DecoderLM, context: Context, codec: Codec, *, tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> Iterator[str]:
    """Yield what the model writes after a context, ``tokens`` tokens of it, as whole characters come.

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
    drawn = generate(model, context, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
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


def save_context(file: Path, context: Context, model: DecoderLM, tokens: int) -> None:
    """Write what a model remembers of a text of ``tokens`` tokens, as safetensors; the file appears when it is complete."""
    tensors = {f"carry.{n}": t.contiguous() for n, t in enumerate(context.carry.tensors())}
    metadata = {"format": _FORMAT, "tokens": str(tokens), "model": _fingerprint(model)}
    check_output_file(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file({**tensors, "hidden": context.hidden.contiguous()}, partial, metadata)
    partial.replace(file)


def load_context(file: Path, model: DecoderLM) -> tuple[Context, int]:
    """The context that :func:`save_context` wrote, and how many tokens were read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another model.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    device = model.embed.weight.device
    try:
        with safe_open(file, "pt", device=str(device)) as stored:
            metadata, tensors = stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no context: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} is no context that --save-context wrote")
    if metadata["model"] != _fingerprint(model):
        raise ValueError(f"{file} was read by another model, or by other weights of this one; read the text again")
    hidden = tensors.pop("hidden")
    empty = model.zero_carry(1, state_dtype=torch.float64)
    carry = empty.with_tensors(tuple(tensors[f"carry.{n}"] for n in range(len(tensors))))
    return Context(carry, hidden), int(metadata["tokens"])


def _fingerprint(model: DecoderLM) -> str:
    return tensors_digest(model.named_parameters())[:16] + json.dumps(model.config.layer_kinds)
