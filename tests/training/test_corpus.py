"""Reading a corpus, splitting it, and drawing batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from race_dist.parallel import shard_rows
from race_dist.training.data.batches import Batch, Shard, check_fits, check_shards, evaluation_batches, training_batch
from race_dist.training.data.corpus import BLOCK, Corpus, load_corpus


def corpus_of(size: int) -> Corpus:
    """A corpus whose 3-byte groups encode their position."""
    return Corpus("numbers", np.frombuffer(np.arange(size // 4 + 1, dtype=">u4").tobytes()[:size], dtype=np.uint8))


@pytest.mark.parametrize("size", [BLOCK * 40, BLOCK * 40 + 5, BLOCK * 39 + BLOCK // 2, BLOCK * 20, 10_000, 21, 3])
def test_the_two_splits_are_disjoint_and_complete(size: int) -> None:
    corpus = corpus_of(size)
    blocks = [corpus.tokens[start : start + corpus.block] for start in range(0, size, corpus.block)]
    train = [b for n, b in enumerate(blocks) if n % 10 != 9]
    held_out = [b for n, b in enumerate(blocks) if n % 10 == 9]
    for split, expected in ((corpus.train, train), (corpus.held_out, held_out)):
        expected = np.concatenate(expected) if expected else np.empty(0, np.uint8)
        assert len(split) == len(expected)
        assert np.array_equal(split.read(0, len(split)), expected)
        middle = len(split) // 3
        assert np.array_equal(split.read(middle, len(split) - middle), expected[middle:])


def test_blocks_of_a_large_corpus_are_256_kib() -> None:
    assert corpus_of(BLOCK * 25).block == 256 * 1024


def test_a_batch_depends_on_seed_and_position_alone() -> None:
    split = corpus_of(100_000).train
    first = training_batch(split, seed=3, position=7, batch_size=4, context=100)
    assert [len(first.row(n)) for n in range(4)] == [101] * 4
    assert first.starts == training_batch(split, seed=3, position=7, batch_size=4, context=100).starts
    assert first.starts != training_batch(split, seed=3, position=8, batch_size=4, context=100).starts
    assert first.starts != training_batch(split, seed=4, position=7, batch_size=4, context=100).starts


def test_batches_reach_the_whole_training_text() -> None:
    split = corpus_of(2_000).train
    starts = {
        start
        for s in range(4)
        for start in training_batch(split, seed=0, position=s, batch_size=64, context=len(split) - 5).starts
    }
    assert starts == set(range(5))  # every window that fits, first and last included


def test_evaluation_windows_are_disjoint_and_the_same_every_time() -> None:
    split = corpus_of(400_000).held_out
    batches = list(evaluation_batches(split, tokens=10_000, batch_size=4, context=300))
    assert sum(batch.count for batch in batches) == 10_000 // 300
    assert all(len(batch.starts) == 4 for batch in batches)
    starts = sorted(start for batch in batches for start in batch.starts[: batch.count])
    assert all(b - a >= 300 for a, b in zip(starts, starts[1:]))
    assert batches == list(evaluation_batches(split, tokens=10_000, batch_size=4, context=300))


def test_evaluation_never_reads_past_the_end() -> None:
    split = corpus_of(10_000).held_out
    everything = list(evaluation_batches(split, tokens=10**9, batch_size=3, context=99))
    assert sum(batch.count for batch in everything) == (len(split) - 1) // 99
    assert max(max(batch.starts) for batch in everything) + 100 <= len(split)


def test_the_standard_library_is_large_ordered_and_has_no_duplicates() -> None:
    corpus = load_corpus("python-stdlib")
    assert 8e6 < len(corpus.tokens) < 1e8
    assert corpus.digest() == load_corpus("python-stdlib").digest()
    text = corpus.tokens.tobytes().decode()
    assert "def namedtuple(" in text


def test_a_folder_is_read_in_order_without_duplicates_and_hidden_files(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "second ",
        "a.txt": "first ",
        "sub/c.txt": "third ",
        "sub/d.txt": "first ",
        ".hidden": "no",
        ".git/config": "no",
        "z.py": "code",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_corpus(str(tmp_path)).tokens.tobytes() == b"first second third code"
    assert load_corpus(str(tmp_path), "*.txt").tokens.tobytes() == b"first second third "


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("grüße " * 1000, encoding="utf-8")
    corpus = load_corpus(str(file))
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.tobytes().decode() == "grüße " * 1000


def test_text_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing"):
        load_corpus(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="no text was found"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is empty"):
        load_corpus(str(tmp_path / "empty"))
    (tmp_path / "latin").write_bytes("gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text \(near byte 2\)"):
        load_corpus(str(tmp_path / "latin"))
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text; convert it"):
        load_corpus(str(tmp_path))
    (tmp_path / "cut").write_bytes("grü".encode()[:-1])
    with pytest.raises(ValueError, match="cut is not UTF-8 text"):
        load_corpus(str(tmp_path / "cut"))


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    check_fits(*corpus_of(10_000).split(), 900, "numbers")
    with pytest.raises(ValueError, match=r"the held-out part of numbers has 1000 tokens.*1025; lower data.context"):
        check_fits(*corpus_of(10_000).split(), 1024, "numbers")


# --- documents, and what a rank reads --------------------------------------------------------------------------------------


def documents_of(lengths: list[int]) -> Corpus:
    """Token i of the corpus is i."""
    bounds = np.cumsum([0, *lengths]).astype(np.int64)
    return Corpus("numbers", np.arange(bounds[-1], dtype=np.uint32), bounds, vocab_size=2**32)


def test_every_tenth_document_or_the_tail_is_held_out() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 9, 34)]
    corpus = documents_of(lengths)
    assert corpus.documents is not None
    pieces = [corpus.tokens[a:b] for a, b in zip(corpus.documents, corpus.documents[1:])]
    train, held_out = corpus.split("documents")
    assert np.array_equal(train.read(0, len(train)), np.concatenate([p for n, p in enumerate(pieces) if n % 10 != 9]))
    assert np.array_equal(held_out.read(0, len(held_out)), np.concatenate([p for n, p in enumerate(pieces) if n % 10 == 9]))
    train, held_out = corpus.split("tail")
    size = len(corpus.tokens)
    assert np.array_equal(held_out.read(0, len(held_out)), corpus.tokens[size - size // 10 :])
    assert np.shares_memory(train.view(2, 5), corpus.tokens)
    assert [len(s) for s in documents_of([5, 6, 7]).split("documents")] == [11, 7]  # of few, the last
    for options in ({"held_out": "documents"}, {"separate": True}):
        with pytest.raises(ValueError, match="needs several documents, but numbers is one"):
            documents_of([100]).split(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("held_out", ["blocks", "documents", "tail"])
def test_separate_documents_keep_their_boundaries(held_out: str) -> None:
    corpus = documents_of([int(n) for n in np.random.default_rng(1).integers(1, 9, 100)])
    assert corpus.documents is not None
    begins = set(corpus.documents.tolist())
    for side in corpus.split(held_out, separate=True):  # type: ignore[arg-type]
        tokens = side.read(0, len(side)).tolist()
        assert side.boundaries is not None
        expected = [n for n in range(1, len(tokens)) if tokens[n] in begins or tokens[n] != tokens[n - 1] + 1]
        assert side.boundaries.tolist() == expected


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shards_of_a_batch_add_up_to_the_whole_batch(layout: str, world: int) -> None:
    split = corpus_of(20_000).train
    batch = Batch(split, (0, 17, 1_000, 12_345), 24, 3)
    rows = torch.from_numpy(np.stack([batch.row(n) for n in range(4)]).astype(np.int64))
    labels = rows[:, 1:].clone()
    labels[3] = -100  # fills the batch up
    for rank in range(world):
        at = shard_rows(24, rank, world, layout=layout)  # type: ignore[arg-type]
        part = batch.shard(range(1, 4), Shard(rank, world, layout))
        assert torch.equal(part.inputs, rows[1:4, :-1][:, at])
        assert torch.equal(part.labels, labels[1:4][:, at])
        assert part.cu_seqlens is None
    assert batch.targets == 72


@pytest.mark.parametrize("world", [1, 2, 5])
def test_rows_of_separate_documents_are_one_packed_sequence(world: int) -> None:
    corpus = documents_of([int(n) for n in np.random.default_rng(2).integers(1, 12, 200)])
    split = corpus.split("blocks", separate=True)[0]
    batch = Batch(split, (3, 400, 77), 29, 3)
    assert split.boundaries is not None
    new = set(split.boundaries.tolist())
    inputs, labels, cu = [], [], [0]
    for row, start in enumerate(batch.starts):
        for at in range(start, start + 29):
            if at != start and at in new:
                cu.append(row * 29 + at - start)
            inputs.append(int(split.read(at, 1)[0]))
            labels.append(-100 if at + 1 in new else int(split.read(at + 1, 1)[0]))
        cu.append((row + 1) * 29)
    parts = [batch.shard(range(3), Shard(rank, world)) for rank in range(world)]
    assert torch.cat([p.inputs for p in parts], 1).tolist() == [inputs]
    assert torch.cat([p.labels for p in parts], 1).tolist() == [labels]
    assert all(p.cu_seqlens is not None and p.cu_seqlens.tolist() == cu for p in parts)
    assert batch.targets == sum(label != -100 for label in labels)


def test_shards_that_do_not_fit_are_refused() -> None:
    check_shards(24, 2, Shard(0, 3, "zigzag"), separate=False)
    with pytest.raises(ValueError, match=r"data.context = 25 does not divide into the 2 \* 3 slices"):
        check_shards(25, 2, Shard(0, 3, "zigzag"), separate=False)
    with pytest.raises(ValueError, match="which documents of all lengths do not allow"):
        check_shards(24, 2, Shard(0, 3, "zigzag"), separate=True)


def test_reading_a_whole_file_keeps_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as data:
        data.truncate(2**28)
    program = f"""
import sys
from race_dist.training.data.corpus import Corpus
import numpy as np
from pathlib import Path
def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
tokens = np.memmap({str(file)!r}, dtype=np.uint8, mode="r")
train, _ = Corpus("sparse", tokens).split("tail")
train.read(0, 2**20)
before = resident()
for start in range(0, len(train) - 2**20, 2**20):
    train.read(start, 2**20)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 1024  # KiB, of 256 MiB that were read
