"""Write errors never end a run, and damaged metrics are read as far as they are intact."""

from __future__ import annotations

import json
import math
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from race_dist.cli.errors import work
from race_dist.training import finalize
from race_dist.training.checkpoint import CheckpointError, OtherRunError
from race_dist.training.config import TrainConfig, parse_config
from race_dist.training.logging.metrics import Metrics, read_metrics
from race_dist.training.logging.report import write_report
from race_dist.training.logging.writers import JsonlWriter, TensorBoardWriter, WriteErrors
from race_dist.training.loop import Hooks, Outcome, run
from race_dist.training.rank_mesh import RankMesh
from race_dist.training.run_directory import RunDirectory
from race_dist.training.trainer import Trainer


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} of the text: {n * n}\n" for n in range(900)), encoding="utf-8")
    tree: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "steps": 4,
        "log_every": 1,
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2},
        "data": {"path": str(text), "context": 32, "batch_size": 2},
        "optim": {"warmup_steps": 1, "lr": 1e-2},
        "eval": {"every": 2, "tokens": 100},
        "checkpoint": {"every": 2},
        "sample": {"tokens": 4, "prompt": "line "},
    }
    return parse_config(tree | changes)


def go(config: TrainConfig, *, resume: bool = False, **hooks: Any) -> Outcome:
    trainer, directory = Trainer(config, RankMesh(torch.device("cpu"))), RunDirectory(config.directory)
    directory.reopen(config) if resume else directory.create(config, overwrite=False)
    return run(trainer, directory, resume=resume, hooks=Hooks(**hooks))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A file on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- one file --------------------------------------------------------------------------------------------------------------


def test_records_are_kept_while_the_disk_is_full(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    file = JsonlWriter(path, WriteErrors(said.append))
    with largest_file(200):
        for step in range(20):
            file.write({"kind": "event", "step": step, "what": "x" * 20})
    assert len(said) == 1
    assert str(path) in said[0]
    assert "File too large" in said[0]
    assert path.read_text().endswith("}\n"), "no record is written in part"
    assert [r["step"] for r in read_metrics(path)] == list(range(len(read_metrics(path))))
    file.write({"kind": "event", "step": 20, "what": "room again"})
    file.close()
    assert [r["step"] for r in read_metrics(path)] == list(range(21))
    JsonlWriter(tmp_path / "no/folder", WriteErrors(said.append)).write({})
    assert "no/folder could not be written (No such file or directory)" in said[1]


GOOD = [
    {"kind": "train", "step": 1, "loss": 5.0, "bpb": 7.0, "seconds": 2.0},
    {"kind": "eval", "step": 2, "bpb": 6.0},
    {"kind": "event", "step": 3, "what": "skipped", "text": "why"},
    {"kind": "train", "step": 3, "loss": None},
]
DAMAGED = [
    b'{"kind": "tra',
    b"\0" * 300,
    b"[]",
    b"5",
    b"null",
    b'{"kind": "train"}',
    b'{"step": 3}',
    b"\xff\xfe",
    b'{"kind": "train", "step": "x"}',
    b'{"kind": "train", "step": 1.5}',
    b'{"kind": "train", "step": true}',
    b'{"kind": "train", "step": -1}',
    b'{"kind": "train", "step": 1' + b"0" * 40 + b"}",
    b'{"kind": [], "step": 1}',
    b'{"kind": "train", "step": 1, "loss": "x"}',
    b'{"kind": "train", "step": 1, "seconds": [1]}',
    b"[" * 10**5,
    b'{"kind": "event", "step": 1}',
    b'{"kind": "event", "step": 1, "what": 5}',
    b'{"kind": "other", "step": 1}',
    b'{"kind": "event", "step": 1, "what": "a", "text": {}}',
]


def damaged_metrics(path: Path) -> None:
    """Every good record between damaged ones, and a last line that is cut."""
    lines = [json.dumps(r).encode() for r in GOOD]
    size = len(DAMAGED) // len(GOOD)
    parts = [line for n, good in enumerate(lines) for line in (*DAMAGED[n * size : (n + 1) * size], good)]
    path.write_bytes(b"\n".join([*parts, *DAMAGED[len(GOOD) * size :], b'{"kind": "train", "step": 9, "lo']))


def test_damaged_lines_are_skipped_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged_metrics(path)
    assert read_metrics(path) == GOOD
    with Metrics(path, 10, after=2) as metrics:
        assert metrics.seconds_before == 2.0
    assert f"{len(DAMAGED) + 1} damaged lines are left out" in capsys.readouterr().out
    assert read_metrics(path) == GOOD[:2]
    path.write_text('{"kind": "train", "step": 1, "loss": NaN, "lr": 1e999, "bpb": -Infinity, "grad_norm": 3}\n')
    assert read_metrics(path) == [{"kind": "train", "step": 1, "loss": None, "lr": None, "bpb": None, "grad_norm": 3}]


def test_a_report_is_made_from_damaged_metrics(tmp_path: Path) -> None:
    config = settings(tmp_path)
    directory = RunDirectory(config.directory)
    directory.create(config, overwrite=False)
    damaged_metrics(directory.metrics)
    directory.machine.write_text(json.dumps({"dp": "<img src=x>", "sp": ["<b>"], "parameters": "<i>", "x": {"<u>": 1}}))
    directory.sample.write_bytes(b"\xff <script>")
    page = write_report([directory.path], tmp_path / "out").read_text(encoding="utf-8")
    assert f"{len(DAMAGED) + 1} lines left out" in page
    for markup in ("<img", "<b>", "<i>", "<u>", "<script"):
        assert markup not in page
    assert "dp &lt;img src=x&gt; x sp" in page
    for text in ("5", "[]", "{", "\0", '"x"'):
        directory.machine.write_text(text)
        with pytest.raises(ValueError, match=r"machine\.json"):
            write_report([directory.path], tmp_path / "out")


# --- runs ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_records_but_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, steps=30, eval={"every": 100, "tokens": 100})
    with (
        largest_file(3000),
        pytest.raises(
            CheckpointError,
            match=r"the trained weights were not kept: .*model\.safetensors "
            r"could not be written: .*too large",
        ),
    ):
        go(config)
    said = capsys.readouterr().out
    assert "step 30/30" in said
    assert said.count("metrics.jsonl could not be written (File too large)") == 1
    assert "curves.png could not be written" in said
    assert "checkpoint trouble: the checkpoint of step 30 could not be written" in said
    assert "held out:" in said
    directory = RunDirectory(config.directory)
    assert directory.sample.is_file()  # small enough
    assert directory.positions
    assert not directory.weights.exists()
    assert not list(directory.path.rglob("*partial*"))
    steps = [r["step"] for r in read_metrics(directory.metrics) if r["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_folders_in_place_of_files_lose_those_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, steps=2)
    directory = RunDirectory(config.directory)

    def block() -> bool:
        for path in (directory.curves, directory.sample):
            path.mkdir(exist_ok=True)
        return False

    go(config, stop_requested=block)
    said = capsys.readouterr().out
    for path in (directory.curves, directory.sample):
        assert f"{path} could not be written (it is a folder; give the name of a file): the run goes on" in said
    assert directory.positions
    directory.load_model()


def test_a_failed_last_checkpoint_does_not_lose_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, checkpoint={"every": 4})
    directory = RunDirectory(config.directory)

    def block() -> bool:
        if directory.checkpoints.is_dir():
            directory.checkpoints.rmdir()
            directory.checkpoints.write_text("no folder")
        return False

    assert not go(config, stop_requested=block).stopped
    assert "checkpoint trouble: the checkpoint of step 4 could not be written" in capsys.readouterr().out
    directory.load_model()
    with pytest.raises(CheckpointError, match="the checkpoint of step 6 could not be written"):  # who was asked must know
        go(
            settings(tmp_path, name="asked", steps=9, checkpoint={"every": 100}),
            stop_requested=Blocked(tmp_path / "runs/asked/checkpoints"),
        )


class Blocked:
    """Requests a stop after the sixth step, when nothing can be saved any more."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def __call__(self) -> bool:
        if self.folder.is_dir():
            self.folder.rmdir()
            self.folder.write_text("no folder")
        self.asked += 1
        return self.asked == 6


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a library's own reason\nand its second line")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("draw_loss", "curves.png"),
        ("save_png", "curves.png"),
        ("loss_by_position", "losses by position"),
        ("stream_text", "sample.txt"),
    ],
)
def test_errors_of_a_library_at_the_end_are_reported(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finalize, name, fail)
    config = settings(tmp_path, steps=2)
    assert math.isfinite(go(config).evaluation.loss)
    directory, said = RunDirectory(config.directory), capsys.readouterr().out
    assert f"{says} could not be written (a library's own reason): the run goes on without it" in said
    left = {
        "curves.png": directory.curves.is_file(),
        "sample.txt": directory.sample.is_file(),
        "losses by position": bool(directory.positions),
    }
    assert left == {what: what != says for what in left}
    directory.load_model()


def test_a_full_disk_under_tensorboard_is_reported_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its writer is a thread, which would print a traceback and raise its error in the next call."""
    said: list[str] = []
    hook = threading.excepthook
    with largest_file(400):
        board = TensorBoardWriter(tmp_path / "board", 0, WriteErrors(said.append))
        for step in range(200):
            board.write({"kind": "train", "step": step, "loss": 1.0, "lr": 2.0})
            if step % 50 == 0 and board._writer is not None:
                board._attempt(board._writer.flush)
        board.close()
    assert said == [f"{tmp_path / 'board'} could not be written (File too large): the run goes on without it"]
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_failing_probes_and_tensorboard_are_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from race_dist.training.logging import writers

    class Writer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        add_scalar = add_text = close = fail

    monkeypatch.setattr(writers, "import_summary_writer", lambda: Writer)
    said: list[str] = []
    board = TensorBoardWriter(tmp_path, 0, WriteErrors(said.append))
    for step in (1, 2):
        board.write({"kind": "train", "step": step, "loss": 1.0})
    board.close()
    assert said == [f"{tmp_path} could not be written (a library's own reason): the run goes on without it"]
    go(settings(tmp_path, tensorboard=True, sample={"tokens": 0}), probes=(fail,))
    out = capsys.readouterr().out
    assert out.count("a library's own reason") == 2  # the board's, the probe's


@pytest.mark.parametrize(
    "name",
    [
        "in$_$out.txt",
        "$x^{$.txt",
        "_underscored.txt",
        "a [/b] :smile: <c> & d.txt",
        "line\nbreak.txt",
        "caf\udcff.txt",
        "\U0001f600 \u4e2d.txt",
    ],
)
def test_names_are_shown_literally(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from race_dist.training.logging.plots import RunCurves, draw_loss, draw_positions, draw_progress, save_png, shown, to_svg

    records = [{"kind": kind, "step": n, "bpb": 1.0, "lr": 0.1, "grad_norm": 1.0} for n in (1, 2) for kind in ("train", "eval")]
    positions = [{"context": 64, "buckets": [{"start": 0, "stop": 16, "loss": 3.0, "targets": 16}]}]
    for draw in (draw_loss, draw_positions, draw_progress):
        figure = draw([RunCurves(name, records, positions), RunCurves("other", records)], title=name)
        save_png(figure, tmp_path / "x.png")
        assert "<svg" in to_svg(figure)
        assert figure.axes[0].get_title() == shown(name)
        legend = figure.axes[0].get_legend()
        if legend is not None:
            assert legend.get_texts()[0].get_text().startswith(shown(name))
    with Metrics(tmp_path / "m.jsonl", 3) as metrics:
        metrics.say([name])
    assert name.encode("utf-8", "backslashreplace").decode() in capsys.readouterr().out


def test_a_text_with_a_hostile_name_still_gets_plots(tmp_path: Path) -> None:
    config = settings(tmp_path)
    text = tmp_path / "in$_$[/b]<c>.txt"
    text.parent.mkdir()
    shutil.copy(config.data.path, text)
    config = settings(tmp_path, data={"path": str(text), "context": 32, "batch_size": 2}, steps=2)
    go(config)
    directory = RunDirectory(config.directory)
    assert directory.curves.is_file()
    assert directory.sample.is_file()
    moved = directory.path.rename(tmp_path / "runs/$_$ <b>")
    page = write_report([moved], tmp_path / "out").read_text(encoding="utf-8")
    assert "$_$ &lt;b&gt;" in page
    assert "<b>" not in page


def test_the_same_text_at_another_path_resumes(tmp_path: Path) -> None:
    config = settings(tmp_path, sample={"tokens": 0})
    go(config)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(config.data.path, tmp_path / "elsewhere/other name.txt")
    tree = json.loads(config.to_json())
    longer = parse_config(tree | {"steps": 6, "data": tree["data"] | {"path": str(moved)}})
    go(longer, resume=True)
    steps = [r["step"] for r in read_metrics(RunDirectory(longer.directory).metrics) if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    with open(moved, "a", encoding="utf-8") as file:
        file.write("another line\n")
    with pytest.raises(CheckpointError, match=r"is not the one that .* was trained on"):
        go(parse_config(tree | {"steps": 7, "data": tree["data"] | {"path": str(moved)}}), resume=True)


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path)
    go(config)
    directory = RunDirectory(config.directory)
    before = {path.name: path.read_bytes() for path in directory.path.iterdir() if path.is_file()}
    tree = json.loads(config.to_json())
    for change in (
        {"model": tree["model"] | {"num_layers": 2}},
        {"optim": tree["optim"] | {"weight_decay": 0.5}},
        {"data": tree["data"] | {"context": 16}},
    ):
        with pytest.raises(CheckpointError, match="was written with another"):
            go(parse_config(tree | change), resume=True)
    assert {path.name: path.read_bytes() for path in directory.path.iterdir() if path.is_file()} == before
    assert directory.load_model() is not None


def test_moved_document_boundaries_are_another_text(tmp_path: Path) -> None:
    def texts(name: str, sizes: list[int]) -> dict[str, Any]:
        text, start = "".join(f"line {n} of the text: {n * n}\n" for n in range(900)), 0
        (tmp_path / name).mkdir()
        for n, size in enumerate(sizes):
            (tmp_path / name / f"{n}.txt").write_text(text[start : start + size])
            start += size
        return {"path": str(tmp_path / name), "context": 32, "batch_size": 2, "documents": "separate"}

    config = settings(tmp_path, data=texts("one", [5000, 6000, 7000]), sample={"tokens": 0})
    go(config)
    same, other = texts("same", [5000, 6000, 7000]), texts("other", [6000, 5000, 7000])
    go(settings(tmp_path, data=same, sample={"tokens": 0}, steps=5), resume=True)
    with pytest.raises(CheckpointError, match=r"is not the one that .* was trained on"):
        go(settings(tmp_path, data=other, sample={"tokens": 0}, steps=6), resume=True)


def test_a_missing_tensorboard_is_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'race-dist\[tensorboard\]'"):
        Trainer(settings(tmp_path, tensorboard=True), RankMesh(torch.device("cpu")))


@pytest.mark.parametrize(("error", "code"), [(OtherRunError("of another run"), 2), (CheckpointError("the disk is full"), 1)])
def test_a_launcher_restarts_only_recoverable_errors(error: CheckpointError, code: int) -> None:
    with pytest.raises(typer.Exit) as left, work():
        raise error
    assert left.value.exit_code == code
