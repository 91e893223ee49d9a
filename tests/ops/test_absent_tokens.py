"""A masked token is absent from the attention: outputs, states and gradients are those of the rows without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from race_dist import SketchState, race_attention, sample_planes

B, T, HQ, HKV, D, DV, TABLES, PLANES = 3, 37, 4, 2, 5, 3, 2, 2
S = TABLES * 2**PLANES
CU = [0, 6, 6, 14, 29, 37]


@dataclass
class Inputs:
    """Inputs of one call; ``tokens [B, T, ...]``: q, k, v, weight of the output, and log_decay where it is per token."""

    tokens: dict[str, Tensor]
    shared: dict[str, Tensor]
    state: SketchState | None
    weights: list[Tensor]
    options: dict[str, Any]


def inputs(
    decay: str,
    normalization: str,
    *,
    causal: bool = True,
    batch: int = B,
    rows: int | None = None,
    state: bool = True,
    dtype: torch.dtype = torch.float64,
    length: int = T,
) -> Inputs:
    g = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    rows = rows or batch
    tokens = {
        "q": normal(batch, length, HQ, D),
        "k": normal(batch, length, HKV, D),
        "v": normal(batch, length, HKV, DV) + 1,
        "weight": normal(batch, length, HQ, DV),
    }
    shared = {
        "planes": sample_planes(TABLES, PLANES, D, num_heads=HKV, seed=0, dtype=dtype),
        "beta": torch.tensor([1.0, 2.0], dtype=dtype),
    }
    if decay == "token":
        tokens["log_decay"] = -normal(batch, length, HKV).abs()
    options: dict[str, Any] = {"causal": causal, "normalization": normalization}
    if decay == "head":
        options["log_decay"] = torch.tensor([-0.3, -1.5], dtype=dtype)
    initial = SketchState(normal(rows, HKV, S).abs(), normal(rows, HKV, S, DV)) if state else None
    weights = [normal(rows, HKV, S), normal(rows, HKV, S, DV), normal(rows, HKV)]
    return Inputs(tokens, shared, initial, weights, options)


def run(x: Inputs, tokens: dict[str, Tensor], rows: slice, **options: Any) -> dict[str, Tensor]:
    """Outputs, states and gradients by name, of some batch rows (their states are ``rows``)."""
    leaves = {name: t.clone().requires_grad_() for name, t in (tokens | x.shared).items() if name != "weight"}
    initial = None
    if x.state is not None:
        initial = SketchState(*(t[rows].clone().requires_grad_() for t in x.state.tensors()))
        leaves |= {"mass": initial.mass, "values": initial.values}
    given = {name: leaves[name] for name in ("log_decay",) if name in leaves}
    out, final = race_attention(
        *(leaves[n] for n in ("q", "k", "v", "planes", "beta")),
        initial_state=initial,
        output_final_state=True,
        **given,
        **x.options,
        **options,
    )
    loss = (out * tokens["weight"]).sum()
    for t, weight in zip(final.tensors(), x.weights, strict=False):
        loss = loss + (t * weight[rows]).sum()
    loss.backward()
    found = {"out": out.detach()} | {f"final {i}": t.detach() for i, t in enumerate(final.tensors())}
    return found | {f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def check(x: Inputs, mask: Tensor, tolerance: float, **options: Any) -> None:
    """Compare the masked call with one reference call per row without its padding."""
    masked = run(x, x.tokens, slice(None), key_mask=mask, **options)
    shared: dict[str, Tensor] = {}
    for b, real in enumerate(mask):
        row = {name: t[b : b + 1, real] for name, t in x.tokens.items()}
        packed = "cu_seqlens" in options
        before = torch.cat([torch.zeros(1, dtype=torch.int64), real.cumsum(0)])
        cu = {"cu_seqlens": before[options["cu_seqlens"]]} if packed else {}
        states = slice(None) if packed else slice(b, b + 1)
        alone = run(x, row, states, backend="reference", **cu)
        for name, expected in alone.items():
            if name in ("dplanes", "dbeta"):
                shared[name] = shared.get(name, 0) + expected
            elif expected.dim() > 1 and expected.shape[1] == row["q"].shape[1] and name[1:] in (*x.tokens, "ut"):
                close(masked[name][b : b + 1, real], expected, tolerance, name)
                assert not masked[name][b, ~real].any(), name
            else:
                close(masked[name][states], expected, tolerance, name)
    for name, expected in shared.items():
        close(masked[name], expected, tolerance, name)


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


def padding(batch: int = B, length: int = T) -> Tensor:
    """The first row is padded left, the second inside and right, the third is padding alone."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[0] = torch.arange(length) >= length // 3
    mask[1:2, 3 * length // 4 :] = False
    mask[2:] = False
    return mask


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("normalization", ["global", "bucket", "none"])
@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_rows_without_their_padding(decay: str, normalization: str, backend: str) -> None:
    check(inputs(decay, normalization), padding(), 1e-9, backend=backend)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_packed_documents(decay: str, backend: str) -> None:
    mask = padding()[1:2]
    check(inputs(decay, "global", batch=1, rows=len(CU) - 1), mask, 1e-9, backend=backend, cu_seqlens=torch.tensor(CU))


@pytest.mark.parametrize("normalization", ["global", "bucket"])
def test_both_directions(normalization: str) -> None:
    check(inputs("none", normalization, causal=False), padding(), 1e-9, backend="chunked")


@pytest.mark.parametrize("decay", ["head", "token"])
def test_one_token(decay: str) -> None:
    """Decoding a step in which some rows have no token: their state does not change."""
    check(inputs(decay, "global", length=1), torch.tensor([[True], [False], [False]]), 1e-9, backend="chunked")


def test_whatever_stands_there() -> None:
    """Keys, queries, values and log decays of masked tokens change nothing, whatever they hold."""
    x, mask = inputs("token", "none"), padding()
    expected = run(x, x.tokens, slice(None), key_mask=mask, backend="chunked")
    other = {
        name: torch.where(mask[..., None] if name == "log_decay" else mask[..., None, None], t, 7.0)
        for name, t in x.tokens.items()
    }
    for name, t in run(x, other, slice(None), key_mask=mask, backend="chunked").items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("unset", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("decay", "normalization", "causal"),
    [("token", "global", True), ("head", "none", True), ("none", "bucket", True), ("none", "global", False)],
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_memory_that_nobody_has_written(backend: str, decay: str, normalization: str, causal: bool, unset: float) -> None:
    x, mask = inputs(decay, normalization, causal=causal), padding()
    expected = run(x, x.tokens, slice(None), key_mask=mask, backend=backend)
    other = {
        name: torch.where(mask.view(*mask.shape, *(1,) * (t.dim() - 2)), t, t if name == "weight" else unset)
        for name, t in x.tokens.items()
    }
    for name, t in run(x, other, slice(None), key_mask=mask, backend=backend).items():
        assert torch.equal(t, expected[name]), name


def below_the_least_denominator(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """A row that sees nothing but a state that has all but decayed is 0, and so is every gradient; its neighbour is right."""
    scale = 1.0 if dtype == torch.float32 else 10.0
    planes, decays = sample_planes(2, 3, 8, seed=0, dtype=dtype), torch.tensor([-80.0 * scale])
    state = SketchState(torch.ones(1, 1, 16, dtype=dtype), torch.ones(1, 1, 16, 1, dtype=dtype))
    q = torch.full((1, 3, 1, 8), 1e4, dtype=dtype)
    k = torch.cat([-q[:, :2], q[:, :1]], 1)  # the first two hash to the bucket farthest from every query
    mask = torch.tensor([[True, False, True]])
    for length in (1, 3):
        leaves = [
            t.clone().requires_grad_()
            for t in (
                q[:, :length],
                k[:, :length],
                torch.ones(1, length, 1, 1, dtype=dtype),
                torch.tensor(40.0 * scale, dtype=dtype),
                *state.tensors(),
                decays.to(dtype).expand(1, length, 1),
            )
        ]
        out = race_attention(
            *leaves[:3],
            planes,
            leaves[3],
            key_mask=mask[:, :length],
            log_decay=leaves[6],
            initial_state=SketchState(*leaves[4:6]),
            backend=backend,
        )
        assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.0, 1.0][:length])
        for gradient in torch.autograd.grad(out[:, 0].sum(), leaves):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_rows_below_the_least_denominator_are_zero(backend: str, dtype: torch.dtype) -> None:
    below_the_least_denominator(backend, dtype)
    assert race_attention.__doc__ is not None
    assert "2**-96" in race_attention.__doc__
