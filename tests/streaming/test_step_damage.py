"""With any damage to the files of a running step, its gradients are right or an error names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from race_dist.models import DecoderLM, ModelConfig
from race_dist.streaming import DamagedStepError, Progress, StepCheckpoint, StepInterrupted, streamed_backward

CHUNKS = 4
FORWARD, BACKWARD = 3, 6  # chunks done (3 forward, then 4 backward) where the step is stopped


def step(
    folder: Path | None, *, stop_at: int | None = None, seen: list[Progress] | None = None, text: Any = None, **options: Any
) -> Tensor:
    """The gradients of one step in one vector; with ``folder`` stored after every chunk, or resumed."""
    torch.manual_seed(0)
    net = DecoderLM(
        ModelConfig(vocab_size=17, dim=8, num_layers=2, num_heads=2, layer_pattern="RW", window=5, ffn_dim=8),
        dtype=torch.float64,
    )
    draw = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 17, (2, 1, 8 * CHUNKS), generator=draw)
    asked = iter(range(1, 100))
    checkpoint = (
        None if folder is None else StepCheckpoint(folder, every=0.0 if stop_at else 1e9, stop=lambda: next(asked) == stop_at)
    )
    streamed_backward(
        net,
        ids if text is None else text(ids),
        labels,
        chunk_size=8,
        checkpoint=checkpoint,
        progress=None if seen is None else seen.append,
        **options,
    )
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def outcome(folder: Path) -> Tensor | str:
    """The gradients of the resumed step, or the message of the error."""
    try:
        return step(folder)
    except DamagedStepError as error:
        return str(error)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The gradients of the step without interruption."""
    return step(None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of a step that was stopped in its forward phase and in its backward phase."""
    folders = {}
    for moment in (FORWARD, BACKWARD):
        folders[moment] = tmp_path_factory.mktemp(f"stored-{moment}")
        with pytest.raises(StepInterrupted):
            step(folders[moment], stop_at=moment)
    return folders


def damages(folder: Path, draw: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every file in ``folder``, damaged in every way: a name, and a function that damages a copy."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    for file in files:
        size = (folder / file).stat().st_size
        for bit in [draw.randrange(8 * size) for _ in range(7)] + [8 * size - 1]:
            yield f"{file}: bit {bit}", lambda copy, file=file, bit=bit: flip(copy / file, bit)
        for length in (0, 1, size // 2, size - 2):
            yield f"{file}: cut to {length}", lambda copy, file=file, length=length: cut(copy / file, length)
        yield f"{file}: removed", lambda copy, file=file: (copy / file).unlink()
        yield f"{file}: zeros", lambda copy, file=file, size=size: cut(copy / file, 0, size)
        yield f"{file}: longer", lambda copy, file=file, size=size: cut(copy / file, size, 7)
        for other in files:
            if other != file:
                yield (
                    f"{file}: {other} in its place",
                    lambda copy, file=file, other=other: shutil.copy(folder / other, copy / file),
                )


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(file: Path, length: int, zeros: int = 0) -> None:
    file.write_bytes(file.read_bytes()[:length] + b"\0" * zeros)


@pytest.mark.parametrize("moment", [FORWARD, BACKWARD])
def test_no_damage_changes_a_gradient_silently(
    moment: int, stored: dict[int, Path], expected: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, folder = random.Random(moment), tmp_path / "step"
    count = recovered = 0
    older = min(int(file.stem) for file in stored[moment].glob("rank-0/[0-9]*.json"))
    unread = f"{older}.safetensors"  # of the generation that is not needed as long as the newer is whole
    for name, damage in damages(stored[moment], draw):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stored[moment], folder)
        damage(folder)
        file = Path(name.partition(":")[0]).name
        count += 1
        found, said = outcome(folder), capsys.readouterr().out
        if isinstance(found, str):
            assert file in found, (name, found)
            continue
        recovered += 1
        assert torch.equal(found, expected), name
        needless = file == unread or name.endswith("step.json: removed")
        assert (file in said and said.count("\n") == 1) or (needless and not said), (name, said)
    assert count > 150
    assert recovered > count // 2, "the older generation is to be used"


def test_a_damaged_generation_costs_what_was_done_since_the_one_before(
    stored: dict[int, Path], expected: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "step"
    shutil.copytree(stored[BACKWARD], folder)
    newest = max(int(file.stem) for file in folder.glob("rank-0/[0-9]*.json"))
    flip(folder / f"rank-0/{newest}.safetensors", 9000)
    seen: list[Progress] = []
    assert torch.equal(step(folder, seen=seen), expected)
    assert len(seen) == 7 - BACKWARD + 1
    seen.clear()
    assert torch.equal(step(folder, seen=seen), expected)  # stored anew, whole
    assert not seen


def test_an_older_generations_file_is_not_taken_for_a_newer(stored: dict[int, Path], expected: Tensor, tmp_path: Path) -> None:
    """Its checksum is that of a file that was valid once."""
    folder = tmp_path / "step"
    shutil.copytree(stored[BACKWARD], folder)
    older, newest = sorted((folder / "rank-0").glob("[0-9]*.safetensors"), key=lambda file: int(file.stem))
    shutil.copy(older, newest)
    assert torch.equal(step(folder), expected)


def test_where_nothing_is_whole_a_sentence_names_the_file(stored: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(stored[FORWARD], folder)
    flip(folder / "rank-0/carries-0.safetensors", 5000)
    with pytest.raises(DamagedStepError, match=r"carries-0.safetensors does not have the checksum .* remove .*rank-0 to begin"):
        step(folder)


@pytest.mark.parametrize("moment", [FORWARD, BACKWARD])
def test_a_full_disk_does_not_end_the_step(
    moment: int, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from race_dist import files

    full, fsync = [False], files.os.fsync

    def fail_when_full(number: int) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", fail_when_full)

    def fill(p: Progress) -> None:
        full[0] = full[0] or (p.phase, p.chunk) == ("forward", 2)

    torch.manual_seed(0)
    with pytest.raises(StepInterrupted, match=r"could not be stored \(.*No space left on device\); the same call resumes from"):
        _filling(tmp_path, fill, moment)
    assert capsys.readouterr().out.count("No space left on device") == 1  # not after every chunk
    assert not list(tmp_path.rglob("*partial*"))
    full[0] = False
    seen: list[Progress] = []
    assert torch.equal(step(tmp_path, seen=seen), expected)
    assert len(seen) == 7 - 2


def _filling(folder: Path, fill: Callable[[Progress], None], stop_at: int) -> None:
    class Filling(list[Progress]):
        def append(self, p: Progress) -> None:
            fill(p)

    step(folder, stop_at=stop_at, seen=Filling())


@pytest.mark.parametrize("chunk_size", [40, 100])
def test_a_step_of_one_chunk_is_made_again_as_often_as_one_likes(chunk_size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        net = DecoderLM(ModelConfig(vocab_size=17, dim=8, num_layers=1, num_heads=2, layer_pattern="R"))
        ids = torch.arange(40)[None] % 17
        found.append(
            (
                float(
                    streamed_backward(
                        net, ids, ids.roll(-1), chunk_size=chunk_size, checkpoint=StepCheckpoint(tmp_path, every=0.0)
                    )
                ),
                net.norm.weight.grad,
            )
        )
    assert found[0][0] == found[1][0] == found[2][0] > 0
    assert all(torch.equal(found[0][1], grad) for _, grad in found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seqlens": torch.tensor([0, 12, 32])}, "another set of documents"),
        ({"num_targets": 7}, "another number of targets"),
        ({"text": lambda ids: ids.roll(1)}, "another text"),
        ({"text": lambda ids: np.flip(ids.numpy(), 1).copy()}, "another text"),
    ],
)
def test_what_is_stored_of_another_call_is_refused(change: dict[str, Any], words: str, stored: dict[int, Path]) -> None:
    with pytest.raises(ValueError, match=f"holds a step in progress of {words}: make it the same again"):
        step(stored[FORWARD], **change)


def test_weights_that_changed_places_are_other_weights() -> None:
    from race_dist.streaming.checkpoint import weights_digest

    net = DecoderLM(ModelConfig(vocab_size=17, dim=8, num_layers=1, num_heads=2))
    before = weights_digest(net)
    with torch.no_grad():
        net.head.weight.copy_(net.head.weight.flip(0))
    assert weights_digest(net) != before
