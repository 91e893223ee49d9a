"""Context-parallel attention against one rank: output, final state and every gradient, to 1e-9 in float64."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankError, run_ranks
from torch import Tensor

from race_dist import SketchState, race_attention
from race_dist.distributed.communication import count_bytes
from race_dist.parallel.attention import context_parallel_attention
from race_dist.parallel.sharding import shard_lengths, shard_rows

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """One call. ``lengths``: rows of each rank (contiguous); ``documents``: lengths of packed documents."""

    world: int
    lengths: tuple[int, ...]
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    batch: int = 1
    heads: tuple[int, int] = (4, 2)
    causal: bool = True
    normalization: str = "global"
    decay: str = "none"
    masked: bool = False
    initial: bool = False
    final: bool = False
    beta: float = 1.3
    strided: bool = False
    algorithm: str = "auto"
    seed: int = 0

    def rows(self, rank: int) -> Tensor:
        if self.layout == "zigzag":
            return shard_rows(sum(self.lengths), rank, self.world, layout="zigzag", cu_seqlens=self.cu_seqlens())
        return torch.arange(sum(self.lengths)).split(list(self.lengths))[rank]

    def cu_seqlens(self) -> Tensor | None:
        return None if self.documents is None else torch.tensor([0, *self.documents]).cumsum(0)


@dataclass
class Inputs:
    """Tensors of the whole sequence, and the weights of the loss."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None
    initial: SketchState | None
    out_weight: Tensor
    final_weights: list[list[Tensor]] = field(default_factory=list)


def make(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    total, batch, (hq, hkv), dim, dv, tables, number = sum(case.lengths), case.batch, case.heads, 3, 2, 2, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = batch if case.documents is None else len(case.documents)
    features = tables * 2**number
    decay = {"none": None, "head": -draw(hkv).abs() / 4, "token": -draw(batch, total, hkv).abs() / 4}[case.decay]
    mask = torch.rand(batch, total, generator=generator) > 0.3 if case.masked else None
    initial = SketchState(draw(rows, hkv, features).abs(), draw(rows, hkv, features, dv)) if case.initial else None
    weights = [[draw(rows, hkv, features), draw(rows, hkv, features, dv), draw(rows, hkv)] for _ in range(case.world)]
    return Inputs(
        draw(batch, total, hq, dim),
        draw(batch, total, hkv, dim),
        draw(batch, total, hkv, dv) + 1.0,
        draw(hkv, tables, number, dim),
        torch.full((hkv,), case.beta, dtype=torch.float64),
        decay,
        mask,
        initial,
        draw(batch, total, hq, dv),
        weights,
    )


def attend(case: Case, x: Inputs, rows: Tensor, group, weights: list[Tensor]) -> dict[str, Tensor]:
    """Forward and backward of some rows of the sequence; results and gradients by name."""

    def take(t: Tensor) -> Tensor:
        part = t[:, rows]
        if case.strided:  # [T, B, H, D] seen as [B, T, H, D]
            part = part.transpose(0, 1).contiguous().transpose(0, 1)
        return part.requires_grad_(t.is_floating_point())

    leaves = {
        "q": take(x.q),
        "k": take(x.k),
        "v": take(x.v),
        "planes": x.planes.clone().requires_grad_(),
        "beta": x.beta.clone().requires_grad_(),
    }
    decay, initial = x.log_decay, x.initial
    if case.decay == "token":
        decay = leaves["log_decay"] = take(x.log_decay)
    if initial is not None:
        leaves["initial_mass"], leaves["initial_values"] = (t.clone().requires_grad_() for t in initial.tensors())
        initial = SketchState(leaves["initial_mass"], leaves["initial_values"])
    cu_seqlens = None if case.documents is None else case.cu_seqlens().to(rows.device)
    options = {"backend": "reference"} if group is None else {"group": group, "layout": case.layout}
    if group is not None and case.algorithm != "auto":
        options["attend"] = partial(context_parallel_attention, algorithm=case.algorithm)
    result = through(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["planes"],
        leaves["beta"],
        causal=case.causal,
        normalization=case.normalization,
        cu_seqlens=cu_seqlens,
        log_decay=decay,
        key_mask=None if x.key_mask is None else take(x.key_mask),
        initial_state=initial,
        output_final_state=case.final,
        **options,
    )
    out, final = result if case.final else (result, None)
    loss = (out * x.out_weight[:, rows]).sum()
    got = {"out": out.detach()}
    if final is not None:
        names = ("final_mass", "final_values", "final_log_decay")
        loss = loss + sum((t * w).sum() for t, w in zip(final.tensors(), weights))
        got |= {name: t.detach() for name, t in zip(names, final.tensors())}
    loss.backward()
    return got | {"d" + name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def through(*args, attend=None, **kwargs):
    """race_attention, optionally with another context-parallel attention."""
    if attend is None:
        return race_attention(*args, **kwargs)
    with mock.patch("race_dist.parallel.attention.context_parallel_attention", attend):
        return race_attention(*args, **kwargs)


def on_ranks(group, cases: list[dict]) -> list[dict[str, Tensor]]:
    rank, results = dist.get_rank(group), []
    for case in (Case(**each) for each in cases):
        x = make(case)
        results.append(attend(case, x, case.rows(rank), group, x.final_weights[rank]))
    return results


BY_ROW = ("out", "dq", "dk", "dv", "dlog_decay")


def check(cases: list[Case]) -> None:
    """Run the cases (all of one world) and compare."""
    world = cases[0].world
    check_results(cases, run_ranks(world, on_ranks, [asdict(case) for case in cases]))


def check_results(cases: list[Case], per_rank: list[list[dict[str, Tensor]]]) -> None:
    """Compare the results of all ranks in each case with the reference on one rank."""
    for case, results in zip(cases, zip(*per_rank)):
        x = make(case)
        weights = [sum(parts) for parts in zip(*x.final_weights)]
        expected = attend(case, x, torch.arange(sum(case.lengths)), None, weights)
        for name, want in expected.items():
            parts = [result[name] for result in results]
            if name in BY_ROW:
                got = torch.empty_like(want)
                for rank, part in enumerate(parts):
                    got[:, case.rows(rank)] = part
                compare(case, name, got, want)
            elif name.startswith("final"):
                for part in parts:
                    compare(case, name, part, want)
            else:
                compare(case, name, sum(parts), want)


def compare(case: Case, name: str, got: Tensor, want: Tensor) -> None:
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE, f"{name} is off by {error:.1e} in {case}"


def random_case(world: int, seed: int) -> Case:
    pick = random.Random(1000 * world + seed)
    layout = pick.choice(["contiguous", "zigzag"])
    packed, causal = pick.random() < 0.5, pick.random() < 0.75
    unit = 2 * world if layout == "zigzag" else 1
    documents = None
    if packed:
        sizes = [0, 1, 1, 2, 3] if unit > 1 else [0, 1, 2, 5, 9]
        documents = tuple(unit * pick.choice(sizes) for _ in range(pick.randint(1, 5)))
        documents = documents if sum(documents) else (unit, *documents)
        total = sum(documents)
    else:
        total = unit * pick.randint(1, 4 if unit > 1 else 24)
    if layout == "zigzag" or pick.random() < 0.4:
        lengths = tuple(shard_lengths(total, world))
    else:
        edges = sorted(pick.randint(0, total) for _ in range(world - 1))
        lengths = tuple(b - a for a, b in zip([0, *edges], [*edges, total]))
    return Case(
        world,
        lengths,
        layout,
        documents,
        1 if packed else pick.choice([1, 2]),
        pick.choice([(1, 1), (2, 2), (4, 2), (2, 1), (3, 3), (6, 3)]),
        causal,
        pick.choice(["global", "bucket", "none" if causal else "global"]),
        pick.choice(["none", "head", "token"]) if causal else "none",
        pick.random() < 0.3,
        pick.random() < 0.5,
        pick.random() < 0.5,
        pick.choice([0.5, 1.3, 3.0]),
        pick.random() < 0.3,
        pick.choice(["all_gather", "recursive_doubling"]),
        seed,
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_random_calls(world: int) -> None:
    check([random_case(world, seed) for seed in range(40)])


def edge_cases(world: int) -> list[Case]:
    """Boundaries at the edges of shards, documents longer than a shard, empty documents and shards."""
    every = {"initial": True, "final": True, "algorithm": "recursive_doubling"}
    cases = []
    for causal, normalization, decay in [
        (True, "global", "none"),
        (True, "none", "token"),
        (True, "bucket", "head"),
        (False, "global", "none"),
        (False, "bucket", "none"),
    ]:
        rest = {"causal": causal, "normalization": normalization, "decay": decay, **every}
        three = (3,) * world
        cases += [
            Case(world, three, documents=three, **rest),  # each shard one document
            Case(world, three, documents=(3 * world,), **rest),  # one document over all
            Case(world, three, documents=(0, 3 * world, 0), **rest),
            Case(world, three, documents=(1,) * (3 * world), **rest),
            Case(world, three, documents=(0, 3, 0, 0, 3 * (world - 1) - 1, 1, 0), **rest),
            Case(world, (*(0,) * (world - 1), 7), documents=(4, 3), **rest),  # all rows on the last rank
            Case(world, (7, *(0,) * (world - 1)), documents=(4, 3), **rest),  # all rows on the first
            Case(world, (7, *(0,) * (world - 1)), **rest),
            Case(world, (*(0,) * (world - 1), 7), batch=2, **rest),
            Case(world, (0,) * world, **rest),
            Case(world, (0,) * world, documents=(0, 0), **rest),
            Case(world, (0,) * world, "zigzag", **rest),
            Case(world, (4,) * world, "zigzag", documents=(2 * world, 0, 2 * world), **rest),
        ]
    return cases


@pytest.mark.parametrize("world", [2, 4])
def test_edges(world: int) -> None:
    check(edge_cases(world))


def test_many_tokens_decay_and_underflow() -> None:
    lengths = (150, 90, 0)
    check(
        [
            Case(3, lengths, documents=(20, 150, 70), decay="token", normalization="none", final=True),
            Case(3, lengths, beta=20.0, final=True),  # features underflow
            Case(3, (96,) * 3, "zigzag", batch=2, strided=True, decay="head", final=True),
        ]
    )


def half_precision(group, dtype, layout):
    x = make(Case(dist.get_world_size(group), (12,) * dist.get_world_size(group), layout))
    rows = Case(dist.get_world_size(group), (12,) * dist.get_world_size(group), layout).rows(dist.get_rank(group))
    q, k, v = (t[:, rows].to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    out, final = race_attention(q, k, v, x.planes.bfloat16().float(), 1.0, group=group, layout=layout, output_final_state=True)
    out.float().square().sum().backward()
    return out.detach(), final, q.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_float32(dtype: torch.dtype) -> None:
    for layout in ("contiguous", "zigzag"):
        case = Case(2, (12, 12), layout)
        x = make(case)
        q, k, v = (t.to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
        want = race_attention(q, k, v, x.planes.bfloat16().float(), 1.0)
        want.float().square().sum().backward()
        for rank, (out, final, grad) in enumerate(run_ranks(2, half_precision, dtype, layout)):
            assert final.mass.dtype == torch.float32
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(out, want[:, case.rows(rank)], **tolerance)
            torch.testing.assert_close(grad, q.grad[:, case.rows(rank)], **tolerance)


def bytes_of(group, total, layout, causal, documents, final):
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, total // world, 2, 4, generator=generator, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, total // 2, total]) if documents else None
    planes = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    with count_bytes() as count:
        result = race_attention(
            q, k, v, planes, 1.0, causal=causal, group=group, layout=layout, cu_seqlens=cu, output_final_state=final
        )
        (result[0] if final else result).sum().backward()
    return count


@pytest.mark.parametrize(
    ("layout", "causal", "documents"),
    [("contiguous", True, False), ("zigzag", True, False), ("contiguous", True, True), ("contiguous", False, False)],
)
def test_bytes_do_not_depend_on_the_length(layout: str, causal: bool, documents: bool) -> None:
    short, long = (run_ranks(2, bytes_of, total, layout, causal, documents, False) for total in (4096, 262144))
    assert short == long
    assert short[0].bytes > 0


def mismatch(group, what):
    odd = dist.get_rank(group) == 2
    q = torch.randn(1, 6, 2, 4, dtype=torch.float32)
    options = {
        "layout": "zigzag" if odd and what == "layout" else "contiguous",
        "normalization": "none" if odd and what == "normalization" else "global",
        "cu_seqlens": torch.tensor([0, 5, 18] if odd else [0, 4, 18]) if what == "documents" else None,
    }
    if what == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 6])
    if what == "odd":
        q, options["layout"] = q[:, :5], "zigzag"
    if what == "unequal":
        q, options["layout"] = q[:, : 4 if odd else 6], "zigzag"
    race_attention(q, q, q, torch.ones(1, 1, 4), 1.0, group=group, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layout", "layout is contiguous on ranks 0, 1, but zigzag on rank 2"),
        ("normalization", "normalization is global on ranks 0, 1, but none on rank 2"),
        ("documents", r"documents is 2 \(digest \w+\) on ranks 0, 1, but 2 \(digest \w+\) on rank 2"),
        ("cu_seqlens", r"it ends at 6, but the ranks hold \[6, 6, 6\], together 18 rows"),
        ("odd", "15 rows do not divide by 6"),
        ("unequal", r"zigzag shards must have equal lengths; the ranks hold \[6, 6, 4\] rows"),
    ],
)
def test_calls_that_do_not_fit_name_the_rank(what: str, message: str) -> None:
    with pytest.raises(RankError, match=message) as error:
        run_ranks(3, mismatch, what)
    assert all("ValueError" in e for e in error.value.errors)
