"""Labels that equal the input raise errors with the correct line of code; correct labels do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from race_dist import RaceConfig
from race_dist.models import DecoderLM, MaskedLM, ModelConfig, SequenceClassifier
from race_dist.models.targets import SHIFTED, check_shifted
from race_dist.streaming import streamed_backward, streamed_loss, streamed_prompt

VOCAB = 64


def model_of(**options: Any) -> DecoderLM:
    return DecoderLM(ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, **options))


def encoder_of() -> MaskedLM:
    return MaskedLM(ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, race=RaceConfig(causal=False)))


def ids_of(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape or (2, 16), generator=torch.Generator().manual_seed(1))


def shifted(input_ids: Tensor) -> Tensor:
    line = SHIFTED.removeprefix("labels = ")
    assert line == "torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)"
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)], 1)


def masked(ids: Tensor) -> Tensor:
    """As in fine-tuning on answers: labels of the prompt are -100."""
    labels = ids.clone()
    labels[:, :5] = -100
    return labels


@pytest.mark.parametrize(
    "again",
    [lambda x: x, lambda x: x.view(x.shape), lambda x: x.detach(), torch.clone, masked, lambda x: x.numpy().copy()],
    ids=["same", "view", "detached", "copy", "masked copy", "array"],
)
def test_labels_that_are_the_input_are_refused_with_the_line_to_write(again: Any) -> None:
    model, ids = model_of(), ids_of()
    labels = again(ids)
    if isinstance(labels, Tensor):
        with pytest.raises(ValueError, match="labels") as raised:
            model(ids, labels)
        assert SHIFTED in str(raised.value)
        with pytest.raises(ValueError, match="labels"):
            model(ids.int(), labels=labels)
    assert all(p.grad is None for p in model.parameters())
    for call in (streamed_backward, streamed_loss):  # which are called for their time alone, too
        with pytest.warns(UserWarning, match="labels") as heard:
            call(model, ids, labels, chunk_size=4)
        assert SHIFTED in str(heard[0].message)
    with pytest.warns(UserWarning, match="labels"):
        streamed_loss(model, ids.numpy().astype(np.uint8), ids.numpy().astype(np.uint8), chunk_size=4)


def test_the_line_makes_labels_whose_loss_is_that_of_the_next_tokens() -> None:
    model, ids = model_of(), ids_of(2, 16)
    labels = shifted(ids)
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    assert torch.allclose(model(ids, labels), expected, atol=1e-6)
    assert torch.allclose(streamed_loss(model, ids, labels, chunk_size=5).float(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(2, 9, dtype=torch.int64), torch.full((1, 1), 3), torch.tensor([[1] * 9, [2] * 9])],
    ids=["zeros", "one", "rows"],
)
def test_a_text_that_repeats_one_token_has_labels_that_equal_it(ids: Tensor) -> None:
    model = model_of()
    assert model(ids, ids.clone()).isfinite()
    assert streamed_loss(model, ids, ids.clone(), chunk_size=4).isfinite()
    assert streamed_loss(model, ids.numpy(), ids.numpy().copy(), chunk_size=4).isfinite()


def test_labels_without_targets_and_targets_of_one_position_are_right() -> None:
    model, ids = model_of(), ids_of()
    assert float(model(ids, torch.full_like(ids, -100)).detach()) == 0
    last = torch.full_like(ids, -100)
    last[:, -1] = ids[:, -1]  # the next token happens to be the same
    assert model(ids, last).isfinite()


def test_the_two_pieces_of_a_zigzag_shard_do_not_follow_each_other() -> None:
    ids = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    check_shifted(ids, ids.clone(), layout="zigzag")  # 1 after the first piece, 2 after the second
    with pytest.raises(ValueError, match="labels"):
        check_shifted(ids, ids.clone())
    with pytest.raises(ValueError, match="labels"):
        check_shifted(ids_of(1, 8), ids_of(1, 8), layout="zigzag")


def test_the_pieces_of_documents_of_a_zigzag_shard_do_not_follow_each_other() -> None:
    documents = torch.tensor([0, 8, 8, 12])  # over two ranks: rows 2 + 2 of the first, 1 + 1 of the last
    ids = torch.tensor([[1, 1, 2, 2, 3, 4]])
    with pytest.raises(ValueError, match="labels"):
        check_shifted(ids, ids.clone(), layout="zigzag", world=2)
    check_shifted(ids, ids.clone(), layout="zigzag", cu_seqlens=documents, world=2)
    with pytest.raises(ValueError, match="labels"):
        check_shifted(ids_of(1, 6), ids_of(1, 6), layout="zigzag", cu_seqlens=documents, world=2)


def test_padding_follows_nothing_and_its_labels_do_not_count() -> None:
    model, ids, mask = model_of(), torch.tensor([[5, 0, 5, 5, 0, 5]]), torch.tensor([[True, False, True, True, False, True]])
    repeated = torch.tensor([[5, -100, 5, 5, -100, -100]])  # the next real token
    assert model(ids, repeated, key_mask=mask).isfinite()
    ids, mask = ids_of(1, 6), torch.tensor([[False, False, True, True, True, True]])
    copied = torch.where(mask, ids, (ids + 1) % VOCAB)
    assert model(ids, copied).isfinite()
    with pytest.raises(ValueError, match="labels"):
        model(ids, copied, key_mask=mask)


def test_labels_of_a_masked_model() -> None:
    model, original = encoder_of(), ids_of()
    hidden = torch.rand(original.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert model(original.masked_fill(hidden, 0), torch.where(hidden, original, -100)).isfinite()
    assert model(original, torch.where(hidden, original, -100)).isfinite()  # the tokens that were left as they are
    with pytest.raises(ValueError, match=r"labels of a MaskedLM are the tokens under the masks"):
        model(original, original)


def test_labels_of_a_classifier_are_classes() -> None:
    config = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, race=RaceConfig(causal=False))
    ids = torch.tensor([[1, 0], [0, 1]])
    assert SequenceClassifier(config, 2)(ids, ids[:, 0]).isfinite()


def test_a_prompt_has_no_labels() -> None:
    assert streamed_prompt(model_of(), ids_of(), chunk_size=4)[0].shape == (2, VOCAB)


def test_the_check_reads_no_numbers_from_a_device() -> None:
    """A stand-in for CUDA: values of meta tensors cannot be read."""
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    check_shifted(ids, torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="labels"):
        check_shifted(ids, ids)


def test_a_compiled_model_refuses_its_input_as_labels() -> None:
    ids = ids_of()
    compiled = torch.compile(model_of(), backend="eager")
    with pytest.raises(Exception, match="labels are input_ids"):
        compiled(ids, ids)
    assert compiled(ids, shifted(ids)).isfinite()
