"""Invalid values of all options of all verbs, and of all keys of a run's configuration, are refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import typer.main

from race_dist.cli import app
from race_dist.models import ModelConfig
from race_dist.nn import RaceConfig
from race_dist.strict_config import StrictConfig
from race_dist.training.config import TrainConfig, load_config
from tests.inputs.table import Subject, Value, accepted_inputs, check_input, inputs, report

COMMAND = typer.main.get_command(app)
TOML = "[model]\ndim = 16\nnum_layers = 1\nnum_heads = 2\nwindow = 8\n[optim]\nwarmup_steps = 1\n"


def value(text: str) -> Value:
    """The arguments of a command line."""
    return Value(text if len(text) < 60 else f"{text[0]} x {len(text)}", lambda: text)


def values(*texts: str) -> list[Value]:
    return [value(text) for text in texts]


# --- options ---------------------------------------------------------------------------------------------------------------
EMPTY = ("", " ")
HUGE = str(10**25)
NUMBER = (
    *EMPTY,
    "x",
    "true",
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e400",
    "1,2",
    "²",
    "٣",
    "３",
    "1e-400",
    "0x10",
    "1 2",
    "--",
    "NaN",
    "None",
    HUGE + "0" * 40,
)
WHOLE = (*NUMBER, "1.5", "1e3", HUGE, "9" * 5000, "1K")
COUNT = (*NUMBER, "1.5", "1__0", "_1", "1_", HUGE, "1KK", "K", "1.0001K", "4 096 1", "-4K", "9" * 5000)
LOCKED = () if os.geteuid() == 0 else ("locked/x",)  # root may write anywhere
KINDS: dict[str, tuple[str, ...]] = {
    "whole": WHOLE,
    "whole from 1": (*WHOLE, "0", "-0"),
    "number": NUMBER,
    "count": COUNT,
    "count from 1": (*COUNT, "0", "0K"),
    "counts": (*(text for text in COUNT if text != "1,2"), "0", "1,", ",1", "1,,2", "1;2", "1,x", "1,-2", "[1,2]"),
    "device": (
        *EMPTY,
        "foo",
        "-1",
        "1.5",
        "²",
        "meta",
        "1e3",
        "cuda:99",
        "cuda:x",
        "cuda:-1",
        "cuda:",
        "tpu",
        "CPU",
        "cpu:0",
        "0",
        "cuda:" + "9" * 50,
    ),
    "choice": (*EMPTY, "nope", "5", "true", "Device ", "none,fsdp"),
    "text": (*EMPTY, "\udcff"),
    "change": (*EMPTY, "x", "=5", "a b", ".=1"),
    "array": (*EMPTY, "x", "=5", "seed=", "seed=1,,2"),
    "name": EMPTY,
    "input file": (*EMPTY, "nowhere", "folder", "text.txt/x", "y" * 5000, "loop"),
    "output file": (*EMPTY, "folder", "text.txt/x", "y" * 5000, "nowhere/x", "loop/x", "loop", "link", "pipe", *LOCKED),
    "output file in a new folder": (
        *EMPTY,
        "folder",
        "text.txt/x",
        "text.txt/x/y",
        "y" * 5000,
        "loop/x",
        "link",
        "pipe",
        *LOCKED,
    ),
    "output folder": (*EMPTY, "text.txt", "text.txt/x", "y" * 5000, "loop/x", *LOCKED),
    "endpoint": (
        *EMPTY,
        "x",
        "host:x",
        ":1",
        "a b:1",
        "host:",
        "host:0",
        "host:99999",
        "host:-1",
        "1:2:3",
        "host:1.5",
        "host:1 ",
        "-x:1",
        "host;x:1",
        "$(x):1",
    ),
    "host": (*EMPTY, "a b", "-x", "a;b", "$(x)", "a/b"),
    "flag": ("1", "true", "no"),
}
RUN, MODEL = ["nowhere"], ["tiny.toml"]
LAUNCH = {"--override": "change", "--job": "name", "--set": "change", "--dry-run": "flag"}
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "train": (
        MODEL,
        {
            "--override": "change",
            "--nproc": "whole from 1",
            "--engine": "choice",
            "--overwrite": "flag",
            "--resume": "flag",
            "--dry-run": "flag",
        },
    ),
    "generate": (
        RUN,
        {
            "--prompt": "text",
            "--prompt-file": "input file",
            "--tokens": "count",
            "--temperature": "number",
            "--top-k": "whole from 1",
            "--top-p": "number",
            "--seed": "whole",
            "--save-context": "output file",
            "--context": "input file",
            "--step": "whole",
        },
    ),
    "eval": (RUN, {"--data": "name", "--context": "count from 1", "--tokens": "count from 1", "--step": "whole"}),
    "export": (RUN, {"--out": "output file", "--step": "whole"}),
    "report": (RUN, {"--out": "output folder"}),
    "data pack": (
        ["nowhere.txt"],
        {
            "--out": "output folder",
            "--pattern": "text",
            "--tokenizer": "input file",
            "--one-document": "flag",
            "--skip-undecodable": "flag",
        },
    ),
    "bench attention": (
        ["--repeats", "0"],
        {
            "--lengths": "counts",
            "--heads": "whole from 1",
            "--head-dim": "whole from 1",
            "--tables": "whole from 1",
            "--planes": "whole from 1",
            "--non-causal": "flag",
            "--dtype": "choice",
            "--device": "device",
            "--memory": "count from 1",
            "--out": "output file in a new folder",
        },
    ),
    "bench decode": (
        ["--planes", "0"],
        {
            "--heads": "whole from 1",
            "--head-dim": "whole from 1",
            "--tables": "whole from 1",
            "--contexts": "counts",
            "--device": "device",
            "--out": "output file in a new folder",
        },
    ),
    "bench streaming": (
        MODEL,
        {
            "--lengths": "counts",
            "--chunk": "count from 1",
            "--override": "change",
            "--keep": "choice",
            "--compile": "flag",
            "--threads": "whole from 1",
            "--device": "device",
            "--limit-seconds": "number",
            "--store": "output folder",
            "--profile": "flag",
            "--out": "output file in a new folder",
        },
    ),
    "bench quality": (
        [*MODEL, "--out", "x.json"],
        {
            "--override": "change",
            "--jobs": "whole from 1",
            "--threads": "whole from 1",
            "--device": "device",
            "--limit-seconds": "number",
        },
    ),
    "plan": (
        ["missing.toml"],
        {
            "--gpus": "whole from 1",
            "--per-node": "whole",
            "--context": "count from 1",
            "--batch": "whole from 1",
            "--dp": "whole from 1",
            "--sp": "whole from 1",
            "--chunk-size": "count",
            "--sharding": "choice",
            "--keep": "choice",
            "--precision": "choice",
            "--budget": "number",
            "--rates": "input file",
            "--json": "flag",
        },
    ),
    "launch local": (MODEL, {**LAUNCH}),
    "launch torchrun": (MODEL, {**LAUNCH, "--endpoint": "endpoint", "--node-rank": "whole", "--local-address": "host"}),
    "launch deepspeed": (MODEL, {**LAUNCH, "--hostfile": "input file"}),
    "launch slurm": (MODEL, {**LAUNCH, "--array": "array", "--plain": "flag", "--write": "output file"}),
    "launch kubernetes": (MODEL, {**LAUNCH, "--write": "output file"}),
    "launch status": ([], {"--runs": "name"}),
    "launch logs": (["job"], {"--runs": "name", "--lines": "whole from 1"}),
    "launch cancel": (["job"], {"--runs": "name"}),
    "preflight": (
        MODEL,
        {
            "--override": "change",
            "--nproc": "whole from 1",
            "--folder": "output folder",
            "--device": "device",
            "--timeout": "number",
            "--json": "output file in a new folder",
        },
    ),
}
ELSEWHERE = {  # options that stand beside the one under test to keep a benchmark from running, and those another test holds
    ("bench attention", "--repeats"),
    ("bench decode", "--planes"),
    ("plan", "--gpu"),
    ("plan", "--checkpointing"),
    ("plan", "--override"),
    ("bench quality", "--out"),
    ("bench quality", "--variant"),
    ("config", "--markdown"),
}
# Values that a kind has and one option takes: a number of 0 where 0 means something, and the like.
TAKEN = {("bench streaming", "--limit-seconds", "0"), ("bench quality", "--limit-seconds", "0")}


def run_command(verb: str, words: list[str]) -> Callable[..., None]:
    """``race-dist VERB --option=value``: ValueError with its output if the exit code is 2, as the table requires."""

    def run(**options: str) -> None:
        flat = [f"{name}={text}" for name, text in options.items()]
        code, text = invoke([*verb.split(), *flat, *words])  # options are read in the order of the words
        if code == 2:
            raise ValueError(text)
        if code:
            raise RuntimeError(f"exit code {code}: {text}")

    return run


def invoke(arguments: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command run in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        COMMAND.main(arguments, prog_name="race-dist")
    code = end.value.code
    assert isinstance(code, int)
    return code, errors.getvalue().strip()


def command_subjects() -> Iterator[Subject]:
    for verb, (words, options) in COMMANDS.items():
        yield Subject(
            f"race-dist {verb}",
            run_command(verb, words),
            dict,
            {name: [value(text) for text in KINDS[kind] if (verb, name, text) not in TAKEN] for name, kind in options.items()},
        )


def argument_subjects() -> Iterator[Subject]:
    """Files and folders given as positional arguments: the error names the path."""
    for verb, name, words in (
        ("train", "CONFIG", []),
        ("plan", "CONFIG", []),
        ("preflight", "CONFIG", []),
        ("bench streaming", "CONFIG", []),
        ("launch local", "CONFIG", []),
        ("generate", "RUN", ["--prompt", "x"]),
        ("eval", "RUN", []),
        ("export", "RUN", ["--out", "x"]),
        ("report", "RUN", []),
        ("data check", "FOLDER", []),
        ("data pack", "PATH", ["--out", "packed"]),
    ):

        def run(verb: str = verb, words: list[str] = words, **given: str) -> None:
            run_command(verb, [*words, "--", *given.values()])()

        texts = ("", " ", "nowhere", "text.txt/x", "y" * 5000, "loop", "\udcff") + (
            ("text.txt", "utf16.toml", "folder", "-x") if name == "CONFIG" else ("text.txt",) if name != "PATH" else ()
        )
        yield Subject(
            f"race-dist {verb} {name}",
            run,
            dict,
            {name: values(*texts)},
            {name: ("argument", "nowhere", "text", "too long", "loop", "Symlink", "folder", "utf16", "udcff", "-x")},
        )


# --- keys ------------------------------------------------------------------------------------------------------------------
KEY_VALUES: dict[object, tuple[str, ...]] = {
    int: ("true", "false", "'3'", "''", "x", "[1]", "{a=1}", "nan", "inf", "-1", "1.5", HUGE, "9" * 5000, "2024-01-01"),
    float: ("true", "false", "'3'", "''", "x", "[]", "{a=1}", "nan", "inf", "-inf", "-1", "1e300", "9" * 400, "12:00:00"),
    bool: ("1", "0", "'true'", "''", "yes", "[]", "{a=1}", "1.0", "nan"),
    str: ("''", "5", "1.5", "true", "[]", "['x']", "{a=1}", '"a\\u0000b"', "1979-05-27"),
    Literal: ("''", "nope", "5", "true", "[]", "{a=1}", "nan"),
    dict: ("5", "true", "[1]", "nan"),
    "table": ("5", "true", "''", "text", "[1]", "{zz=1}", "nan"),
}
SPECIAL = {"deepspeed": values("5", "true", "[1]", "nan", "''", "nowhere.json")}


def kinds_of(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for each in get_args(annotation) for kind in kinds_of(each)]
    if hasattr(annotation, "__metadata__"):
        return kinds_of(annotation.__origin__)
    return [get_origin(annotation) or annotation]


def keys(model: type[StrictConfig], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """All keys of a configuration: dotted name, field name, type."""
    for name, field in model.model_fields.items():
        kind = next(k for k in kinds_of(field.annotation) if k is not type(None))
        if isinstance(kind, type) and issubclass(kind, StrictConfig):
            yield prefix + name, name, "table"
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, name, kind


def load(path: Path) -> Callable[..., None]:
    def run(**changes: str) -> None:
        load_config(path, [f"{key}={text}" for key, text in changes.items()])

    return run


def key_subjects(path: Path) -> Iterator[Subject]:
    found = {key: SPECIAL.get(key, values(*KEY_VALUES[kind])) for key, _, kind in keys(TrainConfig)}
    yield Subject("load_config", load(path), dict, found, dict.fromkeys(found, ("zz",)))
    tables = [key for key, _, kind in keys(TrainConfig) if kind == "table"]
    unknown = {f"{table}.{word}": values("1") for table in tables for word in ("zz", "Dim", "lrr", "1")} | {
        word: values("1") for word in ("zz", "Model", "step", "-", "seeds")
    }
    yield Subject("load_config of an unknown key", load(path), dict, unknown)


PYTHON_VALUES: dict[object, list[Any]] = {
    int: [True, False, "3", "", b"3", [1], {}, float("nan"), float("inf"), -1, 1.5, 10**30, 10**5000, 1j, object(), int],
    float: [True, False, "3", "", b"3", [], {}, float("nan"), float("inf"), -1.0, 10**400, 1e300, 1j, object()],
    bool: [1, 0, "true", "", [], {}, 1.0, object(), None],
    str: ["", 5, 1.5, True, [], {}, None, b"R", object()],
    Literal: ["", "nope", 5, True, [], {}, b"auto", object()],
    "table": [5, True, "", "text", [1], object(), {"zz": 1}],
}
SECTIONS = [
    field.annotation
    for field in TrainConfig.model_fields.values()
    if isinstance(field.annotation, type) and issubclass(field.annotation, StrictConfig)
]
MADE: dict[type[StrictConfig], dict[str, Any]] = {
    **{kind: {} for kind in SECTIONS},
    RaceConfig: {"dim": 16, "num_heads": 2},
    ModelConfig: {"vocab_size": 9, "dim": 16, "num_layers": 2, "num_heads": 2},
}


def python_subjects() -> Iterator[Subject]:
    for model, base in MADE.items():
        found = {}
        for name, field in model.model_fields.items():
            kind = next(k for k in kinds_of(field.annotation) if k is not type(None))
            kind = "table" if isinstance(kind, type) and issubclass(kind, StrictConfig) else kind
            found[name] = [
                Value(
                    f"{type(one).__name__} {one!r}"[:40]
                    if not isinstance(one, int) or abs(one) < 10**99
                    else f"{one.bit_length()} bits",
                    lambda one=one: one,
                )
                for one in PYTHON_VALUES[kind]  # type: ignore
                if one is not None or model.model_fields[name].default is not None
            ]
        yield Subject(model.__name__, model, lambda base=base: dict(base), found, dict.fromkeys(found, ("zz",)))  # type: ignore


# --- tests -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "tiny.toml").write_text(TOML)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "utf16.toml").write_bytes(TOML.encode("utf-16"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("text.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "locked").mkdir(mode=0o500)
    return tmp_path


COMMAND_SUBJECTS = [*command_subjects(), *argument_subjects()]
CONFIG_SUBJECTS = [*key_subjects(Path("tiny.toml")), *python_subjects()]
SUBJECTS = [*COMMAND_SUBJECTS, *CONFIG_SUBJECTS]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.call)
def test_bad_values_are_refused_by_name(subject: Subject) -> None:
    accepted = accepted_inputs()
    faults = [fault for one in inputs(subject) if (fault := check_input(one, accepted))]
    assert not faults, "\n".join(faults)


def test_there_are_many_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\ncommands and keys: {report(SUBJECTS)}")
    assert sum(len(list(inputs(subject))) for subject in SUBJECTS) > 2000


def test_every_option_of_every_verb_is_in_the_table() -> None:
    def verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for word, inner in getattr(command, "commands", {}).items():
            yield from verbs(inner, f"{name} {word}".strip())
        if not hasattr(command, "commands"):
            yield name, command

    missing = []
    for verb, command in verbs(COMMAND, ""):
        tested = COMMANDS.get(verb, ([], {}))[1]
        for parameter in command.params:
            names = [name for name in parameter.opts if name.startswith("--")]
            if names and "--help" not in names and not any(n in tested or (verb, n) in ELSEWHERE for n in names):
                missing.append(f"race-dist {verb} {names[0]}")
    assert not missing


def test_all_sections_of_a_run_can_be_created_in_python() -> None:
    assert {kind.__name__ for kind in MADE} >= {
        "RaceConfig",
        "ModelConfig",
        "DataConfig",
        "OptimConfig",
        "ParallelConfig",
        "StreamConfig",
        "EvalConfig",
        "CheckpointConfig",
        "GuardConfig",
        "SampleConfig",
    }
