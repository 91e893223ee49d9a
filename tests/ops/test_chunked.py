"""The chunked backend against the definition, in float64 and below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from race_dist.ops import chunked, reference
from race_dist.ops.inputs import NORMALIZATIONS, AttentionInputs
from race_dist.sketch import SketchState
from tests.ops.cases import Case, Limits, draw, errors, relative_error


def run(case: Case, *, need_planes: bool = True) -> dict[str, float]:
    forward = chunked.forward(case.inputs)
    gradients = chunked.backward(case.inputs, forward, case.dout, case.dfinal, need_planes=need_planes)
    return errors(case, forward, gradients)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31))
def test_float64_equals_the_definition(seed: int) -> None:
    worst = run(draw(seed))
    assert max(worst.values()) <= 1e-9, worst


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_float32_keeps_its_digits(seed: int) -> None:
    """float32 rounds at 6e-8; sums of 300 terms and the cancellation of values with a mean cost at most some hundred. The
    gradients of the queries and of beta can cancel whole (one key, a saturated hash): they may lose ten times as many, and more
    in problems that are rarer than these."""
    worst = run(draw(seed, Limits(planes=4), dtype=torch.float32))
    assert max(worst[n] for n in ("out", "final.mass", "final.values")) <= 1e-5, worst
    assert max(worst.pop("dq"), worst.pop("dbeta")) <= 1e-3, worst
    assert max(worst.values()) <= 1e-4, worst


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_bfloat16_rounds_only_its_inputs_and_outputs(seed: int) -> None:
    """bfloat16 inputs are computed in float32: outputs differ by their own rounding, 2**-9, and no more."""
    worst = run(draw(seed, Limits(planes=4), dtype=torch.bfloat16))
    assert max(worst[n] for n in ("out", "dq", "dk", "dv")) <= 4e-3, worst
    assert max(worst[n] for n in ("final.mass", "final.values")) <= 1e-5, worst


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [0, 5])
def test_the_pieces_of_a_chain_are_the_whole(normalization: str, causal: bool, documents: int) -> None:
    """The first phase returns what ranks exchange: the final state without the output, and the initial state's gradient."""
    case = next(
        c
        for c in map(draw, range(1000))
        if c.inputs.causal == causal
        and c.inputs.normalization == normalization
        and c.inputs.initial is not None
        and c.inputs.q.shape[1] > 128
        and (c.inputs.cu_seqlens is None) == (documents == 0)
    )
    p = case.inputs
    forward = chunked.forward(p)
    assert relative_error(chunked.start_forward(p).state.values, forward.final.values) <= 1e-14
    gradients = chunked.backward(p, forward, case.dout, None, need_planes=False)
    suffix = chunked.start_backward(p, forward, case.dout, need_planes=False).state
    assert gradients.initial is not None
    assert gradients.planes is None
    assert relative_error(suffix.values, gradients.initial.values) <= 1e-12
    assert relative_error(suffix.mass, gradients.initial.mass) <= 1e-12


def test_underflow_gives_zero_rows_and_zero_gradients() -> None:
    """Where a query's bucket was never filled the denominator underflows: zeros, in every backend, and no NaN."""
    q, k = torch.full((1, 70, 1, 4), 5.0), torch.full((1, 70, 1, 4), -5.0)
    planes = torch.ones(1, 1, 10, 4)
    p = AttentionInputs(q, k, torch.randn(1, 70, 1, 3), planes, torch.tensor([30.0]), None, None, None, None, True, "global")
    for dtype, beta in ((torch.float32, 30.0), (torch.float64, 300.0)):
        cast = replace(
            p, q=q.to(dtype), k=k.to(dtype), v=p.v.to(dtype), planes=planes.to(dtype), beta=torch.tensor([beta], dtype=dtype)
        )
        forward = chunked.forward(cast)
        gradients = chunked.backward(cast, forward, torch.ones_like(forward.out), None, need_planes=True)
        assert not forward.out.any()
        assert all(not g.any() for g in gradients if isinstance(g, torch.Tensor))
        assert not reference.attention(cast)[0].any()


@pytest.mark.parametrize("beta", [4.0, 16.0, 64.0])
def test_sharp_hashes_have_no_nan_and_stay_exact(beta: float) -> None:
    case = draw(11, Limits(planes=5))
    p = replace(case.inputs, beta=torch.full_like(case.inputs.beta, beta))
    worst = run(replace(case, inputs=p))
    assert max(worst.values()) <= 1e-9, worst


def test_a_long_float32_sum_keeps_growing() -> None:
    """A float32 mass fed ones stops at 2**24; a float64 carry through calls does not."""
    ones = torch.ones(1, 64, 1, 2)
    full = SketchState(torch.full((1, 1, 2), 2.0**24, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    p = AttentionInputs(ones, ones, ones, torch.zeros(1, 1, 1, 2), torch.ones(1), None, None, None, full, True, "none")
    final = chunked.forward(p).final
    assert final.mass.dtype == torch.float64
    assert torch.equal(final.mass, torch.full((1, 1, 2), 2.0**24 + 32, dtype=torch.float64))


def test_strided_inputs_are_read_in_place() -> None:
    """[S, B, H, D] views, as in Megatron, give the results of contiguous inputs."""
    case = next(c for c in map(draw, range(100)) if c.inputs.cu_seqlens is None and c.inputs.q.shape[0] == 2)
    p = case.inputs
    views = {n: getattr(p, n).transpose(0, 1).contiguous().transpose(0, 1) for n in ("q", "k", "v")}
    assert torch.equal(chunked.forward(replace(p, **views)).out, chunked.forward(p).out)
