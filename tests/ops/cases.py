"""Random attention calls for every backend: the cases of the exactness tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from race_dist.hashing import sample_planes
from race_dist.ops import reference
from race_dist.ops.inputs import NORMALIZATIONS, AttentionInputs, ForwardResult, Gradients
from race_dist.sketch import SketchState


@dataclass(frozen=True)
class Limits:
    """Largest sizes of a random call."""

    length: int = 300
    heads: int = 3
    repeats: int = 3
    dim: int = 20
    tables: int = 3
    planes: int = 5
    documents: int = 7


@dataclass(frozen=True)
class Case:
    """Inputs of a call and the gradients of its outputs."""

    inputs: AttentionInputs
    dout: Tensor
    dfinal: SketchState


def draw(seed: int, limits: Limits = Limits(), *, dtype: torch.dtype = torch.float64, mean: float | None = None) -> Case:
    """A random call: shapes, packing, decay, masks, states, normalization, values with a mean."""
    g = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    packed = pick(0, 1) == 1
    batch, length = 1 if packed else pick(1, 2), pick(1, limits.length) if pick(0, 19) else 0
    heads, repeats, documents = pick(1, limits.heads), pick(1, limits.repeats), pick(1, limits.documents)
    dim, value_dim, tables, number = pick(2, limits.dim), pick(1, limits.dim), pick(1, limits.tables), pick(1, limits.planes)
    causal = pick(0, 2) > 0
    cu_seqlens = None
    if packed:
        cuts = torch.randint(0, length + 1, (documents - 1,), generator=g).sort().values
        cu_seqlens = torch.cat([torch.tensor([0]), cuts, torch.tensor([length])])
    rows, features = documents if packed else batch, tables * 2**number
    initial = None
    if pick(0, 1):
        mass = torch.rand(rows, heads, features, generator=g, dtype=torch.float64)
        initial = SketchState(mass, normal(rows, heads, features, value_dim))
    offset = (0.0, 1.0, 3.0)[pick(0, 2)] if mean is None else mean
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    problem = AttentionInputs(
        q=normal(batch, length, heads * repeats, dim).to(dtype),
        k=normal(batch, length, heads, dim).to(dtype),
        v=(normal(batch, length, heads, value_dim) + offset).to(dtype),
        planes=sample_planes(tables, number, dim, num_heads=heads, seed=seed, dtype=state_dtype),
        beta=(10 ** (2 * torch.rand(heads, generator=g, dtype=torch.float64) - 1)).to(state_dtype),  # 0.1 to 10
        log_decay=_decay(g, pick(0, 3), batch, length, heads, state_dtype) if causal else None,
        key_mask=torch.rand(batch, length, generator=g) > 0.3 if pick(0, 1) else None,
        cu_seqlens=cu_seqlens,
        initial=None if initial is None else initial.to(state_dtype),
        causal=causal,
        normalization=NORMALIZATIONS[pick(0, 2)],
    )
    dfinal = SketchState(normal(rows, heads, features), normal(rows, heads, features, value_dim))
    return Case(problem, normal(batch, length, heads * repeats, value_dim).to(dtype), dfinal.to(state_dtype))


def _decay(g: torch.Generator, kind: int, batch: int, length: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """None, one constant per head, gentle per token, or per token with hard resets that leave their neighbours exact."""
    if kind == 0:
        return None
    if kind == 1:
        return -torch.rand(heads, generator=g).to(dtype).expand(batch, length, -1)
    log_decay = -torch.rand(batch, length, heads, generator=g, dtype=dtype) * (0.1 if kind == 2 else 2.0)
    reset = torch.rand(batch, length, heads, generator=g) < 0.03
    return log_decay if kind == 2 else torch.where(reset, -1e4, log_decay)


def upcast(case: Case) -> Case:
    """The same call in float64."""

    def double(x: object) -> object:
        if isinstance(x, SketchState):
            return x.to(torch.float64)
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    values = {f.name: double(getattr(case.inputs, f.name)) for f in fields(AttentionInputs)}
    return Case(AttentionInputs(**values), case.dout.double(), case.dfinal.to(torch.float64))  # type: ignore[arg-type]


def expected(case: Case) -> tuple[ForwardResult, Gradients]:
    """Outputs and gradients by definition and autograd, float64."""
    p = upcast(case).inputs
    names = [n for n in ("q", "k", "v", "planes", "beta", "log_decay") if getattr(p, n) is not None]
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in names}
    initial = None if p.initial is None else [t.clone().requires_grad_() for t in p.initial.tensors()]
    p = replace(p, **leaves, initial=None if initial is None else SketchState(*initial))
    out, final = reference.attention(p)
    loss = (
        (out * case.dout.double()).sum()
        + (final.mass * case.dfinal.mass.double()).sum()
        + (final.values * case.dfinal.values.double()).sum()
    )
    grads = torch.autograd.grad(loss, [*leaves.values(), *(initial or [])], allow_unused=True, materialize_grads=True)
    by_name = dict(zip(names, grads))
    dinitial = None if initial is None else SketchState(*grads[len(names) :])
    final = SketchState(*(t.detach() for t in final.tensors()))
    return (
        ForwardResult(out.detach(), out.new_empty(0), out.new_empty(0), final),
        Gradients(**{"log_decay": None, "initial": dinitial, **by_name}),
    )  # type: ignore[arg-type]


def errors(case: Case, forward: ForwardResult, gradients: Gradients) -> dict[str, float]:
    """Relative errors, by norm, of everything that a backend returns.

    A gradient may be exactly zero (one token alone in its document reads only itself), where a relative error means
    nothing: norms are taken as no smaller than 1e-3 of the typical gradient's.
    """
    right, right_grads = expected(case)
    scale = 1e-3 * float(case.dout.double().norm() + case.dfinal.values.double().norm())
    pairs: dict[str, tuple[Tensor, Tensor | None, float]] = {
        "out": (right.out, forward.out, 1e-30),
        "final.mass": (right.final.mass, forward.final.mass, 1e-30),
        "final.values": (right.final.values, forward.final.values, 1e-30),
    }
    if right.final.log_decay is not None:
        pairs["final.log_decay"] = (right.final.log_decay, forward.final.log_decay, 1e-30)
    for name in ("q", "k", "v", "planes", "beta", "log_decay"):
        if (wanted := getattr(right_grads, name)) is not None:
            pairs[f"d{name}"] = (wanted, getattr(gradients, name), scale)
    if right_grads.initial is not None:
        got = gradients.initial
        pairs["dinitial.mass"] = (right_grads.initial.mass, None if got is None else got.mass, scale)
        pairs["dinitial.values"] = (right_grads.initial.values, None if got is None else got.values, scale)
    return {
        name: float("inf") if got is None else relative_error(got, wanted, floor)
        for name, (wanted, got, floor) in pairs.items()
    }


def relative_error(got: Tensor, wanted: Tensor, floor: float = 1e-30) -> float:
    """``|got - wanted| / max(|wanted|, floor)``; NaN counts as infinite."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    error = float((got.double() - wanted.double()).norm() / max(float(wanted.double().norm()), floor))
    return float("inf") if math.isnan(error) else error
