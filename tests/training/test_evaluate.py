"""Using a trained model: saved prompt state, losses by position, export, dry runs, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packed import tokenizer
from typer.testing import CliRunner

from race_dist.cli import app
from race_dist.files import read_checksummed_json, write_checksummed_json
from race_dist.models import DecoderLM, ModelConfig, PromptState, generate, prefill
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.data.corpus import load_corpus, sample_digest
from race_dist.training.data.packed import pack
from race_dist.training.loss_by_position import bucket_edges, loss_by_position
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.sampling import (
    ByteCodec,
    TokenizerCodec,
    load_context,
    read_text,
    save_context,
    stream_text,
    write_text,
)
from race_dist.training.trainer import Trainer
from race_dist.training.weights_file import load_weights, save_weights


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {n} of the text: naïve {n * n}\n" for n in range(800)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 6,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW"},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "eval": {"tokens": 100},
        "sample": {"tokens": 0},
    }
    return parse_config(tree | changes)


def train(folder: Path, name: str = "run") -> Path:
    """A run made by the command, from ``folder / "run.toml"``."""
    config = settings(folder, name=name)
    (folder / "run.toml").write_text(f'''
name = "{name}"
runs = "{folder / "runs"}"
steps = 6
model = {{ dim = 16, num_layers = 2, num_heads = 2, layer_pattern = "RW" }}
data = {{ path = "{config.data.path}", context = 32, batch_size = 2 }}
optim = {{ warmup_steps = 2, lr = 1e-2 }}
eval = {{ tokens = 100 }}
sample = {{ tokens = 0 }}
''')
    code, text = invoke("train", folder / "run.toml")
    assert code == 0, text
    return config.directory


def model_of(pattern: str, **changes: Any) -> DecoderLM:
    return DecoderLM(ModelConfig(vocab_size=256, dim=16, num_layers=2, num_heads=2, layer_pattern=pattern, window=5, **changes))


@pytest.mark.parametrize("pattern", ["R", "RW", "RS"])
def test_saved_prompt_state_continues_as_the_text_itself(tmp_path: Path, pattern: str) -> None:
    model, codec = model_of(pattern), ByteCodec()
    pieces = [b"abc", b"", "näive €".encode() * (200 if "S" in pattern else 4000), b"the end"]
    whole, count = read_text(model, pieces, codec)
    assert count == sum(map(len, pieces))
    text = "".join(write_text(model, whole, codec, tokens=40, seed=3))
    save_context(tmp_path / "kept", whole, model, count)
    kept, known = load_context(tmp_path / "kept", model)
    assert known == count
    assert "".join(write_text(model, kept, codec, tokens=40, seed=3)) == text
    assert all(torch.equal(a, b) for a, b in zip(whole.carry.tensors(), kept.carry.tensors(), strict=True))
    joined = b"".join(pieces)  # however the text comes, it is read alike
    again = read_text(model, [joined[:1234], joined[1234:]], codec)[0]
    assert torch.equal(again.hidden, whole.hidden)
    more, _ = read_text(model, [b" and more"], codec, kept)
    direct = prefill(model, torch.tensor([list(joined + b" and more")]))
    assert torch.allclose(more.hidden, direct.hidden, atol=1e-5)
    if "S" not in pattern:
        short = tmp_path / "short"
        save_context(short, read_text(model, [b"a few words"], codec)[0], model, 11)
        assert abs(short.stat().st_size - (tmp_path / "kept").stat().st_size) < 200  # whatever the length


def test_generation_from_prompt_state_equals_generation_from_its_tokens() -> None:
    model, ids = model_of("RW"), torch.randint(256, (2, 50))
    context = prefill(model, ids, chunk=7)
    assert isinstance(context, PromptState)
    expected = torch.stack(list(generate(model, ids, 9, temperature=0)))
    assert torch.equal(torch.stack(list(generate(model, context, 9, temperature=0))), expected)


def test_prompt_state_of_padded_rows_is_saved(tmp_path: Path) -> None:
    model, ids = model_of("RWS"), torch.randint(256, (2, 9))
    context = prefill(model, ids, key_mask=torch.tensor([[True] * 5 + [False] * 4, [False] * 2 + [True] * 7]))
    save_context(tmp_path / "kept", context, model, 12)
    kept, known = load_context(tmp_path / "kept", model)
    assert known == 12
    assert kept.carry.position.tolist() == [5, 7]
    assert all(torch.equal(a, b) for a, b in zip(context.carry.tensors(), kept.carry.tensors(), strict=True))


def test_prompt_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = model_of("R")
    save_context(tmp_path / "kept", read_text(model, [b"text"], ByteCodec())[0], model, 4)
    with pytest.raises(ValueError, match="was read by another model"):
        load_context(tmp_path / "kept", model_of("R", seed=1))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_context(tmp_path / "none", model)
    whole = (tmp_path / "kept").read_bytes()
    (tmp_path / "kept").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="is damaged or no context"):
        load_context(tmp_path / "kept", model)
    save_weights(tmp_path / "weights", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is no context that --save-context wrote"):
        load_context(tmp_path / "weights", model)


def test_losses_by_position_equal_those_of_the_whole_window(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}; " for n in range(900)))
    split = load_corpus(str(tmp_path / "text.txt")).whole()
    model = model_of("RW").double()
    found = loss_by_position(model, split, context=100, tokens=500, chunk=33)
    sums, windows = torch.zeros(100, dtype=torch.float64), 5
    for n in range(windows):
        ids = torch.from_numpy(split.read(n * ((len(split) - 1) // 100) // windows * 100, 101)).long()
        with torch.no_grad():
            sums += torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    assert bucket_edges(100) == [0, 16, 32, 64, 100]
    for bucket in found["buckets"]:
        assert bucket["loss"] == pytest.approx(float(sums[bucket["start"] : bucket["stop"]].mean()) / windows, rel=1e-9)
        assert bucket["targets"] == windows * (bucket["stop"] - bucket["start"])
    assert found["loss"] == pytest.approx(float(sums.mean()) / windows, rel=1e-9)


def test_documents_stay_separate_in_losses_by_position(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{n:02d}.txt").write_text(f"document {n}: " + "abc " * (5 + 3 * n))
    split = load_corpus(str(tmp_path / "texts")).whole(separate=True)
    model = model_of("RW").double()
    one, other = (loss_by_position(model, split, context=300, tokens=600, chunk=chunk) for chunk in (300, 17))
    assert one["buckets"] == [pytest.approx(b, rel=1e-9) for b in other["buckets"]]
    assert one["tokens"] == 600 - len(split.boundaries_in(1, 601))


def test_the_command_prefills_once_saves_and_continues(tmp_path: Path) -> None:
    run = train(tmp_path)
    (tmp_path / "prompt.txt").write_text("line 7 of the text: naïve\n" * 500, encoding="utf-8")
    kept = tmp_path / "kept.safetensors"
    code, text = invoke("generate", run, "--prompt-file", tmp_path / "prompt.txt", "--save-context", kept, "--tokens", "30")
    assert code == 0, text
    assert f"{kept.stat().st_size:,} bytes for 13,500 tokens" in text
    code, short = invoke("generate", run, "--context", kept, "--tokens", "30")
    assert code == 0
    assert short.strip() in text
    code, more = invoke("generate", run, "--context", kept, "--prompt", "line", "--tokens", "5")
    assert (code, more.startswith("line")) == (0, True)
    code, text = invoke("generate", run, "--prompt", "a", "--prompt-file", tmp_path / "prompt.txt")
    assert (code, "not both" in text) == (2, True)

    code, text = invoke("eval", run, "--context", "64", "--tokens", "500")
    assert code == 0, text
    assert re.search(r"32 to 63 +│ +\d+ │ +\d\.\d+", text)
    assert json.loads((run / "positions-64.json").read_text())["context"] == 64
    code, text = invoke("eval", run, "--data", tmp_path / "prompt.txt", "--context", "1M")
    assert (code, "too few for one window of 1,000,000" in text) == (2, True)


def test_weights_are_exported_and_loaded(tmp_path: Path) -> None:
    run = train(tmp_path)
    code, text = invoke("export", run, "--out", tmp_path / "weights.safetensors", "--step", "6")
    assert code == 0, text
    trained = RunDirectory(run).load_model()
    for init in (str(tmp_path / "weights.safetensors"), str(run)):
        trainer = Trainer(settings(tmp_path, init=init, seed=5), RankMesh(torch.device("cpu")))
        for (name, mine), theirs in zip(trainer.model.named_parameters(), trained.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
    code, text = invoke("export", run, "--out", tmp_path / "other.safetensors", "--step", "5")
    assert (code, "has no checkpoint of step 5" in text) == (2, True)
    with pytest.raises(ValueError, match=r"lacks blocks.2.ffn.down_proj.weight \(\d+ in all\)"):
        load_weights(DecoderLM(trained.config.model_copy(update={"num_layers": 3})), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"is \[256, 16\] there and \[300, 16\] here"):
        load_weights(DecoderLM(trained.config.model_copy(update={"vocab_size": 300})), tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="there are no weights"):
        load_weights(trained, tmp_path / "none")


def test_a_tokenizer_is_used_from_packing_to_the_sample(tmp_path: Path) -> None:
    text = "the cat sat on the mat. " * 400 + "\n" + "grüße\n" * 100
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    pack(str(tmp_path / "plain.txt"), tmp_path / "packed", tokenizer=tokenizer(tmp_path, text))
    config = settings(tmp_path, data={"path": str(tmp_path / "packed"), "context": 16, "batch_size": 2})
    with pytest.raises(ValueError, match=r"model.vocab_size is 256, but the tokens of .* need \d+: make it"):
        Trainer(config, RankMesh(torch.device("cpu")))
    size = load_corpus(str(tmp_path / "packed")).vocab_size
    (tmp_path / "run.toml").write_text(f'''
name = "tokens"
runs = "{tmp_path / "runs"}"
steps = 3
model = {{ dim = 16, num_layers = 1, num_heads = 2, vocab_size = {size} }}
data = {{ path = "{tmp_path / "packed"}", context = 16, batch_size = 2 }}
optim = {{ warmup_steps = 1 }}
eval = {{ tokens = 32 }}
sample = {{ prompt = "the cat", tokens = 5 }}
''')
    code, said = invoke("train", tmp_path / "run.toml")
    assert code == 0, said
    directory = RunDirectory(tmp_path / "runs" / "tokens")
    assert directory.sample.read_text().startswith("the cat")
    codec = directory.codec()
    assert isinstance(codec, TokenizerCodec)
    model = directory.load_model()
    assert (
        "the cat" + "".join(stream_text(model, "the cat", codec=codec, tokens=5, temperature=0.8, seed=0))
        == directory.sample.read_text()
    )
    held_out = [r for r in map(json.loads, directory.metrics.read_text().splitlines()) if r["kind"] == "eval"][-1]
    ratio = load_corpus(str(tmp_path / "packed")).bytes_per_token
    assert held_out["bpb"] == pytest.approx(held_out["loss"] / 0.6931471805599453 / ratio)


def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path) -> None:
    train(tmp_path, name="first")
    before = sorted(tmp_path.rglob("*"))
    code, text = invoke("train", tmp_path / "run.toml", "--dry-run", "--override", "name=other")
    assert code == 0, text
    assert re.search(r"estimated memory per rank: \d+ MiB", text)
    assert re.search(r"one step on made-up text: loss 5\.\d+, gradient norm", text)
    assert "all 6 steps at this pace: " in text
    assert sorted(tmp_path.rglob("*")) == before
    code, text = invoke(
        "train", tmp_path / "run.toml", "--dry-run", "--override", "name=other", "--override", "data.context=100000"
    )
    assert (code, "lower data.context" in text) == (2, True)


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path)
    code, text = invoke(
        "train",
        tmp_path / "run.toml",
        "--override",
        "tensorboard=true",
        "--override",
        "log_every=1",
        "--override",
        "name=board",
    )
    assert code == 0, text
    events = EventAccumulator(str(tmp_path / "runs" / "board" / "tensorboard"))
    events.Reload()
    assert [s.step for s in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    losses = [
        r["loss"]
        for r in map(json.loads, (tmp_path / "runs/board/metrics.jsonl").read_text().splitlines())
        if r["kind"] == "train"
    ]
    assert [s.value for s in events.Scalars("train/loss")] == pytest.approx(losses)


def sparse_corpus(folder: Path, size: int) -> Path:
    """A packed corpus of that many zeros, which take no room on disk."""
    (folder / "small.txt").write_text("\0" * 2**10)
    path = folder / "sparse"
    pack(str(folder / "small.txt"), path)
    with (path / "tokens.bin").open("r+b") as file:
        file.truncate(size)
    np.array([0, size], dtype="<i8").tofile(path / "documents.bin")
    sample = sample_digest(np.memmap(path / "tokens.bin", dtype="<u1", mode="r"))
    index = read_checksummed_json(path / "corpus.json") | {"tokens": size, "text_bytes": size, "sample": sample}
    index["sha256"]["documents.bin"] = hashlib.sha256((path / "documents.bin").read_bytes()).hexdigest()
    write_checksummed_json(path / "corpus.json", index)
    return path


MEMORY = """
import sys
import torch
from race_dist.machine import peak_resident_bytes
from race_dist.training.config import parse_config
from race_dist.training.data.batches import Shard, training_batch
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.trainer import Trainer

config = parse_config({"steps": 100, "optim": {"warmup_steps": 1}, "model": {"dim": 8, "num_layers": 1, "num_heads": 1},
                       "data": {"path": sys.argv[1], "context": 2**12, "batch_size": 16}, "eval": {"tokens": 2**12}})
trainer = Trainer(config, RankMesh(torch.device("cpu")))

def peak():
    for _ in range(2):
        trainer.train_step()
    trainer.evaluate()
    return peak_resident_bytes()

first, read = peak(), 0
for position in range(1500):  # what 1500 steps would read
    part = training_batch(trainer.train, seed=0, position=position, batch_size=16, context=2**12).shard(range(16), Shard())
    read += part.inputs.numel()
print(first, peak(), read)
"""


def test_memory_does_not_grow_with_a_corpus_of_ten_gigabytes(tmp_path: Path) -> None:
    path = sparse_corpus(tmp_path, 10 * 10**9)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    first, last, read = map(int, done.stdout.split())
    print(f"peak {first / 2**20:.0f} MiB after 2 steps, {last / 2**20:.0f} MiB after {read / 1e6:.0f} MB were read of 10 GB")
    assert read > 90e6
    assert last - first < 48 * 2**20  # half of what was read: pages go back after they were used, not at once
