"""Files of a run are read as they were written, or an error names the damaged file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packed import tokenizer
from typer.testing import CliRunner

from race_dist.cli import app
from race_dist.files import DamagedFileError
from race_dist.models import DecoderLM
from race_dist.streaming import StepInterrupted
from race_dist.training.checkpoint import CheckpointManager
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.data.batches import training_batch
from race_dist.training.data.corpus import load_corpus
from race_dist.training.data.packed import open_packed, pack, verify_packed
from race_dist.training.logging.report import write_report
from race_dist.training.loop import run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.sampling import load_context, read_text, save_context
from race_dist.training.trainer import Trainer
from race_dist.training.weights_file import load_weights


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 4,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW"},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 1, "lr": 1e-2},
        "eval": {"every": 4, "tokens": 100},
        "checkpoint": {"every": 2},
        "sample": {"tokens": 0},
    }
    return parse_config(tree | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run on tokens of a tokenizer. Tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    config = settings(folder)
    file = tokenizer(folder, Path(config.data.path).read_text(encoding="utf-8"))
    pack(config.data.path, folder / "packed", tokenizer=file)
    config = settings(
        folder,
        data={"path": str(folder / "packed"), "context": 32, "batch_size": 2},
        model={"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW", "vocab_size": 512},
    )
    directory = RunDirectory(config.directory)
    directory.create(config, overwrite=False)
    run(Trainer(config, RankMesh(torch.device("cpu"))), directory)
    return directory


@pytest.fixture
def copy(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


# --- weights, contexts, the files of a run -----------------------------------------------------------------------------------


def test_weights_with_a_flipped_bit_are_named(copy: RunDirectory, tmp_path: Path) -> None:
    draw, size = random.Random(0), copy.weights.stat().st_size
    model = copy.load_model()
    for bit in [draw.randrange(8 * size) for _ in range(30)]:
        flip(copy.weights, bit)
        with pytest.raises(ValueError, match=r"model\.safetensors (is damaged|does not fit)"):
            copy.load_model()
        with pytest.raises(ValueError, match=r"model\.safetensors (is damaged|does not fit)"):  # as init of another run
            load_weights(DecoderLM(model.config), copy.path)
        flip(copy.weights, bit)
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "foreign.safetensors")
    other = DecoderLM(model.config.model_copy(update={"seed": 5}))
    load_weights(other, tmp_path / "foreign.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("step", [None, 2])
def test_a_changed_configuration_does_not_fit_the_weights(step: int | None, copy: RunDirectory) -> None:
    """The planes depend on a seed in it: one changed digit would silently give another model."""
    tree = json.loads(copy.config.read_text())
    tree["model"]["loss_chunk"] = 64  # how it is computed may change
    copy.config.write_text(json.dumps(tree))
    copy.load_model(step=step)
    tree["model"]["race"]["seed"] += 1
    copy.config.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"was trained with another model\.race than the run's config\.json says"):
        copy.load_model(step=step)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "{", "", "\0" * 9, "{}", '{"model": []}', '{"model": 5}'])
def test_an_invalid_configuration_is_reported_in_one_sentence(content: str, copy: RunDirectory) -> None:
    copy.config.write_text(content)
    for words in (
        ["generate", copy.path, "--prompt", "x", "--tokens", "1"],
        ["report", copy.path],
        ["export", copy.path, "--out", copy.path / "o"],
    ):
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 2, (words, result.exception)
        assert "config.json" in result.output


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda f: flip(f, 800), lambda f: f.write_text("{}"), lambda f: shutil.copy(f.with_name("other.json"), f)],
)
def test_a_changed_tokenizer_is_refused(damage: Callable[[Path], Any], copy: RunDirectory) -> None:
    from tokenizers import Tokenizer

    other = Tokenizer.from_file(str(copy.tokenizer))
    other.add_tokens(["new"])
    other.save(str(copy.path / "other.json"))
    copy.codec()
    damage(copy.tokenizer)
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json"):
        copy.codec()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "machine.json",
            '"tokenizer"',
            '"tokenizes"',
            r"machine\.json was changed",
        ),  # the tokenizer would not be checked any more
        ("machine.json", '"text_digest"', '"text_digesu"', r"machine\.json was changed"),
        ("machine.json", '"cores": ', '"cores": 1', r"machine\.json was changed"),
        ("positions-32.json", '"loss": ', '"loss": 1', r"positions-32\.json does not hold losses by position"),
        ("positions-32.json", '"bytes_per_token": ', '"bytes_per_token": 1', r"positions-32\.json does not hold"),
    ],
)
def test_changed_results_are_not_reported(name: str, old: str, new: str, says: str, copy: RunDirectory, tmp_path: Path) -> None:
    """One changed digit would be another result, and one changed letter of a key would skip a check."""
    write_report([copy.path], tmp_path / "out")
    change(copy.path / name, old, new)
    with pytest.raises(ValueError, match=says):
        write_report([copy.path], tmp_path / "out")
    if name == "machine.json":
        with pytest.raises(ValueError, match=says):
            copy.codec()


def test_results_without_checksums_are_read(copy: RunDirectory, tmp_path: Path) -> None:
    for file in (copy.machine, *copy.positions):
        tree = json.loads(file.read_text())
        del tree["digest"]
        file.write_text(json.dumps(tree))
    assert write_report([copy.path], tmp_path / "out").is_file()


def test_damaged_prompt_state_is_named(copy: RunDirectory, tmp_path: Path) -> None:
    model, file = copy.load_model(), tmp_path / "kept"
    context, count = read_text(model, [b"a text"], copy.codec())
    save_context(file, context, model, count)
    assert load_context(file, model)[1] == count
    draw, whole = random.Random(1), file.read_bytes()
    for bit in [draw.randrange(8 * len(whole)) for _ in range(30)]:
        flip(file, bit)
        with pytest.raises(ValueError, match=r"kept is (damaged or )?no context"):
            load_context(file, model)
        file.write_bytes(whole)
    with safe_open(file, "pt") as stored:
        header = json.loads(stored.metadata()["race_dist"])["metadata"]
    tensors = load_file(file)
    for name in (*tensors, None):  # without checksums, as other versions have written them
        kept = {n: t for n, t in tensors.items() if n != name} | ({} if name else {"more": torch.ones(1)})
        save_file(kept, file, header)
        with pytest.raises(ValueError, match=f"kept is damaged: {name or 'more'} is missing"):
            load_context(file, model)
    save_file(tensors, file, {k: v for k, v in header.items() if k != "tokens"})
    with pytest.raises(ValueError, match="kept is damaged: the number of tokens"):
        load_context(file, model)


def test_a_surplus_file_in_a_checkpoint_is_not_read(copy: RunDirectory) -> None:
    wanted = copy.load_model(step=4)
    (newest,) = copy.checkpoints.glob("*-step-00000004")
    part = next(newest.glob("*.safetensors"))
    with safe_open(part, "pt") as stored:
        header = stored.metadata()
    for name in ("zzz.safetensors", "aaa.safetensors", f"copy-of-{part.name}"):
        save_file({n: torch.full_like(t, 7) for n, t in load_file(part).items()}, newest / name, header)
    (newest / "half.safetensors").write_bytes(b"half")
    found = copy.load_model(step=4)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", '{"digest": 1}', "\0" * 9, "[" * 10**5])
def test_an_invalid_manifest_is_skipped(content: str, copy: RunDirectory) -> None:
    (newest,) = copy.checkpoints.glob("*-step-00000004")
    (newest / "manifest.json").write_text(content)
    store = CheckpointManager(copy.checkpoints, None, read_only=True)
    saved = store.latest()
    assert saved is not None
    assert saved.step == 2
    assert "000002-step-00000004 is damaged" in store.problems[0]


# --- packed corpora ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda p: flip(p / "tokenizer.json", 3000), r"tokenizer\.json is not what was packed"),
        (lambda p: edit(p, text_bytes=17), r"corpus\.json was changed"),
        (lambda p: edit(p, vocab_size=300), r"corpus\.json was"),
        (lambda p: edit(p, text_bytes="x"), r"corpus\.json is damaged: text_bytes is a string"),
        (lambda p: edit(p, vocab_size=True), r"vocab_size is true or false"),
        (lambda p: edit(p, sha256=[]), "sha256 is a list"),
        (lambda p: edit(p, tokens=0), "tokens cannot be right"),
        (lambda p: (p / "corpus.json").write_text("[]"), "got list"),
        (lambda p: (p / "corpus.json").write_text("\0" * 99), r"corpus\.json is damaged"),
        (lambda p: (p / "corpus.json").unlink(), r"corpus\.json is missing; pack the text again"),
        (lambda p: ((p / "corpus.json").unlink(), (p / "corpus.json").mkdir()), r"corpus\.json is no file"),
    ],
)
def test_a_changed_corpus_is_named(damage: Callable[[Path], Any], says: str, finished: RunDirectory, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(finished.load_config().data.path, packed)
    verify_packed(packed)
    damage(packed)
    with pytest.raises(ValueError, match=says):
        open_packed(packed)
    with pytest.raises(ValueError, match=says):  # its files are no texts, whatever has become of the index
        load_corpus(str(packed))


def edit(packed: Path, **changes: Any) -> None:
    file = packed / "corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_documents_and_a_surplus_tokenizer(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{n}.txt").write_text(f"document {n}\n" * 20)
    pack(str(tmp_path / "text"), tmp_path / "packed")
    tokenizer(tmp_path, "a document").rename(tmp_path / "packed/tokenizer.json")  # the tokens are bytes: it is none of theirs
    assert open_packed(tmp_path / "packed").tokenizer is None
    flip(tmp_path / "packed/documents.bin", 64 + 1)  # the second document begins two bytes off
    with pytest.raises(ValueError, match=r"documents\.bin is not what was packed"):
        open_packed(tmp_path / "packed")


# --- a streamed step in progress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generations", [1, 2])
def test_training_restarts_a_damaged_step(generations: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, stream={"chunk_size": 8, "minutes": 1e-9})
    trainer, asked = Trainer(config, RankMesh(torch.device("cpu"))), iter(range(1, 99))
    batch = training_batch(trainer.train, seed=0, position=0, batch_size=2, context=32)
    loss = trainer.engine.forward_backward.gradients(batch)
    wanted = [p.grad.clone() for p in trainer.model.parameters()]
    folder = tmp_path / "step"
    trainer.engine.forward_backward.begin(folder, lambda: next(asked) == 5)
    trainer.engine.optimizer.zero_grad()
    with pytest.raises(StepInterrupted):
        trainer.engine.forward_backward.gradients(batch)
    files = sorted(folder.rglob("[0-9]*.safetensors"), key=lambda file: int(file.stem), reverse=True)
    for file in files[:generations]:
        flip(file, 8 * file.stat().st_size - 3)
    capsys.readouterr()
    assert torch.equal(trainer.engine.forward_backward.gradients(batch), loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(trainer.model.parameters(), wanted, strict=True))
    said = capsys.readouterr().out
    assert files[0].name in said
    assert ("beginning the step anew" in said) == (generations == 2)
