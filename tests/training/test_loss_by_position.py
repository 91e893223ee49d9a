"""Losses by position: one file per text and checkpoint, in the run's tokens; the report names them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import invoke, train
from test_packed import tokenizer

from race_dist.training.data.corpus import load_corpus
from race_dist.training.data.packed import load_tokenizer, pack
from race_dist.training.finalize import choose_prompt
from race_dist.training.logging.plots import RunCurves, draw_positions, read_positions
from race_dist.training.run_directory import RunDirectory
from race_dist.training.sampling import ByteCodec, Head, TokenizerCodec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return train(folder)


@pytest.fixture(scope="module")
def token_run(folder: Path) -> Path:
    """A run on a corpus packed with a tokenizer."""
    text = "the cat sat on the mat. " * 400 + "\n" + "grüße\n" * 100
    (folder / "plain.txt").write_text(text, encoding="utf-8")
    pack(str(folder / "plain.txt"), folder / "packed", tokenizer=tokenizer(folder, text))
    size = load_corpus(str(folder / "packed")).vocab_size
    (folder / "tokens.toml").write_text(f'''
name = "tokens"
runs = "{folder / "runs"}"
steps = 2
model = {{ dim = 16, num_layers = 1, num_heads = 2, vocab_size = {size + 50} }}
data = {{ path = "{folder / "packed"}", context = 16, batch_size = 2 }}
optim = {{ warmup_steps = 1 }}
eval = {{ tokens = 32 }}
checkpoint = {{ every = 1 }}
sample = {{ tokens = 30, temperature = 3.0 }}
''')
    code, said = invoke("train", folder / "tokens.toml")
    assert code == 0, said
    return folder / "runs" / "tokens"


def test_every_text_and_checkpoint_has_its_own_file(folder: Path, run: Path) -> None:
    held_out = (run / "positions-32.json").read_text()
    first, second = folder / "a" / "other.txt", folder / "b" / "other.txt"
    for n, file in enumerate((first, second)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"another text, number {n}, of other words\n" * 80)
        assert invoke("eval", run, "--data", file, "--tokens", "64")[0] == 0
    assert invoke("eval", run, "--step", "6", "--tokens", "64")[0] == 0
    assert (run / "positions-32.json").read_text() == held_out
    found = {p.name: json.loads(p.read_text()) for p in run.glob("positions-*.json")}
    assert {(f["text"], f["held_out"], f["step"]) for f in found.values()} >= {
        (str(first), False, None),
        (str(second), False, None),
        (str(folder / "text.txt"), True, None),
        (str(folder / "text.txt"), True, 6),
    }
    before = len(found)
    assert invoke("eval", run, "--data", first, "--tokens", "128")[0] == 0  # the same text again
    assert len(list(run.glob("positions-*.json"))) == before
    code, said = invoke("report", run)
    assert code == 0, said
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for text in (f"<td>{first}</td>", f"<td>{second}</td>", f"<td>{folder / 'text.txt'} (held out)</td>"):
        assert text in page
    labels = [
        text.get_text()
        for text in draw_positions([RunCurves("run", [], read_positions(RunDirectory(run).positions))])
        .axes[0]
        .get_legend()
        .get_texts()
    ]
    for part in ("held out", "held out, step 6", str(first), str(second)):
        assert any(label.endswith(part) for label in labels), (part, labels)
    assert len(labels) == before


def test_more_evaluations_than_line_styles_are_all_drawn() -> None:
    measured = [{"context": 2**n, "buckets": [{"start": 0, "stop": 2**n, "loss": 1.0}]} for n in range(1, 8)]
    figure = draw_positions([RunCurves("run", [], measured)])
    assert len(figure.axes[0].get_legend().get_texts()) == 7


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_no_held_out_text(run: Path, path: str) -> None:
    code, said = invoke("eval", run, "--data", path)
    assert (code, "--data" in said) == (2, True)
    assert invoke("eval", run, "--context", "0")[0] == 2


def test_an_unusable_text_is_reported_with_the_option(tmp_path: Path, run: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    for path, says in (("nowhere", "there is no file or folder"), ("empty.txt", "is empty"), ("texts", "then --data CORPUS")):
        code, said = invoke("eval", run, "--data", tmp_path / path)
        assert code == 2
        assert "race-dist: --data: " in said
        assert says in said
        assert "data.path" not in said


def test_a_held_out_text_that_has_changed_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("line", "word"))
    code, said = invoke("eval", run)
    assert (code, "is not the one that" in said.replace("\n", " ")) == (2, True)
    assert invoke("eval", run, "--data", text)[0] == 0


def test_another_text_is_encoded_with_the_runs_tokenizer(folder: Path, token_run: Path) -> None:
    text = "a mat, a cat and the grüße of another\r\n" * 20
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text(text, encoding="utf-8")
    (folder / "texts" / "two.txt").write_text(text.upper(), encoding="utf-8")
    assert invoke("eval", token_run, "--data", folder / "texts")[0] == 0
    (file,) = token_run.glob("positions-16-texts-*.json")
    measured = json.loads(file.read_text())
    library = load_tokenizer(token_run / "tokenizer.json")
    count = sum(
        len(library.encode((folder / "texts" / name).read_bytes().decode(), add_special_tokens=False).ids)
        for name in ("one.txt", "two.txt")
    )
    assert measured["bytes_per_token"] == pytest.approx(2 * len(text.encode()) / count)
    pack(str(folder / "texts"), folder / "same", tokenizer=token_run / "tokenizer.json")
    assert invoke("eval", token_run, "--data", folder / "same")[0] == 0
    (other,) = token_run.glob("positions-16-same-*.json")
    assert json.loads(other.read_text())["loss"] == pytest.approx(measured["loss"], rel=1e-6)


def test_tokens_of_another_kind_are_refused(folder: Path, run: Path, token_run: Path) -> None:
    code, said = invoke("eval", run, "--data", folder / "packed")
    assert (code, "was packed with a tokenizer" in said.replace("\n", " ")) == (2, True)
    (folder / "new").mkdir()
    pack(str(folder / "plain.txt"), folder / "foreign", tokenizer=tokenizer(folder / "new", "quite other words " * 50))
    code, said = invoke("eval", token_run, "--data", folder / "foreign")
    assert (code, "with another tokenizer" in said.replace("\n", " ")) == (2, True)


def test_a_missing_tokenizer_is_not_replaced_by_bytes(token_run: Path) -> None:
    file = token_run / "tokenizer.json"
    whole = file.read_bytes()
    for change in (None, whole + b" "):
        file.unlink() if change is None else file.write_bytes(change)
        for words in (("generate", token_run, "--prompt", "a"), ("eval", token_run, "--data", __file__)):
            code, said = invoke(*words)
            assert (code, "tokenizer.json" in said.replace("\n", "")) == (2, True)
    file.write_bytes(whole)
    assert invoke("generate", token_run, "--prompt", "a", "--tokens", "3")[0] == 0


def test_the_sample_of_a_run_begins_with_its_held_out_text(folder: Path, token_run: Path) -> None:
    written = (token_run / "sample.txt").read_text(encoding="utf-8")
    assert written[:15] in (folder / "plain.txt").read_text(encoding="utf-8")
    held_out = load_corpus(str(folder / "text.txt")).held_out
    words = choose_prompt(held_out, ByteCodec())
    assert words.encode() in held_out.read(0, 2048).tobytes()
    assert " " in words
    assert len(words) <= 40
    tokens = load_corpus(str(folder / "packed"))
    assert choose_prompt(tokens.held_out, TokenizerCodec(folder / "packed" / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\x80tail\nfirst line of it\nrest\n", "first line of it"),
        (b"one long line without an end " * 9, "one long line without an end one long line"),
        (b"\n\n\n", "\n\n\n"),
        (b"\xff\xff", " "),
        (b"x\n" + b"word " * 30 + b"\n", "word word word word word word word word"),
    ],
)
def test_a_prompt_is_the_first_line_with_words(text: bytes, words: str) -> None:
    from race_dist.training.data.corpus import Corpus

    whole = Corpus("text", np.frombuffer(text, np.uint8)).whole()
    assert choose_prompt(whole, ByteCodec()) == words[:40]


def test_the_beginning_of_a_prompt_file_is_printed_as_it_is(tmp_path: Path, run: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("naïve\r\nline".encode())
    code, said = invoke("generate", run, "--prompt-file", tmp_path / "prompt.txt", "--tokens", "1")
    assert (code, said.startswith("naïve\nline")) == (0, True)  # the runner makes one line end of two characters
    head = Head([b"abc", "ä".encode(), b"rest"], 4)
    assert b"".join(head) == "abcärest".encode()
    assert (head.text, head.whole) == ("abc", False)


def test_text_is_printed_on_a_terminal_that_lacks_its_characters(folder: Path, token_run: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    for words in (
        ["generate", token_run, "--prompt", "grüße", "--tokens", "30", "--temperature", "3"],
        ["train", folder / "tokens.toml", "--override", "name=ascii"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "race_dist.cli", *map(str, words)], env=env, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.isascii()
    assert not (folder / "runs" / "ascii" / "sample.txt").read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_interrupted_packing_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 600_000)
    words = ["data", "pack", "text.txt", "--out", "packed", "--tokenizer", str(tokenizer(tmp_path, "the cat sat on the mat"))]
    process = subprocess.Popen([sys.executable, "-m", "race_dist.cli", *words], cwd=tmp_path, stderr=subprocess.PIPE)
    for _ in range(600):
        if list(tmp_path.glob(".packed.partial*")) or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert b"Traceback" not in said
    assert not list(tmp_path.glob(".packed*"))
    assert not (tmp_path / "packed").exists()
