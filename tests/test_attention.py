"""The public attention: its arguments, its errors, and its use inside PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from race_dist import SketchState, race_attention, sample_planes
from tests.ops.cases import Limits, draw, relative_error

B, T, HQ, HKV, D, DV, L, P = 2, 90, 4, 2, 8, 6, 2, 3
S = L * 2**P


def inputs(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, h, d, generator=g, dtype=torch.float64).to(dtype) for h, d in ((HQ, D), (HKV, D), (HKV, DV)))
    return {"q": q, "k": k, "v": v, "planes": sample_planes(L, P, D, seed=seed), "beta": 2.0}


def test_backends_agree_through_the_public_name() -> None:
    for seed in range(12):
        p = draw(seed, Limits(length=150)).inputs
        if p.normalization == "none" and not p.causal:
            continue  # a backend computes it, the public call refuses it
        options: dict[str, Any] = {
            "causal": p.causal,
            "normalization": p.normalization,
            "cu_seqlens": p.cu_seqlens,
            "key_mask": p.key_mask,
            "log_decay": p.log_decay,
            "initial_state": p.initial,
            "output_final_state": True,
        }
        results = [race_attention(p.q, p.k, p.v, p.planes, p.beta, backend=b, **options) for b in ("reference", "chunked")]
        (out, final), (other, other_final) = results
        assert relative_error(other, out) <= 1e-9
        assert relative_error(other_final.mass, final.mass) <= 1e-9


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    """PyTorch's gradcheck of every differentiable input at once."""
    g = torch.Generator().manual_seed(0)
    q, k, v, mass, values = (
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((1, 5, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2), (2, 1, 4), (2, 1, 4, 2))
    )
    planes = sample_planes(1, 2, 3, seed=1, dtype=torch.float64).requires_grad_()
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    log_decay = (-torch.rand(1, 5, 1, generator=g, dtype=torch.float64)).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 5])

    def run(
        q: Tensor, k: Tensor, v: Tensor, planes: Tensor, beta: Tensor, decay: Tensor, mass: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        out, final = race_attention(
            q,
            k,
            v,
            planes,
            beta,
            log_decay=decay,
            cu_seqlens=cu_seqlens,
            backend=backend,
            initial_state=SketchState(mass.abs(), values),
            output_final_state=True,
        )
        assert final.log_decay is not None
        return out, *final.tensors()

    assert torch.autograd.gradcheck(run, (q, k, v, planes, beta, log_decay, mass, values))


def test_a_state_carries_a_sequence_across_calls() -> None:
    x = inputs(torch.float64)
    q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
    decay = -torch.rand(B, T, HKV, dtype=torch.float64)
    whole, final = race_attention(q, k, v, **x, log_decay=decay, output_final_state=True)
    state, outs = None, []
    for start, end in ((0, 1), (1, 40), (40, 40), (40, T)):
        part = slice(start, end)
        out, state = race_attention(
            q[:, part], k[:, part], v[:, part], **x, log_decay=decay[:, part], initial_state=state, output_final_state=True
        )
        outs.append(out)
    assert state is not None
    assert relative_error(torch.cat(outs, 1), whole) <= 1e-12
    for got, wanted in zip(state.tensors(), final.tensors()):
        assert relative_error(got, wanted) <= 1e-12


def test_compile_has_no_graph_break() -> None:
    x = inputs()
    leaves = [x[n].requires_grad_() for n in ("q", "k", "v")]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, final = race_attention(q, k, v, x["planes"], 2.0, output_final_state=True)
        return out.square().sum() + final.values.sum()

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), wanted):
        assert torch.equal(got, right)


def test_the_custom_op_is_registered_right() -> None:
    p = draw(4, Limits(length=80), dtype=torch.float32).inputs
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
        "chunked",
    )
    torch.library.opcheck(torch.ops.race_dist.attention.default, arguments)


def test_checkpointing_recomputes_the_same() -> None:
    x = inputs()
    q = x.pop("q").requires_grad_()
    (plain,) = torch.autograd.grad(race_attention(q, **x).sum(), q)
    (again,) = torch.autograd.grad(checkpoint(lambda q: race_attention(q, **x), q, use_reentrant=False).sum(), q)
    assert torch.equal(plain, again)


def test_autocast_casts_like_attention_and_computes_in_float32() -> None:
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = race_attention(**x)
    low = {n: x[n].bfloat16() for n in ("q", "k", "v")}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, race_attention(**{**x, **low}))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_leaves_states_in_float32(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, final = race_attention(**inputs(), backend=backend, output_final_state=True)
    wanted = race_attention(
        **{n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs().items()}, output_final_state=True
    )[1]
    assert relative_error(final.values, wanted.values) <= 1e-5


@pytest.mark.parametrize("beta", [torch.tensor(1.3), torch.tensor([1.3]), torch.tensor([1.3, 9.0, 0.7, 9.0])[::2]])
def test_every_form_of_beta_reaches_every_backend_alike(beta: Tensor) -> None:
    pytest.importorskip("triton")
    small = {n: x[:, :20] if n in ("q", "k", "v") else x for n, x in inputs().items()}
    wanted = race_attention(**{**small, "beta": beta}, backend="reference")
    for backend in ("chunked", "triton"):
        got = race_attention(**{**small, "beta": beta}, backend=backend)
        assert relative_error(got, wanted) <= 1e-5


def test_an_empty_batch_is_legal() -> None:
    q, k, v = (torch.randn(0, 3, h, d, requires_grad=True) for h, d in ((HQ, D), (HKV, D), (HKV, DV)))
    out, final = race_attention(q, k, v, sample_planes(L, P, D, seed=0), 2.0, output_final_state=True)
    (out.sum() + final.values.sum()).backward()
    assert out.shape == (0, 3, HQ, DV)


def test_planes_are_the_same_wherever_they_are_drawn() -> None:
    every = sample_planes(3, 4, 5, num_heads=6, seed=7, layer=2)
    assert torch.equal(every[2:4], sample_planes(3, 4, 5, num_heads=2, seed=7, layer=2, head_offset=2))
    assert torch.equal(every[3], sample_planes(3, 4, 5, seed=7, layer=2, head_offset=3))
    assert torch.equal(every, every.bfloat16().float())
    assert not torch.equal(every, sample_planes(3, 4, 5, num_heads=6, seed=7, layer=3))
    many = sample_planes(8, 8, 128, num_heads=16, seed=0).double()
    assert abs(float(many.mean())) < 0.01  # 131,072 draws: four standard errors
    assert abs(float(many.var()) - 1) < 0.02
    # the first values of a stream are part of what a checkpoint relies on
    assert sample_planes(1, 1, 4, seed=0).flatten().tolist() == [0.158203125, 2.984375, -1.921875, -0.82421875]


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**inputs(), **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor; got list"),
        ({"q": torch.randn(B, T, D)}, ValueError, r"q must be \[B, T, H, D\]"),
        ({"q": torch.randn(B, T, HQ, D).long()}, TypeError, "q is torch.int64"),
        ({"k": torch.randn(B, T, HKV, D).double()}, TypeError, "must have one dtype"),
        ({"v": torch.randn(B, T + 1, HKV, DV)}, ValueError, "agree in batch and length"),
        ({"k": torch.randn(B, T, HKV, D + 1)}, ValueError, "one head width; got 8 and 9"),
        ({"v": torch.randn(B, T, HKV + 1, DV)}, ValueError, "same number of heads; got 2 and 3"),
        ({"q": torch.randn(B, T, 3, D)}, ValueError, "multiple of key/value heads; got 3 and 2"),
        ({"planes": torch.randn(L, P, D + 1)}, ValueError, r"planes must be \[L, P, D\]"),
        ({"planes": torch.randn(L, 11, D)}, ValueError, "num_planes must be an integer from 1 to 10"),
        ({"beta": 0.0}, ValueError, "beta must be positive and finite; got 0.0"),
        ({"beta": float("nan")}, ValueError, "beta must be positive and finite"),
        ({"beta": torch.tensor([1.0, -1.0])}, ValueError, "beta must be positive and finite"),
        ({"beta": torch.ones(3)}, ValueError, r"beta must be a scalar or \[Hkv\] = \[2\]"),
        ({"beta": "2"}, TypeError, "beta must be a number or a tensor; got str"),
        ({"normalization": "softmax"}, ValueError, "normalization must be one of 'global', 'bucket', 'none'; got 'softmax'"),
        ({"key_mask": torch.ones(B, T)}, ValueError, "key_mask must be bool"),
        ({"log_decay": torch.ones(HKV)}, ValueError, "log_decay must be 0 or less"),
        ({"log_decay": torch.full((HKV,), float("nan"))}, ValueError, "log_decay must be 0 or less"),
        ({"log_decay": torch.zeros(HKV), "causal": False}, ValueError, "log_decay needs causal=True"),
        ({"log_decay": torch.zeros(T, HKV)}, ValueError, r"log_decay must be \[Hkv\]"),
        ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "need a batch of 1; got B = 2"),
        ({"initial_state": torch.zeros(3)}, TypeError, "initial_state must be a SketchState"),
        ({"initial_state": SketchState.empty(B, HKV, S + 1, DV)}, ValueError, "initial_state.values must be"),
        ({"layout": "striped"}, ValueError, "layout must be .*striped"),
        ({"causal": "yes"}, TypeError, "causal must be True or False; got 'yes'"),
        ({"backend": "cuda"}, ValueError, 'backend must be "auto"'),
    ],
)
def test_bad_input_is_answered_in_one_sentence(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        race_attention(**spoiled(**arguments))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [([1, T], "start at 0"), ([0, 50, 40, T], "never fall"), ([0, T - 1], "end at the sequence.s length, 90; it ends at 89")],
)
def test_bad_documents_are_named(bounds: list[int], words: str) -> None:
    one_row = {n: x[:1] if n in ("q", "k", "v") else x for n, x in inputs().items()}
    with pytest.raises(ValueError, match=words):
        race_attention(**one_row, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_tables": 0}, "num_tables must be an integer of at least 1; got 0"),
        ({"num_planes": 11}, "from 1 to 10"),
        ({"seed": -1}, "seed must be an integer"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"num_heads": 0}, "num_heads must be"),
    ],
)
def test_bad_planes_are_named(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_planes(**{"num_tables": 2, "num_planes": 2, "head_dim": 4, "seed": 0, **arguments})


def test_sketches_combine_like_their_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (
        SketchState(torch.rand(1, 2, 4, generator=g), torch.randn(1, 2, 4, 3, generator=g), -torch.rand(1, 2, generator=g))
        for _ in range(3)
    )
    left, right = a.combine(b).combine(c), a.combine(b.combine(c))
    for x, y, z in zip(left.tensors(), right.tensors(), a.zero().combine(a).tensors()):
        assert torch.allclose(x, y)
        assert x.shape == z.shape
    assert torch.equal(a.combine(a.zero()).values, a.values)
    reset = SketchState(b.mass, b.values, torch.full((1, 2), -torch.inf))
    assert torch.equal(a.combine(reset).values, b.values)
    with pytest.raises(TypeError, match="sketches are float32 or float64"):
        SketchState(a.mass.half(), a.values.half())
    with pytest.raises(ValueError, match="must have one shape"):
        a.combine(SketchState(a.mass, a.values[..., :2]))
    with pytest.raises(TypeError, match="must have one dtype"):
        a.combine(b.to(torch.float64))
    with pytest.raises(ValueError, match=r"needs mass \[B, Hkv, S\]"):
        SketchState(a.mass[0], a.values)
