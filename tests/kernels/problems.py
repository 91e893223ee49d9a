"""Problems for the Hopper pipelines, on a GPU and in their emulation, with the error bounds of each result."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from race_dist.hashing import sample_planes
from race_dist.ops import chunked
from race_dist.ops import triton as triton_backend
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Gradients
from race_dist.ops.triton.launch import KernelCall
from race_dist.sketch import SketchState
from tests.ops.cases import relative_error


def double(p: AttentionInputs) -> AttentionInputs:
    """The same problem in float64."""

    def cast(x: object) -> object:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return AttentionInputs(**{f.name: cast(getattr(p, f.name)) for f in fields(AttentionInputs)})  # type: ignore[arg-type]


def both(
    p: AttentionInputs, dout: Tensor, dfinal: SketchState | None, *, need_planes: bool = False
) -> tuple[ForwardResult, Gradients]:
    """The forward and the backward pass of the kernels."""
    saved = triton_backend.forward(p)
    return saved, triton_backend.backward(p, saved, dout, dfinal, need_planes=need_planes)


def problem(
    *,
    length: int = 4096,
    heads: int = 4,
    repeats: int = 1,
    dim: int = 128,
    tables: int = 4,
    planes: int = 4,
    mean: float = 0.0,
    decay: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    beta: float = 2.0,
    causal: bool = True,
    normalization: str = "global",
    device: str = "cuda",
    plane_dtype: torch.dtype = torch.bfloat16,
    trained: bool = False,
) -> AttentionInputs:
    """Normally distributed q, k and v, values with a mean. ``trained``: planes that bfloat16 cannot represent."""
    g = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, length, n, dim, device=device, generator=g) for n in (heads * repeats, heads, heads))
    log_decay = -0.02 * torch.rand(1, length, heads, device=device, generator=g) if decay else None
    hyperplanes = sample_planes(tables, planes, dim, num_heads=heads, seed=0, device=device, dtype=plane_dtype)
    if trained:
        hyperplanes = hyperplanes * (1 + 0.01 * torch.randn(hyperplanes.shape, device=device, generator=g).to(plane_dtype))
    return AttentionInputs(
        q.to(dtype),
        k.to(dtype),
        (v + mean).to(dtype),
        hyperplanes,
        torch.full((heads,), beta, device=device),
        log_decay,
        None,
        None,
        None,
        causal,
        normalization,
    )  # type: ignore[arg-type]


def drawn(
    *,
    length: int = 1000,
    dim: int = 128,
    value_dim: int | None = None,
    batch: int = 1,
    decay: str = "",
    documents: list[int] | None = None,
    masked: bool = False,
    states: bool = False,
    device: str = "cuda",
    **options: object,
) -> tuple[AttentionInputs, Tensor, SketchState | None]:
    """A problem with any option, and gradients of its output and final state. ``decay``: "", "token", or "hard" (with resets);
    ``documents``: cu_seqlens; ``states``: with an initial state and a gradient of the final state."""
    g = torch.Generator(device).manual_seed(1)
    base = problem(length=length * batch, dim=dim, device=device, **options)  # type: ignore[arg-type]
    rows = lambda x: x.view(batch, length, *x.shape[2:])
    heads, features = base.k.shape[2], base.features
    p = replace(base, q=rows(base.q), k=rows(base.k), v=rows(base.v[..., :value_dim]).contiguous())
    if decay:
        rate = -0.05 * torch.rand(batch, length, heads, device=device, generator=g)
        if decay == "hard":
            rate[torch.rand(rate.shape, device=device, generator=g) < 0.02] = -1e4  # 0 in float64 too
        p = replace(p, log_decay=rate)
    if documents is not None:
        p = replace(p, cu_seqlens=torch.tensor(documents, device=device))
    if masked:
        p = replace(p, key_mask=torch.rand(batch, length, device=device, generator=g) > 0.3)
    dout = torch.randn(*p.q.shape[:3], p.v.shape[3], device=device, generator=g).to(p.q.dtype)
    if not states:
        return p, dout, None
    shape = (p.num_states, heads, features)
    normal = lambda *s: torch.randn(*s, device=device, generator=g)
    initial = SketchState(10 * torch.rand(shape, device=device, generator=g), 10 * normal(*shape, p.v.shape[3]))
    return replace(p, initial=initial), dout, SketchState(0.1 * normal(*shape), 0.1 * normal(*shape, p.v.shape[3]))


def check_pipelines(
    p: AttentionInputs, dout: Tensor, dfinal: SketchState | None, most: float = 1e-2, *, need_planes: bool = False
) -> None:
    """The pipelines compute ``p`` and agree with the chunked pass in float64 to the rounding of their operands: gradients to
    ``most`` of their norms, where a norm counts as at least 1e-5 of the output gradient's (the gradient of a query that sees
    one token is 0)."""
    assert KernelCall(p, need_planes, (dout,)).plan.pipelined
    forward, gradients = both(p, dout, dfinal, need_planes=need_planes)
    right = chunked.forward(double(p))
    right_gradients = chunked.backward(
        double(p), right, dout.double(), None if dfinal is None else dfinal.to(torch.float64), need_planes=need_planes
    )
    least_norm = 1e-5 * float(dout.double().norm())
    found = {"out": relative_error(forward.out, right.out), "final": relative_error(forward.final.values, right.final.values)}
    for part in ("q", "k", "v", "beta", "log_decay", "planes"):
        mine, theirs = getattr(gradients, part), getattr(right_gradients, part)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            found[f"d{part}"] = relative_error(mine, theirs, least_norm)
    if dfinal is not None:
        for part in ("mass", "values"):
            if p.normalization == "global" or part == "values":
                found[f"dinitial.{part}"] = relative_error(
                    getattr(gradients.initial, part), getattr(right_gradients.initial, part), least_norm
                )
    assert max(found["out"], found["final"]) <= 4e-3, found
    assert found.pop("dbeta") <= 5e-2, found  # a sum over all tokens that nearly cancels
    assert max(found.values()) <= most, found
