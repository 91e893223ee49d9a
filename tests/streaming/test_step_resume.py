"""A step that is interrupted resumes and has exactly the gradients of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist.distributed.communication import packed_size
from race_dist.models import DecoderLM
from race_dist.streaming import Progress, StepCheckpoint, StepInterrupted, carry_stack, streamed_backward
from tests.streaming.test_streamed_gradients import assert_same, gradients, model, text

LENGTH, CHUNK = 43, 10  # five chunks: 4 forward, 5 backward


def step(net: DecoderLM, **options: Any) -> Tensor:
    return streamed_backward(net, *text(1, LENGTH), chunk_size=CHUNK, **options)


def after(count: int) -> Callable[[], bool]:
    """Stop at the ``count``-th call."""
    asked = iter(range(1, 100))
    return lambda: next(asked) == count


@pytest.mark.parametrize("keep", ["device", "host", "subtract"])
@pytest.mark.parametrize("moment", [1, 3, 4, 5, 8])
def test_goes_on_from_any_chunk(keep: Any, moment: int, tmp_path: Path) -> None:
    race = {"decay": "none" if keep == "subtract" else "token"}
    net = model("RW", **race)
    loss = step(net, keep=keep)
    stopped = model("RW", **race)
    with pytest.raises(StepInterrupted, match=r"interrupted after \d of 5 chunks of the (forward|backward) phase; stored in"):
        step(stopped, keep=keep, checkpoint=StepCheckpoint(tmp_path, stop=after(moment)))
    assert all(p.grad is None for p in stopped.parameters())
    seen: list[Progress] = []
    again = model("RW", **race)  # a new process has new tensors
    assert float(step(again, keep=keep, checkpoint=StepCheckpoint(tmp_path), progress=seen.append)) == float(loss)
    assert_same(gradients(again), gradients(net), 0.0)
    assert len(seen) == 9 - moment


def test_stops_as_often_as_one_likes(tmp_path: Path) -> None:
    net, again = model(), model()
    step(net)
    for _ in range(8):
        with pytest.raises(StepInterrupted):
            step(again, checkpoint=StepCheckpoint(tmp_path, stop=after(1)))
    step(again, checkpoint=StepCheckpoint(tmp_path, stop=after(1)))  # the ninth chunk is the last: nothing is left to stop
    assert_same(gradients(again), gradients(net), 0.0)


def test_gradients_that_stood_before_are_stored_too(tmp_path: Path) -> None:
    net, again = model(), model()
    for each in (net, again):
        step(each)
    step(net)
    with pytest.raises(StepInterrupted):
        step(again, checkpoint=StepCheckpoint(tmp_path, stop=after(6)))
    fresh = model()
    step(fresh, checkpoint=StepCheckpoint(tmp_path))
    assert_same(gradients(fresh), gradients(net), 0.0)


def test_an_ended_step_stays_until_it_is_cleared(tmp_path: Path) -> None:
    """A crash between the gradient and the optimizer's checkpoint must not cost the step."""
    net, again = model(), model()
    checkpoint = StepCheckpoint(tmp_path, every=0)
    step(net, checkpoint=checkpoint)
    seen: list[Progress] = []
    step(again, checkpoint=checkpoint, progress=seen.append)
    assert seen == []
    assert_same(gradients(again), gradients(net), 0.0)
    checkpoint.clear()
    assert not any(tmp_path.iterdir())
    step(model(), checkpoint=checkpoint, progress=seen.append)
    assert len(seen) == 9


def test_another_key_is_another_step(tmp_path: Path) -> None:
    with pytest.raises(StepInterrupted):
        step(model(), checkpoint=StepCheckpoint(tmp_path, key="step 1", stop=after(4)))
    seen: list[Progress] = []
    step(model(), checkpoint=StepCheckpoint(tmp_path, key="step 2"), progress=seen.append)
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("weights", "another set of weights"),
        ("text", "another text"),
        ("chunk", "another chunk size"),
        ("model", "another model and another set of weights"),
    ],
)
def test_what_is_stored_must_be_of_this_step(change: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(StepInterrupted):
        step(model(), checkpoint=StepCheckpoint(tmp_path, stop=after(4)))
    net, (ids, labels), chunk = model(), text(1, LENGTH), CHUNK
    if change == "weights":
        with torch.no_grad():
            net.norm.weight[0] += 1
    elif change == "text":
        ids[0, 0] = (ids[0, 0] + 1) % 17
    elif change == "chunk":
        chunk = 9
    else:
        net = model("W")
    with pytest.raises(ValueError, match=f"holds a step in progress of {words}: make it the same again, or remove"):
        streamed_backward(net, ids, labels, chunk_size=chunk, checkpoint=StepCheckpoint(tmp_path))


def test_files_cut_short_are_not_taken(tmp_path: Path) -> None:
    """The files after a kill during writing: a generation without a record, and a partial file."""
    net = model()
    step(net)
    with pytest.raises(StepInterrupted):
        step(model(), checkpoint=StepCheckpoint(tmp_path, stop=after(6)))
    place = tmp_path / "rank-0"
    (generation,) = json.loads((place / "step.json").read_text())["generations"]
    (place / f"{generation + 1}.safetensors").write_bytes(b"half")
    (place / f"{generation + 1}.partial").write_bytes(b"half")
    again = model()
    step(again, checkpoint=StepCheckpoint(tmp_path))
    assert_same(gradients(again), gradients(net), 0.0)


PROGRAM = """
import sys
import tests.streaming.test_step_resume as t
from race_dist.streaming import StepCheckpoint, StepInterrupted
net = t.model()
try:
    t.step(net, checkpoint=StepCheckpoint(sys.argv[1], every=0),
           progress=lambda p: (print("at", p.phase, p.chunk, flush=True), sys.stdin.readline()))
except StepInterrupted as error:
    print(error, flush=True)
    sys.exit(130)
"""


def test_ctrl_c_stores_the_step_and_says_so(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    for line in process.stdout:
        if line.startswith("at backward 2"):
            break
        process.stdin.write("\n")
        process.stdin.flush()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate("\n" * 20, timeout=60)
    assert process.returncode == 130
    assert "interrupted after 3 of 5 chunks of the backward phase; stored in" in out
    net, again = model(), model()
    step(net)
    step(again, checkpoint=StepCheckpoint(tmp_path))
    assert_same(gradients(again), gradients(net), 0.0)


def test_ctrl_c_without_a_checkpoint_says_that_nothing_is_kept() -> None:
    def press(p: Progress) -> None:
        if p.phase == "backward" and p.chunk == 1:
            signal.raise_signal(signal.SIGINT)

    net = model()
    with pytest.raises(StepInterrupted, match="after 2 of 5 chunks of the backward phase; nothing of this step is kept"):
        step(net, progress=press)
    assert all(p.grad is None for p in net.parameters())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_carries_in_several_slabs(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences allocate their carries slab by slab; stored after every chunk, in both phases."""
    net, again = model(), model()
    step(net)
    size = packed_size(net.zero_carry(1, state_dtype=torch.float64).tensors())
    monkeypatch.setattr(carry_stack, "SLAB_BYTES", rows * size)
    with pytest.raises(StepInterrupted):
        step(model(), checkpoint=StepCheckpoint(tmp_path, every=0, stop=after(6)))
    step(again, checkpoint=StepCheckpoint(tmp_path, every=0))
    assert_same(gradients(again), gradients(net), 0.0)
