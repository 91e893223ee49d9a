"""Reading a corpus, holding a part out of it, drawing batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from race_dist.training.corpus import BLOCK, Corpus, load_corpus
from race_dist.training.data import check_fits, evaluation_batches, training_batch


def corpus_of(size: int) -> Corpus:
    """A corpus whose 3-byte groups say where they stand."""
    return Corpus("numbers", np.frombuffer(np.arange(size // 4 + 1, dtype=">u4").tobytes()[:size], dtype=np.uint8))


@pytest.mark.parametrize("size", [BLOCK * 40, BLOCK * 40 + 5, BLOCK * 39 + BLOCK // 2, BLOCK * 20, 10_000, 21, 3])
def test_the_two_sides_share_nothing_and_miss_nothing(size: int) -> None:
    corpus = corpus_of(size)
    blocks = [corpus.tokens[start:start + corpus.block] for start in range(0, size, corpus.block)]
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
    starts = {start for s in range(4)
              for start in training_batch(split, seed=0, position=s, batch_size=64, context=len(split) - 5).starts}
    assert starts == set(range(5))  # every window that fits, first and last included


def test_evaluation_windows_are_disjoint_and_the_same_every_time() -> None:
    split = corpus_of(400_000).held_out
    batches = list(evaluation_batches(split, tokens=10_000, batch_size=4, context=300))
    assert sum(batch.count for batch in batches) == 10_000 // 300
    assert all(len(batch.starts) == 4 for batch in batches)
    starts = sorted(start for batch in batches for start in batch.starts[:batch.count])
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
    for name, text in {"b.txt": "second ", "a.txt": "first ", "sub/c.txt": "third ", "sub/d.txt": "first ",
                       ".hidden": "no", ".git/config": "no", "z.py": "code"}.items():
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
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text; leave it out with data.pattern"):
        load_corpus(str(tmp_path))
    (tmp_path / "cut").write_bytes("grü".encode()[:-1])
    with pytest.raises(ValueError, match="cut is not UTF-8 text"):
        load_corpus(str(tmp_path / "cut"))


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    check_fits(*corpus_of(10_000).split(), 900, "numbers")
    with pytest.raises(ValueError, match=r"the held-out part of numbers has 1000 tokens.*1025; lower data.context"):
        check_fits(*corpus_of(10_000).split(), 1024, "numbers")
