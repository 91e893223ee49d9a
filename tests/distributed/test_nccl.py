"""The tests of scan, attention and models over NCCL: two devices compared with one rank on the CPU, in float64."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
import torch
import torch.distributed as dist
from harness import spawn_ranks
from test_context_parallel_attention import Case, attend, check_results, edge_cases, make, random_case

from race_dist import SketchState, race_attention
from race_dist.parallel import count_bytes, exclusive_scan, unshard_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def on_devices(group, cases: list[dict]) -> list[dict[str, torch.Tensor]]:
    rank, results = dist.get_rank(group), []
    for case in (Case(**each) for each in cases):
        x = make(case)
        for name in (f.name for f in fields(x)):
            value = getattr(x, name)
            if isinstance(value, torch.Tensor | SketchState):
                setattr(x, name, value.to("cuda"))
        weights = [w.cuda() for w in x.final_weights[rank]]
        got = attend(case, x, case.rows(rank).cuda(), group, weights)
        results.append({name: t.cpu() for name, t in got.items()})
    return results


def test_calls_over_nccl() -> None:
    cases = [random_case(2, seed) for seed in range(60)] + edge_cases(2)
    outcomes = spawn_ranks(2, on_devices, [asdict(case) for case in cases], timeout=120.0, cuda=True)
    assert [o.error for o in outcomes] == [None, None]
    check_results(cases, [o.value for o in outcomes])


def half_precision(group):
    """bfloat16 with the backend of "auto", compared with one device."""
    rank, total = dist.get_rank(group), 8192
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, total, 4, 64, device="cuda", generator=generator).bfloat16() for _ in range(3))
    planes = torch.randn(4, 4, 64, device="cuda", generator=generator).bfloat16().float() / 8
    results = []
    for shared in (False, True):
        part = slice(rank * total // 2, (rank + 1) * total // 2) if shared else slice(None)
        leaves = [t[:, part].clone().requires_grad_() for t in (q, k, v)]
        with count_bytes() as count:
            out, final = race_attention(*leaves, planes, 2.0, group=group if shared else None, output_final_state=True)
            (out.float().square().sum() + final.values.sum() / (2 if shared else 1)).backward()
        rows = slice(None) if shared else slice(rank * total // 2, (rank + 1) * total // 2)
        results.append([final.mass, final.values, *(t[:, rows].float() for t in (out, *(leaf.grad for leaf in leaves)))])
    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(*results)]
    return errors, count.bytes


def test_half_precision_over_nccl() -> None:
    for outcome in spawn_ranks(2, half_precision, timeout=120.0, cuda=True):
        assert outcome.error is None, outcome.error
        errors, _ = outcome.value
        assert max(errors) < 2e-2, errors


def scans(group):
    rank = dist.get_rank(group)
    results = []
    for algorithm in ("all_gather", "recursive_doubling"):
        mass = torch.full((1, 2, 4), rank + 1.0, device="cuda", requires_grad=True)
        carry = SketchState(mass, torch.ones(1, 2, 4, 3, device="cuda"))
        initial = exclusive_scan(carry, group, algorithm=algorithm)
        initial.mass.sum().backward()
        results.append((initial.mass.mean().item(), mass.grad.mean().item()))
    shard = torch.full((2 - rank, 3), float(rank), device="cuda", requires_grad=True)
    whole = unshard_sequence(shard, group, dim=0)
    whole.sum().backward()
    return results, whole[:, 0].tolist(), shard.grad.mean().item()


def test_scans_over_nccl() -> None:
    for rank, outcome in enumerate(spawn_ranks(2, scans, timeout=120.0, cuda=True)):
        assert outcome.error is None, outcome.error
        results, whole, grad = outcome.value
        assert results == [(float(rank), 1.0 - rank)] * 2
        assert whole == [0.0, 0.0, 1.0]
        assert grad == 2.0


def streamed(group):
    """A streamed step, eager and compiled, compared with one device: relative errors, and the number of graphs."""
    from torch._dynamo.utils import counters

    from race_dist import RaceConfig
    from race_dist.models import DecoderLM, ModelConfig
    from race_dist.streaming import streamed_backward

    config = ModelConfig(vocab_size=256, dim=256, num_layers=2, num_heads=2, layer_pattern="R", race=RaceConfig())
    ids, labels = torch.randint(0, 256, (2, 1, 16384), generator=torch.Generator().manual_seed(0))

    def gradient(shared: bool, compiled: bool, narrow: bool = True) -> torch.Tensor:
        net = DecoderLM(config).cuda()
        if compiled:
            for block in net.blocks:
                block.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            streamed_backward(net, ids, labels, chunk_size=2048 if shared else 4096, group=group if shared else None)
        return torch.cat([p.grad.flatten() for p in net.parameters()]).double()

    error = lambda a, b: float((a - b).norm() / b.norm())
    one = gradient(False, False)
    noise = error(one, gradient(False, False, narrow=False))
    counters.clear()
    errors = error(gradient(True, False), one), error(gradient(True, True), one)
    return errors, noise, counters["stats"]["unique_graphs"]


def test_a_streamed_step_over_nccl() -> None:
    for outcome in spawn_ranks(2, streamed, timeout=240.0, cuda=True):
        assert outcome.error is None, outcome.error
        errors, noise, graphs = outcome.value
        assert max(errors) <= 2 * noise
        assert graphs == 1
