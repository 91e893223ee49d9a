"""A run in one process: the files it writes, how they are read back, and when it stops."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.logging.metrics import Metrics, read_metrics
from race_dist.training.loop import run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.sampling import stream_text
from race_dist.training.trainer import Trainer


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of the text: naïve\n" for n in range(800)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 6,
        "log_every": 2,
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "layer_pattern": "RW"},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "eval": {"every": 3, "tokens": 100},
        "sample": {"tokens": 30, "prompt": "line "},
    }
    return parse_config(tree | changes)


def alone(config: TrainConfig) -> Trainer:
    return Trainer(config, RankMesh(torch.device("cpu")))


@pytest.mark.parametrize(("precision", "tied"), [("float32", True), ("bfloat16", False), ("float64", False)])
def test_a_run_writes_its_files_and_reads_them_back(
    tmp_path: Path, precision: str, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, precision=precision, model={"dim": 16, "num_layers": 1, "num_heads": 2, "tie_embeddings": tied})
    directory, trainer = RunDirectory(config.directory), alone(config)
    directory.create(config, overwrite=False)
    last = run(trainer, directory).evaluation

    records = read_metrics(directory.metrics)
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 4, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6]
    assert all(r["bpb"] == pytest.approx(r["loss"] / math.log(2)) and r["grad_norm"] > 0 for r in train)
    assert [r["loss"] for r in records if r["kind"] == "eval"][-1] == last.loss
    assert last.tokens == 96
    assert directory.curves.read_bytes().startswith(b"\x89PNG")
    assert directory.load_config().to_json() == config.to_json()
    assert f"held out: {last.loss / math.log(2):.3f} bits per byte over 96 bytes" in capsys.readouterr().out

    model = directory.load_model()
    assert not model.training
    for (name, mine), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    again = "line " + "".join(stream_text(model, "line ", tokens=30, temperature=0.8, seed=0))
    assert directory.sample.read_text(encoding="utf-8") == again


def test_evaluation_is_the_mean_over_the_windows(tmp_path: Path) -> None:
    trainer = alone(settings(tmp_path, eval={"every": 3, "tokens": 32 * 5}))  # five windows in batches of two
    split = trainer.corpus.held_out
    fit = (len(split) - 1) // 32
    losses = []
    for n in range(5):
        window = torch.from_numpy(split.read(n * fit // 5 * 32, 33)).long()
        with torch.no_grad():
            losses.append(float(trainer.model(window[None, :-1], window[None, 1:])))
    result = trainer.evaluate()
    assert result.tokens == 160
    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert trainer.model.training


def test_clipping_bounds_the_gradient_and_reports_its_norm(tmp_path: Path) -> None:
    trainer = alone(settings(tmp_path, optim={"warmup_steps": 2, "clip": 0.01}))
    norm = trainer.train_step().grad_norm
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert norm > 0.01
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_compiled_blocks_have_the_same_losses(tmp_path: Path) -> None:
    plain, compiled = alone(settings(tmp_path)), alone(settings(tmp_path, compile=True))
    for _ in range(4):
        assert compiled.train_step().loss == pytest.approx(plain.train_step().loss, abs=1e-5)
    assert compiled.evaluate().loss == pytest.approx(plain.evaluate().loss, abs=1e-5)


def test_a_run_can_be_repeated_bit_by_bit(tmp_path: Path) -> None:
    config = settings(tmp_path)
    first, second = alone(config), alone(config)
    steps = [first.train_step() for _ in range(6)]
    assert steps == [second.train_step() for _ in range(6)]
    assert len({step.loss for step in steps}) == 6


def test_metrics_are_written_line_by_line_and_survive_truncation(tmp_path: Path) -> None:
    path, shown = tmp_path / "metrics.jsonl", io.StringIO()
    metrics = Metrics(path, 10, Console(file=shown, width=40))
    record = {"loss": 1.0, "bpb": 1.4427, "lr": 0.1, "grad_norm": 2.0, "tokens_per_second": 12345.0, "seconds": 1.0}
    with metrics:
        metrics.train(1, record)
        assert json.loads(path.read_text()) == {"kind": "train", "step": 1, **record}
        metrics.evaluation(1, {"loss": 1.0, "bpb": 1.4427, "tokens": 5})
    assert shown.getvalue() == "step  1/10  1.443 bits/byte, 12.3k tokens/s\nstep  1/10  held out: 1.443 bits/byte\n"
    path.write_text(path.read_text() + '{"kind": "tra')
    assert len(read_metrics(path)) == 2
    path.write_text("{\n" + path.read_text())
    assert len(read_metrics(path)) == 2


def test_metrics_show_a_bar_on_a_terminal(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Metrics(tmp_path / "m.jsonl", 10, Console(file=shown, force_terminal=True, width=100)) as metrics:
        metrics.train(10, {"loss": 1.0, "bpb": 1.4427, "lr": 0.1, "grad_norm": 2.0, "tokens_per_second": 950.0, "seconds": 1.0})
    assert "10/10" in shown.getvalue()
    assert "1.443 bits/byte, 950 tokens/s" in shown.getvalue()


def test_generated_text_has_complete_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = "é€".encode() + b"\xff" + b"a" + "é".encode()[:1]
    monkeypatch.setattr("race_dist.training.sampling.generate", lambda *_, **__: (torch.tensor([byte]) for byte in written))
    model = alone(settings(tmp_path)).model
    assert list(stream_text(model, "x", tokens=9)) == ["é", "€", "\ufffd", "a", "\ufffd"]
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(stream_text(model, "", tokens=1))
