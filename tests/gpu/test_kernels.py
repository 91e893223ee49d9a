"""The kernels on a GPU, against the definition and against the chunked pass in float64."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from race_dist.ops import chunked
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Gradients
from race_dist.sketch import SketchState
from tests.kernels.problems import both, double, problem
from tests.ops.cases import Case, Limits, draw, errors, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
triton_backend = pytest.importorskip("race_dist.ops.triton")

LIMITS = Limits(length=300, heads=3, repeats=2, dim=140, tables=3, planes=7)
# bfloat16 features, states' operands and outputs round at 2**-9 = 2e-3 each; sums that cancel (beta, a decay's flow,
# gradients with respect to a state's mass) lose a factor of ten more.
BFLOAT16 = {
    "out": 4e-3,
    "final.mass": 4e-3,
    "final.values": 4e-3,
    "final.log_decay": 1e-5,
    "dq": 1.5e-2,
    "dk": 1.5e-2,
    "dv": 1e-2,
    "dplanes": 2e-2,
    "dbeta": 5e-2,
    "dlog_decay": 4e-2,
    "dinitial.mass": 2e-2,
    "dinitial.values": 1e-2,
}


def on(x: object, device: str) -> object:
    return x.to(device) if isinstance(x, (Tensor, SketchState)) else x


def cuda(p: AttentionInputs) -> AttentionInputs:
    return AttentionInputs(**{f.name: on(getattr(p, f.name), "cuda") for f in fields(AttentionInputs)})  # type: ignore[arg-type]


def run(case: Case) -> tuple[ForwardResult, Gradients]:
    forward, gradients = both(cuda(case.inputs), case.dout.cuda(), case.dfinal.to("cuda"), need_planes=True)
    host = [on(x, "cpu") for x in (forward.out, forward.den, forward.states, forward.final)]
    return ForwardResult(*host), Gradients(*(on(x, "cpu") for x in gradients))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(24))
def test_float32_equals_the_definition(seed: int) -> None:
    case = draw(seed, LIMITS, dtype=torch.float32)
    worst = errors(case, *run(case))
    assert max(worst[n] for n in ("out", "final.mass", "final.values")) <= 1e-5, worst
    assert max(worst.values()) <= 2e-4, worst


@pytest.mark.parametrize("seed", range(24))
def test_bfloat16_is_right_to_its_rounding(seed: int) -> None:
    case = draw(seed, LIMITS, dtype=torch.bfloat16)
    worst = errors(case, *run(case))
    assert all(worst[n] <= BFLOAT16[n] for n in worst), worst


@pytest.mark.parametrize("seed", range(8))
def test_float16_is_right_to_its_rounding(seed: int) -> None:
    case = draw(seed, LIMITS, dtype=torch.float16)
    assert errors(case, *run(case))["out"] <= 4e-3


SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "mean 1": {"mean": 1.0},
    "mean 3": {"mean": 3.0},
    "beta 16": {"beta": 16.0},
    "decay": {"decay": True, "normalization": "none"},
    "not causal": {"causal": False},
    "few": {"tables": 2, "planes": 2},
    "many": {"tables": 1, "planes": 8, "length": 2048},
    "grouped": {"repeats": 2, "heads": 2},
    "bucket": {"normalization": "bucket", "length": 1024},
    "wide": {"dim": 256, "length": 512},
    "most": {"tables": 1, "planes": 10, "dim": 64, "length": 512},
    "float32": {"dtype": torch.float32, "length": 1024},
}


@pytest.mark.parametrize("name", SHAPES)
def test_usual_shapes_agree_with_float64(name: str) -> None:
    p = problem(**SHAPES[name])  # type: ignore[arg-type]
    torch.manual_seed(0)
    dout = torch.randn(*p.q.shape[:3], p.v.shape[3], device="cuda", dtype=p.q.dtype)
    forward, gradients = both(p, dout, None)
    right = chunked.forward(double(p))
    right_gradients = chunked.backward(double(p), right, dout.double(), None, need_planes=False)
    exact = p.q.dtype == torch.float32
    found = {
        "out": relative_error(forward.out, right.out),
        **{n: relative_error(getattr(gradients, n), getattr(right_gradients, n)) for n in ("q", "k", "v")},
    }
    assert found["out"] <= (1e-5 if exact else 4e-3), found
    assert max(found.values()) <= (1e-4 if exact else 1e-2), found


@pytest.mark.parametrize("name", ["plain", "decay", "bucket", "many"])
def test_runs_are_bitwise_equal(name: str) -> None:
    p = problem(**SHAPES[name])  # type: ignore[arg-type]
    dout = torch.randn_like(p.q)
    runs = [both(p, dout, None) for _ in range(3)]
    for forward, gradients in runs[1:]:
        assert torch.equal(forward.out, runs[0][0].out)
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0][1]) if a is not None and b is not None)


def test_offsets_past_two_to_the_31() -> None:
    """The last tokens of a tensor of more than 2**31 elements get what the same tokens get from the state before them."""
    p = problem(length=2**22 + 2**18, heads=4)
    assert p.q.numel() > 2**31
    cut = p.q.shape[1] - 4096
    before = triton_backend.start_forward(replace(p, q=p.q[:, :cut], k=p.k[:, :cut], v=p.v[:, :cut])).state
    tail = replace(p, q=p.q[:, cut:].clone(), k=p.k[:, cut:].clone(), v=p.v[:, cut:].clone(), initial=before)
    dout = torch.randn_like(p.q)
    forward, gradients = both(p, dout, None)
    tail_forward, tail_gradients = both(tail, dout[:, cut:].clone(), None)
    assert relative_error(forward.out[:, cut:], tail_forward.out) <= 4e-3
    for name in ("q", "k", "v"):
        assert relative_error(getattr(gradients, name)[:, cut:], getattr(tail_gradients, name)) <= 1e-2, name


def test_a_graph_replays_it() -> None:
    p = problem(length=1024)
    dout = torch.randn_like(p.q)
    eager = both(p, dout, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(p, dout, None)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0].out, eager[0].out)
    assert torch.equal(captured[1].k, eager[1].k)


def test_strided_views_are_read_in_place() -> None:
    """[S, B, H, D] views as Megatron gives them, and an expanded gradient."""
    p = problem(length=512)
    moved = [torch.empty(x.shape[1], 1, *x.shape[2:], device="cuda", dtype=x.dtype) for x in (p.q, p.k, p.v)]
    for new, old in zip(moved, (p.q, p.k, p.v)):
        new.copy_(old.transpose(0, 1))
    viewed = replace(p, **dict(zip("qkv", (x.transpose(0, 1) for x in moved))))
    dout = torch.ones(1, 1, 1, 1, device="cuda", dtype=p.q.dtype).expand_as(p.q)
    one, other = both(p, dout.contiguous(), None), both(viewed, dout, None)
    assert relative_error(other[0].out, one[0].out) <= 4e-3
    assert relative_error(other[1].k, one[1].k) <= 1e-2


def test_decoding_token_by_token_is_the_whole() -> None:
    p = problem(length=40)
    whole = triton_backend.forward(p)
    state: SketchState | None = None
    for t in range(40):
        token = replace(p, q=p.q[:, t : t + 1], k=p.k[:, t : t + 1], v=p.v[:, t : t + 1], initial=state)
        step = triton_backend.forward(token)
        state = step.final
        assert relative_error(step.out, whole.out[:, t : t + 1]) <= 1e-2
    assert state is not None
    assert relative_error(state.values, whole.final.values) <= 4e-3
