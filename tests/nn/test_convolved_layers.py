"""Convolutions of values and in softmax layers, and gates: against the definition, in pieces and with padding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist.models import DecoderLM, ModelConfig
from race_dist.nn import ConvolvedCarry, FullAttention, RaceConfig, Sequence, SoftmaxConfig, WindowAttention
from race_dist.streaming import streamed_backward

F64 = torch.float64
EXTRAS = {
    "conv": SoftmaxConfig(short_conv=3),
    "conv on v, SiLU gate": SoftmaxConfig(short_conv=4, conv_values=True, output_gate=True),
    "sigmoid gate": SoftmaxConfig(output_gate=True, gate_activation="sigmoid"),
}


def layer(kind: str, extras: SoftmaxConfig) -> WindowAttention | FullAttention:
    if kind == "window":
        return WindowAttention(12, 6, 2, 7, head_dim=4, config=extras, dtype=F64)
    return FullAttention(12, 6, 2, head_dim=4, config=extras, dtype=F64)


def convolved(x: Tensor, conv: torch.nn.Module | None) -> Tensor:
    if conv is None:
        return x
    width = conv.weight.shape[0]
    return x + sum(conv.weight[width - 1 - lag] * F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] for lag in range(width))


@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("extras", EXTRAS)
def test_what_it_computes(kind: str, extras: str) -> None:
    module, total = layer(kind, EXTRAS[extras]), 17
    x = torch.randn(2, total, 12, dtype=F64)
    heads = lambda t: t.unflatten(-1, (-1, 4))
    q, k, v = (
        heads(convolved(proj(x), conv))
        for proj, conv in ((module.q_proj, module.q_conv), (module.k_proj, module.k_conv), (module.v_proj, module.v_conv))
    )
    angle = torch.arange(total, dtype=F64)[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=F64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = lambda t: torch.cat([(z := torch.complex(*t.chunk(2, -1)) * turn).real, z.imag], -1)
    q, k, v = turned(q), turned(k).repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    i, j = torch.arange(total)[:, None], torch.arange(total)
    seen = (j <= i) & (j > i - 7) if kind == "window" else j <= i
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).masked_fill(~seen, float("-inf"))
    y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
    if module.gate_proj is not None:
        logits = module.gate_proj(x)
        y = y * (F.silu(logits) if module.config.gate_activation == "silu" else logits.sigmoid())
    torch.testing.assert_close(module(x)[0], module.o_proj(y))


@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("packed", [False, True])
def test_cut_anywhere(kind: str, extras: str, packed: bool) -> None:
    total, module = 23, layer(kind, EXTRAS[extras])
    x = torch.randn(1 if packed else 2, total, 12, dtype=F64, requires_grad=True)
    cu = [0, 0, 4, 15, 15, 23] if packed else [0, total]
    y, last = module(x, None, Sequence.of(total, cu_seqlens=torch.tensor(cu) if packed else None))
    inputs, gradient = [x, *module.parameters()], torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, gradient)
    carry, parts = module.zero_carry(x.shape[0], dtype=F64), []
    assert isinstance(carry, ConvolvedCarry) == bool(module.config.short_conv)
    for start, stop in itertools.pairwise([0, 1, 4, 4, 12, 15, 23]):
        position, inside = start, None
        if packed:
            position = start - max(c for c in cu if c <= start)
            inside = torch.tensor([0, *(c - start for c in cu[1:-1] if start <= c < stop), stop - start])
        part, carry = module(x[:, start:stop], carry, Sequence.of(stop - start, cu_seqlens=inside, position=position))
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    for a, e in zip(torch.autograd.grad(torch.cat(parts, 1), inputs, gradient), expected, strict=True):
        torch.testing.assert_close(a, e)
    assert len(carry.tensors()) == len(last.tensors())
    again = carry.zero().combine(carry)  # a convolution's tail is as wide as it was
    assert [t.shape for t in again.tensors()] == [t.shape for t in carry.with_tensors(carry.tensors()).tensors()]
    if packed:
        for a, b in itertools.pairwise(cu):
            torch.testing.assert_close(module(x[:, a:b])[0], y[:, a:b])


@pytest.mark.parametrize("pattern", ["R", "W", "S"])
def test_padding_is_absent(pattern: str) -> None:
    """Tokens around holes have the outputs of the row without the holes."""
    module = DecoderLM(config(pattern), dtype=F64)
    ids, mask = torch.randint(0, 19, (1, 14)), torch.ones(1, 14, dtype=torch.bool)
    mask[0, [0, 4, 5, 9, 13]] = False
    torch.testing.assert_close(module(ids, key_mask=mask)[mask][None], module(ids[mask][None]))


def config(pattern: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=19,
        dim=16,
        num_layers=len(pattern),
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=16,
        window=5,
        layer_pattern=pattern,
        softmax=EXTRAS["conv on v, SiLU gate"],
        race=RaceConfig(num_tables=2, num_planes=2, conv_values=True, gate_activation="sigmoid"),
    )


@pytest.mark.parametrize("pattern", ["R", "RW", "W"])
def test_streamed_gradients_are_those_of_the_whole(pattern: str) -> None:
    model = DecoderLM(config(pattern), dtype=F64)
    ids, labels = torch.randint(0, 19, (2, 2, 29)).unbind()
    expected_loss = model(ids, labels)
    expected_loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    loss = streamed_backward(model, ids, labels, chunk_size=8)
    torch.testing.assert_close(loss.to(F64), expected_loss.detach())
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_decoding_goes_on_from_the_carry() -> None:
    model = DecoderLM(config("RWS"), dtype=F64)
    ids = torch.randint(0, 19, (2, 9))
    expected, _ = model.hidden(ids)
    carry, parts = model.zero_carry(2), []
    for token in ids.split(1, 1):
        h, carry = model.hidden(token, carry)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_defaults_have_no_such_parameters() -> None:
    names = {
        name
        for name, _ in DecoderLM(
            ModelConfig(vocab_size=9, dim=16, num_layers=3, num_heads=2, layer_pattern="RWS")
        ).named_parameters()
        if "conv" in name or "mixer.gate" in name
    }
    assert names == {f"blocks.0.mixer.{name}.weight" for name in ("q_conv", "k_conv", "gate_proj")}


@pytest.mark.parametrize("make", [RaceConfig, SoftmaxConfig])
def test_a_convolution_of_values_needs_a_width(make: type[RaceConfig] | type[SoftmaxConfig]) -> None:
    with pytest.raises(ValueError, match=r"conv_values = True needs a convolution, but short_conv is 0"):
        make(short_conv=0, conv_values=True)
    with pytest.raises(ValueError, match="short_conv"):
        make(short_conv=1)
