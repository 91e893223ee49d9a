"""A sequence streamed in chunks has the gradients of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from race_dist import RaceConfig
from race_dist.models import DecoderLM, ModelConfig
from race_dist.streaming import Progress, streamed_backward, streamed_loss

VOCAB = 17


def model(pattern: str = "R", **race: Any) -> DecoderLM:
    options = {"num_tables": 2, "num_planes": 2, "short_conv": 3, "decay": "token", **race}
    config = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, window=9, ffn_dim=24,
                         layer_pattern=pattern, race=RaceConfig(**options))
    return DecoderLM(config).double()


def text(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCAB, (2, batch, length), generator=g)
    return ids, labels.masked_fill(torch.rand(batch, length, generator=g) < 0.2, -100)


def gradients(net: DecoderLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        assert float((got[name] - right).norm()) <= tolerance * max(float(right.norm()), 1e-6), name


@pytest.mark.parametrize("pattern", ["R", "W", "RW"])
@pytest.mark.parametrize(("length", "chunk_size"), [(40, 13), (40, 5), (7, 50), (13, 1)])
def test_gradients_are_those_of_the_whole(pattern: str, length: int, chunk_size: int) -> None:
    net = model(pattern)
    ids, labels = text(2, length)
    wanted_loss = net(ids, labels)
    wanted_loss.backward()
    wanted = gradients(net)
    net.zero_grad()
    loss = streamed_backward(net, ids, labels, chunk_size=chunk_size)
    assert abs(float(loss - wanted_loss.detach())) <= 1e-12
    assert_same(gradients(net), wanted)
    assert abs(float(streamed_loss(net, ids, labels, chunk_size=chunk_size) - wanted_loss.detach())) <= 1e-12


@pytest.mark.parametrize("race", [
    {"decay": "none", "normalization": "global"}, {"decay": "multiscale", "normalization": "bucket"},
    {"decay": "token", "normalization": "global"}, {"short_conv": 0, "decay": "multiscale", "normalization": "none"}])
def test_every_kind_of_carry_hands_its_gradient_back(race: dict[str, Any]) -> None:
    net = model(**race)
    ids, labels = text(1, 45)
    net(ids, labels).backward()
    wanted = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=10, keep="host")
    assert_same(gradients(net), wanted)


@pytest.mark.parametrize("bounds", [[0, 10, 20, 45], [0, 45], [0, 0, 7, 7, 8, 30, 45, 45], [0, 3, 10, 11, 45]])
def test_packed_documents(bounds: list[int]) -> None:
    net = model("RW")
    ids, labels = text(1, 45)
    cu_seqlens = torch.tensor(bounds)
    net(ids, labels, cu_seqlens=cu_seqlens).backward()
    wanted = gradients(net)
    net.zero_grad()
    streamed_backward(net, ids, labels, chunk_size=10, cu_seqlens=cu_seqlens)
    assert_same(gradients(net), wanted)


def test_adds_to_gradients_that_stand_there_and_reads_memory_maps(tmp_path: Any) -> None:
    net = model()
    ids, labels = text(1, 30)
    net(ids, labels).backward()
    wanted = {name: 2 * g for name, g in gradients(net).items()}
    for name, array in (("ids", ids), ("labels", labels)):
        np.save(tmp_path / f"{name}.npy", array.numpy().astype(np.int16))
    maps = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("ids", "labels")]
    streamed_backward(net, maps[0], maps[1], chunk_size=8)
    assert_same(gradients(net), wanted)


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    net = model()
    ids, labels = text(1, 20)
    assert float(streamed_backward(net, ids, torch.full_like(labels, -100), chunk_size=6)) == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_narrow_parameters_add_up_in_float32() -> None:
    """In bfloat16 a thousand small gradients added one by one would stop growing at 256 of them."""
    net = model().to(torch.bfloat16)
    ids, labels = text(1, 600)
    whole = model().to(torch.bfloat16).float()
    whole(ids, labels).backward()
    streamed_backward(net, ids, labels, chunk_size=2)
    got = torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])
    wanted = torch.cat([p.grad.flatten() for p in whole.parameters() if p.grad is not None])
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in net.parameters())
    assert float((got - wanted).norm() / wanted.norm()) <= 0.1


def test_progress_counts_every_chunk_of_both_phases() -> None:
    seen: list[Progress] = []
    ids, labels = text(2, 25)
    streamed_backward(model(), ids, labels, chunk_size=10, progress=seen.append)
    assert [(p.phase, p.chunk) for p in seen] == [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2),
                                                 ("backward", 3)]
    assert seen[-1].tokens == 50
    assert seen[-1].remaining == 0


def test_an_interrupted_step_leaves_gradients_as_they_were() -> None:
    net = model()
    ids, labels = text(1, 30)
    net(ids, labels).backward()
    before = gradients(net)

    def stop(p: Progress) -> None:
        if p.phase == "backward":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed_backward(net, ids, labels, chunk_size=8, progress=stop)
    assert_same(gradients(net), before, 0.0)


@pytest.mark.parametrize(("change", "words"), [
    ({"chunk_size": 0}, "chunk_size must be an integer of at least 1; got 0"),
    ({"labels": torch.zeros(1, 5, dtype=torch.int64)}, "must both be"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "must end at T = 20"), ({"keep": "disk"}, 'keep must be "device" or "host"')])
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    ids, labels = text(1, 20)
    with pytest.raises(ValueError, match=words):
        streamed_backward(model(), **{"input_ids": ids, "labels": labels, "chunk_size": 4, **change})


@pytest.mark.parametrize(("change", "words"), [
    ({"input_ids": torch.rand(1, 20)}, "input_ids must be integers; got torch.float32"),
    ({"labels": [[1]]}, "labels must be a torch.Tensor or a NumPy array; got list"),
    ({"model": torch.nn.Linear(2, 2)}, "model must be a race_dist.models.DecoderLM; got Linear")])
def test_other_types_are_named(change: dict[str, Any], words: str) -> None:
    ids, labels = text(1, 20)
    with pytest.raises(TypeError, match=words):
        streamed_backward(**{"model": model(), "input_ids": ids, "labels": labels, "chunk_size": 4, **change})


def test_full_softmax_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="its carry is every key and value so far"):
        streamed_backward(model("RS"), *text(1, 20), chunk_size=4)
