"""The public call on a GPU: registration, torch.compile, activation checkpointing, autocast, FSDP2."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from race_dist.attention import race_attention
from race_dist.hashing import sample_planes
from race_dist.nn import RaceAttention, RaceConfig
from tests.ops.cases import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(length: int = 200, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(1, length, 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    return leaves, sample_planes(4, 4, 64, seed=0, device="cuda", dtype=dtype)


@pytest.mark.parametrize("normalization", ["global", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_custom_op_passes_opcheck_on_cuda(dtype: torch.dtype, normalization: str) -> None:
    (q, k, v), planes = inputs(dtype=dtype)
    beta = torch.full((2,), 2.0, device="cuda")
    arguments = (q, k, v, planes.expand(2, -1, -1, -1), beta, None, None, None, None, None, True, normalization, "triton")
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32:  # run eagerly, its gradient of a sum has rows of stride 0: bfloat16 then takes other kernels
        utilities.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.race_dist.attention.default, arguments, test_utils=utilities, rtol=1e-4, atol=1e-4)


def test_torch_compile_makes_one_graph() -> None:
    leaves, planes = inputs()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, final = race_attention(q, k, v, planes, 2.0, output_final_state=True)
        return out.float().square().sum() + final.values.sum()

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True)
    for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), wanted):
        assert relative_error(got, right) <= 1e-2  # the compiler fuses the loss: dout rounds elsewhere


def test_checkpointing_recomputes_the_same() -> None:
    leaves, planes = inputs()
    call = lambda q, k, v: race_attention(q, k, v, planes, 2.0)
    plain = torch.autograd.grad(call(*leaves).float().square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False).float().square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_autocast_runs_the_bfloat16_kernels() -> None:
    leaves, planes = inputs(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = race_attention(*leaves, planes, 2.0)
    assert out.dtype == torch.bfloat16
    exact = race_attention(*(x.detach().double() for x in leaves), planes.double(), 2.0, backend="chunked")
    assert relative_error(out.detach(), exact) <= 1e-2  # q, k and v themselves round: 2**-9 each, through the hash


def test_fully_sharded_parameters_give_the_same_gradients() -> None:
    """FSDP2 over a group of one rank: its hooks, casts and unsharding around the layer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = RaceAttention(RaceConfig(dim=128, num_heads=2, head_dim=64)).cuda().to(torch.bfloat16)
    x = torch.randn(1, 300, 128, device="cuda", dtype=torch.bfloat16)
    layer(x)[0].float().square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        fully_shard(layer)
        layer(x)[0].float().square().sum().backward()
        for name, parameter in layer.named_parameters():
            if name in wanted:
                assert relative_error(parameter.grad.to_local(), wanted[name]) <= 1e-6, name  # type: ignore[union-attr]
    finally:
        torch.distributed.destroy_process_group()
