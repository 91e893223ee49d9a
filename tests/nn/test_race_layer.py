"""The RACE layer against its definition, and invariance to pieces, documents and padding."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from race_dist import race_attention, sample_planes
from race_dist.nn import RaceAttention, RaceCarry, RaceConfig, Sequence
from race_dist.nn.decay import decay_time_constants

F64 = torch.float64
SIZE = {"dim": 16, "num_heads": 4, "num_kv_heads": 2, "num_tables": 2, "num_planes": 3}
VARIANTS = {
    "default": {},
    "paper": {"qk_norm": False, "short_conv": 0, "decay": "none", "normalization": "global", "output_gate": False},
    "released": {
        "qk_norm": False,
        "short_conv": 0,
        "decay": "none",
        "normalization": "bucket",
        "output_gate": False,
        "share_planes": True,
        "train_beta": False,
        "beta_init": 0.4,
        "rope_base": None,
    },
    "multiscale": {"decay": "multiscale", "normalization": "global", "short_conv": 3},
    "trained planes": {"train_planes": True, "num_kv_heads": 4, "beta_init": (1.0, 2.0, 3.0, 4.0)},
    "wide heads": {"head_dim": 10, "num_kv_heads": 1, "rope_base": 500.0},
}


def layer(variant: str, **more: object) -> RaceAttention:
    return RaceAttention(RaceConfig(**(SIZE | VARIANTS[variant] | more)), layer=1, dtype=F64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_and_documents(variant: str, packed: bool) -> None:
    """A sequence split anywhere, also inside documents, gives the same outputs, gradients and final carry."""
    module, total = layer(variant), 21
    batch, cu = (1, [0, 0, 5, 13, 13, total]) if packed else (2, [0, total])
    x = torch.randn(batch, total, 16, dtype=F64, requires_grad=True)
    y, last = module(x, None, Sequence.of(total, cu_seqlens=torch.tensor(cu) if packed else None))
    gradient = torch.randn_like(y)
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(y, inputs, gradient)
    carry: RaceCarry | None = None
    parts = []
    for start, stop in itertools.pairwise([0, 1, 5, 6, 13, total]):
        inside, position = None, start
        if packed:
            inside = torch.tensor([0, *(c - start for c in cu[1:-1] if start <= c < stop), stop - start])
            position = start - max(c for c in cu if c <= start)
        part, carry = module(x[:, start:stop], carry, Sequence.of(stop - start, cu_seqlens=inside, position=position))
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y)
    for a, e in zip(torch.autograd.grad(torch.cat(parts, 1), inputs, gradient), expected, strict=True):
        torch.testing.assert_close(a, e)
    assert carry is not None
    torch.testing.assert_close(carry.sketch.values, last.sketch.values)
    if packed:
        for a, b in itertools.pairwise(cu):
            torch.testing.assert_close(module(x[:, a:b])[0], y[:, a:b])


def test_what_it_computes() -> None:
    """The layer with all options, written out."""
    module = layer("default", rope_base=10000.0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 9, 16, dtype=F64)
    heads = lambda t: t.unflatten(-1, (-1, 4))
    conv = lambda t, w: t + sum(w[3 - lag] * F.pad(t, (0, 0, lag, 0))[:, :9] for lag in range(4))
    q = heads(conv(module.q_proj(x), module.q_conv.weight))
    k = heads(conv(module.k_proj(x), module.k_conv.weight))
    q, k = F.normalize(q, dim=-1) * module.q_scale, F.normalize(k, dim=-1) * module.k_scale
    angle = torch.arange(9, dtype=F64)[:, None] * torch.tensor([1.0, 10000.0**-0.5], dtype=F64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    rotated = lambda t: torch.cat([(z := torch.complex(*t.chunk(2, -1)) * turn).real, z.imag], -1)
    planes = sample_planes(2, 3, 4, num_heads=2, seed=0, layer=1, dtype=F64)
    log_decay = -F.softplus(module.decay_proj(x) + module.decay_bias)
    out = race_attention(
        rotated(q),
        rotated(k),
        heads(module.v_proj(x)),
        planes,
        module.log_beta.exp(),
        normalization="none",
        log_decay=log_decay,
        backend="reference",
    )
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.out_norm.weight
    expected = module.o_proj(out.flatten(2) * F.silu(module.gate_proj(x)))
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-4, atol=1e-5)  # eps stands elsewhere in normalize


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    module = layer(variant)
    module(torch.randn(1, 6, 16, dtype=F64))[0].square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kept", [[*range(4, 11)], [*range(7)], [0, 1, 4, 5, 6, 9, 10]], ids=["left", "right", "inside"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal: bool, kept: list[int]) -> None:
    module = RaceAttention(RaceConfig(**SIZE, causal=causal), dtype=F64)
    x, padded = torch.randn(1, 7, 16, dtype=F64), torch.randn(1, 11, 16, dtype=F64)
    mask = torch.zeros(1, 11, dtype=torch.bool)
    mask[:, kept] = True
    padded[mask] = x[0]
    y, _ = module(padded, None, Sequence.of(11, key_mask=mask))
    torch.testing.assert_close(y[mask], module(x)[0][0])


def test_a_mask_is_given_where_rows_are_counted() -> None:
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gets its key_mask from Sequence\.of"):
        replace(Sequence.of(5), key_mask=mask)
    for wrong in (mask[0], mask[:, :4], mask.int()):
        with pytest.raises(ValueError, match=r"key_mask must be bool \[B, 5\]"):
            Sequence.of(5, key_mask=wrong)


def constants(module: RaceAttention) -> list[Tensor]:
    return [module.planes, module.beta, module.log_decay]


def test_constants_survive_casts_copies_and_meta() -> None:
    config = RaceConfig(**SIZE, decay="multiscale", train_beta=False, beta_init=0.3)
    module = RaceAttention(config, layer=2)
    expected = [t.clone() for t in constants(module)]
    assert not any(k in module.state_dict() for k in ("planes", "beta", "log_decay"))
    meta = RaceAttention(config, layer=2, device="meta")
    assert meta.planes.is_meta
    for other in (module.to(torch.bfloat16), module.half().float(), copy.deepcopy(module), meta.to_empty(device="cpu")):
        assert all(torch.equal(a, b) for a, b in zip(constants(other), expected, strict=True))
    double = module.double()
    assert double.planes.dtype == F64
    assert torch.equal(double.planes.float(), expected[0])
    assert math.isclose(double.beta[0].item(), 0.3, rel_tol=1e-15)


def test_weights_depend_on_seed_and_layer_alone() -> None:
    torch.manual_seed(1)
    a = layer("default")
    torch.manual_seed(2)
    b, c = layer("default"), layer("default", seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(a.planes, b.planes)
    assert not torch.equal(a.planes, c.planes)
    assert not torch.equal(a.q_proj.weight, c.q_proj.weight)


def test_memory_lengths() -> None:
    lengths = decay_time_constants(8)
    assert lengths[:6] == pytest.approx([8.0 * 2 ** (1.4 * h) for h in range(6)])
    assert lengths[6:] == [math.inf, math.inf]
    assert decay_time_constants(1) == pytest.approx([90.5], abs=0.1)  # an only head decays: "multiscale" is never no decay
    module = layer("default", num_kv_heads=4)
    start = F.softplus(module.decay_bias)
    torch.testing.assert_close(1 / start, torch.tensor(decay_time_constants(4, 2.0**14), dtype=F64))


def test_autocast_compile_and_decoding_state() -> None:
    module = RaceAttention(RaceConfig(**SIZE))
    x = torch.randn(1, 40, 16, requires_grad=True)
    expected = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, carry = module(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert carry.sketch.mass.dtype == torch.float32
    assert (y - expected).norm() / expected.norm() < 0.05
    with torch.no_grad():
        zero = module.zero_carry(1, state_dtype=F64)
        _, carry = module(x, zero)
    assert carry.sketch.mass.dtype == F64
    assert [t.shape for t in carry.tensors()] == [t.shape for t in zero.tensors()]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"needs RaceConfig.dim and num_heads"):
        RaceAttention(RaceConfig(dim=8))
    with pytest.raises(ValueError, match=r"takes \[B, T, dim = 16\]; got \[2, 3, 8\]"):
        layer("default")(torch.zeros(2, 3, 8, dtype=F64))
    positioned, x = layer("default", rope_base=10000.0), torch.zeros(1, 2, 16, dtype=F64)
    _, carry = positioned(x)
    with pytest.raises(ValueError, match=r"give sequence=Sequence.of\(T, position=tokens seen so far\)"):
        positioned(x, carry)
    plain = layer("default")
    plain(x, plain(x)[1])
