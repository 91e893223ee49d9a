"""The kernels under Triton's interpreter: the same random problems as the other backends', small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.cases import Case, Limits, draw, errors
from tests.ops.test_absent_tokens import CU, below_the_least_denominator, check, inputs, padding

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU is present: tests/gpu runs the compiled kernels", allow_module_level=True)

from race_dist.attention import race_attention
from race_dist.kernels.plan import make_plan
from race_dist.ops import triton as backend
from race_dist.ops.inputs import AttentionInputs
from race_dist.ops.triton import launch, plan
from race_dist.sketch import SketchState

SMALL = Limits(length=48, heads=2, repeats=2, dim=17, tables=3, planes=4, documents=5)


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 and tiles of 32 tokens, so that a few dozen tokens cross both."""
    monkeypatch.setattr(
        plan, "make_plan", lambda spec, work, **limits: make_plan(spec, work, **limits | {"chunk": 16, "tile": 32})
    )
    backend.clear_plan_cache()


def run(case: Case) -> dict[str, float]:
    forward = backend.forward(case.inputs)
    return errors(case, forward, backend.backward(case.inputs, forward, case.dout, case.dfinal, need_planes=True))


@pytest.mark.parametrize("seed", range(14))
def test_float32_equals_the_definition(seed: int) -> None:
    """Products are float32 here: the errors are some hundred roundings at 6e-8, more where terms cancel."""
    worst = run(draw(seed, SMALL, dtype=torch.float32))
    assert max(worst[n] for n in ("out", "final.mass", "final.values")) <= 1e-5, worst
    assert max(worst.values()) <= 1e-4, worst


@pytest.mark.parametrize("seed", range(100, 106))
def test_bfloat16_rounds_as_on_a_gpu(seed: int) -> None:
    """Operands of products are rounded to bfloat16, 2**-9; differences lose a few more digits."""
    worst = run(draw(seed, SMALL, dtype=torch.bfloat16))
    assert max(worst[n] for n in ("out", "final.values")) <= 4e-3, worst
    assert max(worst[n] for n in ("dq", "dk", "dv")) <= 1.5e-2, worst


def test_many_features_are_computed_in_blocks() -> None:
    """A table of 128 buckets is two blocks that share their planes."""
    case = next(
        c
        for c in (
            draw(seed, replace(SMALL, length=20, tables=1, planes=7, repeats=1, heads=1), dtype=torch.float32)
            for seed in range(200)
        )
        if c.inputs.features == 128 and c.inputs.normalization == "global"
    )
    assert max(run(case).values()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_is_decoded_in_the_state_s_precision(dtype: torch.dtype) -> None:
    case = next(
        c
        for c in (draw(seed, replace(SMALL, length=1), dtype=torch.float32) for seed in range(200))
        if plan.is_decoding(c.inputs) and c.inputs.initial is not None
    )
    assert case.inputs.initial is not None
    large = SketchState(case.inputs.initial.mass.to(dtype) + 2.0**25, case.inputs.initial.values.to(dtype))
    case = replace(case, inputs=replace(case.inputs, initial=large, log_decay=None))
    final = backend.forward(case.inputs).final
    assert final.mass.dtype == dtype
    grown = (final.mass - large.mass).sum(-1)
    expected = case.inputs.planes.shape[1] * (1.0 if case.inputs.key_mask is None else 0.0)
    if dtype == torch.float64 and case.inputs.key_mask is None:
        torch.testing.assert_close(grown, torch.full_like(grown, expected), rtol=1e-5, atol=1e-5)


def test_a_chain_of_pieces_is_the_whole() -> None:
    """The first phase returns the final state without the output, or the gradient of the initial state."""
    case = next(
        c
        for c in (draw(seed, SMALL, dtype=torch.float32) for seed in range(100))
        if c.inputs.causal and c.inputs.initial is not None and c.inputs.q.shape[1] > 20
    )
    p = case.inputs
    forward = backend.forward(p)
    final = backend.start_forward(p).state
    torch.testing.assert_close(final.values, forward.final.values)
    zero = case.dfinal.zero()
    gradients = backend.backward(p, forward, case.dout, zero, need_planes=False)
    assert gradients.initial is not None
    started = backend.start_backward(p, forward, case.dout, need_planes=False)
    torch.testing.assert_close(started.state.values, gradients.initial.values)
    whole = backend.finish_backward(started, zero)
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], gradients[:3]))
    again = backend.finish_forward(backend.start_forward(p), p.initial)
    assert torch.equal(again.out, forward.out)
    assert torch.equal(again.states, forward.states)


def test_the_public_call_reaches_it() -> None:
    """One custom op for every backend: the same results, and a shape of the saved states that is known in advance."""
    case = next(
        c
        for c in (draw(seed, SMALL, dtype=torch.float32) for seed in range(100))
        if c.inputs.cu_seqlens is not None
        and c.inputs.causal
        and c.inputs.log_decay is not None
        and 0 < c.inputs.q.shape[1] < 30
    )
    p = case.inputs
    assert tuple(backend.forward(p).states.shape) == backend.states_shape(p)
    results = []
    for name in ("triton", "chunked"):
        leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out = race_attention(
            *leaves,
            p.planes,
            p.beta,
            normalization=p.normalization,
            cu_seqlens=p.cu_seqlens,
            key_mask=p.key_mask,
            log_decay=p.log_decay,
            initial_state=p.initial,
            backend=name,
        )
        results.append([out.detach(), *torch.autograd.grad(out, leaves, case.dout)])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_unsupported_inputs_are_named() -> None:
    p = draw(3, SMALL, dtype=torch.float64).inputs
    with pytest.raises(ValueError, match=r'bfloat16, float16 and float32; got torch.float64; use backend="chunked"'):
        race_attention(p.q, p.k, p.v, p.planes, p.beta, causal=p.causal, backend="triton")


def test_the_custom_op_passes_opcheck() -> None:
    """With symbolic sizes too: the states' shape comes from a plan."""
    p = draw(4, replace(SMALL, length=40), dtype=torch.float32).inputs
    initial = (None, None) if p.initial is None else p.initial.tensors()
    arguments = (
        p.q.requires_grad_(),
        p.k.requires_grad_(),
        p.v,
        p.planes,
        p.beta,
        p.log_decay,
        p.key_mask,
        p.cu_seqlens,
        *initial,
        p.causal,
        p.normalization,
        "triton",
    )
    torch.library.opcheck(torch.ops.race_dist.attention.default, arguments)


def test_calls_with_the_same_layout_share_a_signature() -> None:
    """Compiled kernels of a signature are launched without checking their arguments again, so signatures differ in whatever
    Triton compiles for."""
    q, k, v = (torch.randn(2, 40, 3, 16) for _ in range(3))
    p = AttentionInputs(q, k, v, torch.randn(3, 2, 3, 16), torch.ones(3), None, None, None, None, True, "global")
    kind = lambda p: launch.KernelCall(p).signature
    assert kind(p) is kind(replace(p, q=q.clone()))
    elsewhere = torch.empty(q.numel() + 1)[1:].view(q.shape)  # 4 bytes further on
    across = q.transpose(1, 2).contiguous().transpose(1, 2)
    for other in ({"q": elsewhere}, {"q": across}, {"beta": torch.ones(6)[::2]}, {"normalization": "none"}, {"causal": False}):
        assert kind(p) is not kind(replace(p, **other)), other


@pytest.mark.parametrize(("decay", "normalization"), [("head", "global"), ("token", "bucket")])
def test_masked_tokens_are_absent(decay: str, normalization: str) -> None:
    check(inputs(decay, normalization, length=20, dtype=torch.float32), padding(length=20), 2e-4, backend="triton")


def test_decoding_skips_a_masked_token() -> None:
    check(
        inputs("token", "global", length=1, dtype=torch.float32),
        torch.tensor([[True], [False], [False]]),
        1e-5,
        backend="triton",
    )


def test_masked_tokens_in_packed_documents() -> None:
    x = inputs("head", "global", batch=1, rows=len(CU) - 1, dtype=torch.float32)
    check(x, padding()[1:2], 2e-4, backend="triton", cu_seqlens=torch.tensor(CU))


def test_rows_below_the_least_denominator_are_zero() -> None:
    below_the_least_denominator("triton")
