"""Gradients of rows from the pipelines' partial gradients, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from race_dist.kernels import partial_gradients
from race_dist.kernels.arguments import Planes, Tiling, rows
from race_dist.kernels.interpreter import INTERPRET
from race_dist.kernels.plan import Constants, Spec


@pytest.mark.skipif(not INTERPRET, reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize(("value_dim", "tables", "group"), [(64, 3, 1), (72, 3, 1), (72, 1, 2)])
def test_partial_gradients_add_to_a_gradient(value_dim: int, tables: int, group: int) -> None:
    spec = Spec(
        D=96,
        Dv=value_dim,
        L=tables,
        P=5,
        G=group,
        C=64,
        SB=64,
        stages=1,
        causal=True,
        is_global=True,
        is_bucket=False,
        decay=False,
        masked=False,
        packed=False,
        fp32=False,
        fp16=False,
        split_planes=True,
        tma=True,
        pipelined=True,
        need_planes=True,
    )
    assert (1 if value_dim == 64 or tables == 1 else 2) == spec.NVB
    batch, length, heads, tile, slots = 2, 300, 2, 128, 5 * tables
    parts = torch.randn(batch, length, spec.NVB * heads * group, spec.LPB)
    planes = torch.randn(heads, tables, 5, spec.D)
    x = torch.randn(batch, length, heads * group, spec.D).bfloat16()
    dx = torch.full_like(x, torch.nan)
    tiles = batch * -(-length // tile)
    dplanes = torch.full((tiles, heads, group, spec.LPB, spec.BD), torch.nan)
    strided = rows(parts), rows(dx), rows(x), Planes(planes, *planes.stride())
    partial_gradients.race_unproject_kernel[(tiles * heads * group,)](
        *strided, dplanes, group, Tiling(None, length, tile, heads), Constants(spec)
    )
    dz = parts.unflatten(2, (spec.NVB, heads, group)).double().sum(2)[..., :slots]
    right = torch.einsum("bthgs,hsd->bthgd", dz, planes.double().flatten(1, 2)).flatten(2, 3)
    assert float((dx.double() - right).norm() / right.norm()) <= 2**-7
    right = torch.einsum("bthgs,bthgd->hsd", dz, x.double().unflatten(2, (heads, group)))
    found = dplanes.double().sum((0, 2))[:, :slots, : spec.D]
    assert float((found - right).norm() / right.norm()) <= 2**-7
