"""Packed text and prompts have the tokens that ``tokenizer.encode`` gives for the whole text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from race_dist.models import DecoderLM, ModelConfig, generate
from race_dist.training.data.corpus import load_corpus
from race_dist.training.data.packed import INDEX, pack, verify_packed
from race_dist.training.data.tokenizer import TextTokenizer
from race_dist.training.sampling import ByteCodec, TokenizerCodec, read_text, stream_text

WORDS = (
    "a",
    "river",
    "bends",
    "around",
    "the",
    "old",
    "Stone",
    "mill",
    "e\u0301t\u00e9",
    "naïve",
    "ﬁne",
    "1234567",
    "日本語",
    "🙂🙃",
    "can't",
    "<eot>",
    "[MASK]",
    "x" * 30,
    "\u00a0",
    "\0",
)
JOINTS = (" ", " ", " ", "  ", "\n", "\r\n", "\n\n\n    ", "\t", "", ".\u2028")


def text_of(size: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        parts += [draw.choice(WORDS), draw.choice(JOINTS)]
    return "".join(parts)[:size]


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([text_of(30_000, seed=9)], trainer)
    return tokenizer


def byte_level(**options: Any) -> Tokenizer:
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(**options),
        decoder=decoders.ByteLevel(),
    )


def gpt_like() -> Tokenizer:
    return byte_level(add_prefix_space=False)


def roberta_like() -> Tokenizer:
    tokenizer = byte_level(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=True)
    return tokenizer


def llama_like() -> Tokenizer:
    """No pre-tokenizer: the whole text is one word. Prepends a space; bytes stand for unknown characters."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    special = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256))]
    lines = [line.replace(" ", "▁") for line in text_of(20_000, seed=9).split("\n")]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=special, limit_alphabet=40, max_token_length=8),
    )
    tree = json.loads(tokenizer.to_str())
    tree["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def t5_like() -> Tokenizer:
    tokenizer = trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"),
    )
    tokenizer.add_special_tokens([AddedToken("<eot>", lstrip=True, rstrip=True)])
    return tokenizer


def bert_like() -> Tokenizer:
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]", "[MASK]", "[CLS]", "[SEP]"]),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def split_by_regex() -> Tokenizer:
    pattern = r"""(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    from tokenizers import Regex

    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Sequence(parts),
    )


KINDS = (gpt_like, roberta_like, llama_like, t5_like, bert_like, split_by_regex)


def saved(tokenizer: Tokenizer, folder: Path, name: str = "tokenizer.json") -> Path:
    tokenizer.save(str(folder / name))
    return folder / name


def tokens_of(file: Path, text: str) -> list[int]:
    """Of the whole text, by the library. (Read back: a file's scores differ from the trained tokenizer's in the last bit.)"""
    ids: list[int] = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("make", KINDS)
def test_text_in_windows_has_the_tokens_of_the_whole_text(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    file = saved(make(), tmp_path)
    windows = TextTokenizer(file, window=500, overlap=240)
    calls = []
    encode = windows._encode
    windows._encode = lambda text: calls.append(len(text)) or encode(text)  # type: ignore[func-returns-value]
    for seed, size in enumerate((1, 499, 500, 501, 740, 3_000, 12_000, 12_000)):
        text = text_of(size, seed)
        data = text.encode()
        step = 1 + 37 * seed  # pieces that end inside a character
        got = np.concatenate(list(windows.encode(data[n : n + step] for n in range(0, len(data), step))))
        assert got.tolist() == tokens_of(file, text)
    assert max(calls) < 3_000  # and it was not encoded as a whole


@pytest.mark.parametrize("make", [gpt_like, llama_like, t5_like, bert_like])
@pytest.mark.parametrize(
    "text",
    [
        "a" * 3_000,
        " " * 2_999 + "end",
        "\n" * 2_000 + "a river" * 300,
        "ab " + "x" * 2_500 + " the mill",
        "1" * 2_777,
        "\0" * 2_500 + "the",
    ],
    ids=["a", "spaces", "lines", "word", "digits", "nul"],
)
def test_long_text_without_a_place_to_split(tmp_path: Path, make: Callable[[], Tokenizer], text: str) -> None:
    file = saved(make(), tmp_path)
    windows = TextTokenizer(file, window=500, overlap=240)
    got = [n for ids in windows.encode([text.encode()]) for n in ids.tolist()]
    assert got == tokens_of(file, text)


@pytest.mark.parametrize("make", KINDS)
def test_documents_and_prompts_have_the_tokenizers_tokens(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    texts = {
        "a": "no newline at the end\n\n    and a word",
        "b": "ends\r\nin\r\n",
        "c": " begins with a space",
        "d": "",
        "e": "\n\n\n",
        "f": "<eot> and [MASK]<s> inside",
        "g": "\0 NUL",
    }
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_bytes(text.encode())
    plain = saved(tokenizer, tmp_path, "plain.json")
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=16)
    file = saved(tokenizer, tmp_path)
    corpus = pack(str(tmp_path / "texts"), tmp_path / "packed", tokenizer=file)
    wanted = [tokens_of(plain, text) for text in texts.values()]
    assert corpus.documents is not None
    got = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.documents, corpus.documents[1:])]
    assert got == [ids for ids in wanted if ids]
    codec = TokenizerCodec(file)
    for text, ids in zip(texts.values(), wanted):
        data = text.encode()
        pieces = [data[:5], data[5:]]
        assert [n for piece in codec.encode(pieces) for n in piece.tolist()] == ids


@pytest.mark.parametrize("make", KINDS)
def test_tokens_decode_one_by_one_as_all_together(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    codec, draw = TokenizerCodec(saved(make(), tmp_path)), random.Random(0)
    library, known = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), codec.known_ids.tolist()
    for _ in range(100):
        ids = draw.choices(known, k=40)  # many end inside a character
        decode = codec.decoder()
        assert "".join(decode(n) for n in [*ids, None]) == library.decode(ids, skip_special_tokens=False)


def word_level(ids: dict[str, int]) -> str:
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
        }
    )


@pytest.mark.parametrize(("largest", "dtype"), [(9, np.uint16), (65_535, np.uint16), (65_536, np.uint32), (200_000, np.uint32)])
def test_the_packed_dtype_holds_the_largest_id(tmp_path: Path, largest: int, dtype: type) -> None:
    (tmp_path / "tok.json").write_text(word_level({"<unk>": 0, "a": 1, "b": 2, "<eot>": largest}))
    (tmp_path / "text").write_text("a b <eot> a")
    corpus = pack(str(tmp_path / "text"), tmp_path / "packed", tokenizer=tmp_path / "tok.json")
    assert corpus.tokens.tolist() == [1, 2, largest, 1]
    assert (corpus.tokens.dtype, corpus.vocab_size) == (dtype, largest + 1)
    assert load_corpus(str(tmp_path / "packed")).vocab_size == largest + 1


def test_tokens_above_the_vocabulary_of_a_corpus_are_found(tmp_path: Path) -> None:
    (tmp_path / "tok.json").write_text(word_level({"<unk>": 0, "a": 1, "b": 9}))
    (tmp_path / "text").write_text("a b a")
    pack(str(tmp_path / "text"), tmp_path / "packed", tokenizer=tmp_path / "tok.json")
    verify_packed(tmp_path / "packed")
    index = tmp_path / "packed" / INDEX
    tree = {key: value for key, value in json.loads(index.read_text()).items() if key != "digest"} | {"vocab_size": 3}
    index.write_text(json.dumps(tree))  # as an earlier version counted
    with pytest.raises(ValueError, match=r"tokens.bin has the token 9, but .* says that tokens are below 3"):
        verify_packed(tmp_path / "packed")


def test_an_added_token_far_above_the_model_counts(tmp_path: Path) -> None:
    tree = json.loads(word_level({"<unk>": 0, "a": 1}))
    tree["added_tokens"] = [
        {
            "id": 70_000,
            "content": "<x>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    (tmp_path / "tok.json").write_text(json.dumps(tree))
    (tmp_path / "text").write_text("a <x> a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tok.json"))
    corpus = pack(str(tmp_path / "text"), tmp_path / "packed", tokenizer=tmp_path / "tok.json")
    assert corpus.tokens.tolist() == tokenizer.encode("a <x> a", add_special_tokens=False).ids
    assert corpus.vocab_size == max(tokenizer.get_vocab().values()) + 1 > max(corpus.tokens.tolist())


def test_dropout_that_is_stored_in_a_tokenizer_is_off(tmp_path: Path) -> None:
    tokenizer = gpt_like()
    wanted = tokenizer.encode(text_of(2_000), add_special_tokens=False).ids
    tokenizer.model.dropout = 0.5
    codec = TokenizerCodec(saved(tokenizer, tmp_path))
    assert torch.cat(list(codec.encode([text_of(2_000).encode()]))).tolist() == wanted


def test_text_that_the_tokenizer_cannot_encode_is_reported(tmp_path: Path) -> None:
    tree = json.loads(word_level({"a": 0}))
    tree["model"]["unk_token"] = "<none>"
    (tmp_path / "tok.json").write_text(json.dumps(tree))
    (tmp_path / "text").write_text("a b")
    with pytest.raises(ValueError, match=r"tok.json cannot encode the text"):
        pack(str(tmp_path / "text"), tmp_path / "packed", tokenizer=tmp_path / "tok.json")


def model_of(vocab_size: int) -> DecoderLM:
    model = DecoderLM(ModelConfig(vocab_size=vocab_size, dim=16, num_layers=1, num_heads=2))
    with torch.no_grad():
        assert model.head is not None
        model.head.weight.mul_(5)
    return model


@pytest.mark.parametrize(
    "choice",
    [{"temperature": 0.0}, {"temperature": 3.0}, {"temperature": 3.0, "top_k": 50}, {"temperature": 3.0, "top_p": 0.9}],
)
def test_ids_of_a_padded_vocabulary_are_never_sampled(choice: dict[str, Any]) -> None:
    model, prompt = model_of(320), torch.tensor([[5, 7], [200, 3]])
    free = torch.stack(list(generate(model, prompt, 60, **choice)))
    if choice["temperature"]:
        assert int(free.max()) > 255  # they would be
    for allowed in (256, torch.arange(320) < 256):
        drawn = torch.stack(list(generate(model, prompt, 60, allowed=allowed, **choice)))
        assert int(drawn.max()) < 256
    only = torch.zeros(320, dtype=torch.bool)
    only[[4, 300]] = True
    assert set(torch.stack(list(generate(model, prompt, 30, allowed=only, **choice))).flatten().tolist()) <= {4, 300}
    text = "".join(stream_text(model, "the", tokens=200, codec=ByteCodec(), **choice))
    assert len(text.encode("utf-8", "replace")) >= 100


@pytest.mark.parametrize(
    "allowed", [0, 321, -1, True, torch.ones(319, dtype=torch.bool), torch.ones(320), torch.zeros(320) > 1, [1]]
)
def test_invalid_allowed_ids_are_refused(allowed: Any) -> None:
    with pytest.raises(ValueError, match="allowed"):
        list(generate(model_of(320), torch.tensor([1]), 1, allowed=allowed))


def test_id_gaps_are_not_sampled_and_unknown_prompt_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tok.json").write_text(word_level({"<unk>": 0, "a": 3, "b": 7, "far": 40}))
    codec = TokenizerCodec(tmp_path / "tok.json")
    assert codec.known_ids.tolist() == [0, 3, 7, 40]
    text = "".join(stream_text(model_of(64), "a b", codec=codec, tokens=80, temperature=5.0))
    assert set(text.split()) <= {"<unk>", "a", "b", "far"}
    assert len(text.split()) == 80
    with pytest.raises(ValueError, match="the prompt has the token 40, but the model knows 16"):
        read_text(model_of(16), [b"a far"], codec)
