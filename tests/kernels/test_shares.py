"""Gradients of rows out of the pipelines' shares, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from race_dist.kernels import shares
from race_dist.kernels.interpreter import INTERPRET
from race_dist.kernels.plan import Constants, Spec


@pytest.mark.skipif(not INTERPRET, reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("value_dim", [64, 72])
def test_shares_add_to_a_gradient(value_dim: int) -> None:
    spec = Spec(D=96, Dv=value_dim, L=3, P=5, G=1, C=64, SB=64, stages=1, causal=True, is_global=True, is_bucket=False,
                decay=False, masked=False, packed=False, f32=False, half=False, split_planes=False, bulk=True, pipe=True)
    assert (1 if value_dim == 64 else 2) == spec.NVB
    batch, length, heads, tile = 2, 300, 2, 128
    parts = torch.randn(batch, length, spec.NVB * heads, spec.LPB)
    planes = torch.randn(heads, 3, 5, spec.D).bfloat16()
    dx = torch.zeros(batch, length, heads, spec.D, dtype=torch.bfloat16)
    grid = (batch * -(-length // tile) * heads,)
    shares.unproject_shares[grid]((parts, *parts.stride()), (dx, *dx.stride()), (planes, *planes.stride()), None, length, tile,
                                  heads, Constants(spec))
    dz = parts.unflatten(2, (spec.NVB, heads)).double().sum(2)[..., :15]
    right = torch.einsum("bths,hsd->bthd", dz, planes.double().flatten(1, 2))
    assert float((dx.double() - right).norm() / right.norm()) <= 2**-7
