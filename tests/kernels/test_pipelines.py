"""The Hopper pipelines without a GPU: their numbers and their synchronization, emulated."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the pipelines are written in the Gluon of Triton 3.6")
if torch.cuda.is_available():
    pytest.skip("a GPU is present: tests/gpu runs the compiled kernels", allow_module_level=True)

from race_dist.kernels.plan import PIPELINED, Plan, Spec, make_plan
from race_dist.ops import device
from race_dist.ops import triton as backend
from race_dist.ops.triton import launch, plan
from tests.kernels.emulated import Deadlock, Hazard, emulated
from tests.kernels.flaws import FLAWS, square_kernel
from tests.kernels.problems import both, check_pipelines, drawn

MOST = 1.5e-2  # of gradients, as for the random problems on a GPU: few tokens, beside large states


def planned(spec: Spec, work: int, **options: object) -> Plan:
    """The plan of a GPU; kernels that are not pipelines run in Triton's interpreter, which has no TMA."""
    plan = make_plan(spec, work, **options)  # type: ignore[arg-type]
    return replace(
        plan,
        launches={
            name: launch if name in PIPELINED else replace(launch, spec=replace(launch.spec, tma=False))
            for name, launch in plan.launches.items()
        },
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend plans for a Hopper GPU of two SMs: tiles are then a few chunks long."""
    pipes = {name: emulated(kernel) for name, kernel in launch.hopper_kernels().items()}
    monkeypatch.setattr(plan, "make_plan", planned)
    monkeypatch.setattr(launch, "hopper_kernels", lambda: pipes)
    monkeypatch.setattr(device, "has_pipelines", lambda device: True)
    monkeypatch.setattr(device, "supports_tma", lambda *tensors: True)
    monkeypatch.setattr(device, "num_sms", lambda device: 2)
    monkeypatch.setattr(Spec, "min_block", 64)  # the blocks of a GPU, not of the interpreter
    backend.clear_plan_cache()


PROBLEMS: dict[str, dict[str, object]] = {
    "one token": {"length": 1, "batch": 2},
    "one chunk": {"length": 64},
    "ragged": {"length": 301, "states": True},
    "grouped": {"length": 161, "repeats": 3},
    "masked": {"length": 150, "masked": True, "dim": 64},
    "narrow values": {"length": 150, "value_dim": 72, "dim": 96},
    "many tables": {"length": 150, "tables": 32, "planes": 1, "decay": "token"},
    "many features": {"length": 150, "tables": 1, "planes": 8, "states": True},
    "many features, decay": {
        "length": 150,
        "tables": 2,
        "planes": 7,
        "decay": "token",
        "normalization": "none",
        "states": True,
    },
    "many features, documents": {
        "documents": [0, 64, 128, 150, 150, 210],
        "length": 210,
        "tables": 3,
        "planes": 5,
        "masked": True,
        "decay": "token",
    },
    "many features, one column block": {"length": 150, "tables": 1, "planes": 8, "value_dim": 64},
    "many features, narrow values": {"length": 150, "tables": 3, "planes": 5, "value_dim": 72, "states": True},
    "decay and a denominator": {"length": 300, "decay": "token", "states": True},
    "hard resets": {"length": 300, "decay": "hard", "normalization": "none", "repeats": 2},
    "documents": {"length": 300, "documents": [0, 70, 70, 150, 151, 300], "states": True},
    "not causal": {"length": 201, "causal": False, "masked": True},
    "not causal, grouped": {"length": 200, "causal": False, "repeats": 2, "documents": [0, 130, 200]},
    "a mean of 3": {"length": 1000, "mean": 3.0},
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", PROBLEMS)
def test_pipelines_agree_with_float64(name: str) -> None:
    check_pipelines(*drawn(device="cpu", **{"heads": 1, **PROBLEMS[name]}), MOST)  # type: ignore[arg-type]


PLANES: dict[str, dict[str, object]] = {
    "one block": {"length": 150, "states": True},
    "grouped, masked": {"length": 161, "repeats": 3, "masked": True},
    "not causal": {"length": 150, "causal": False, "repeats": 2, "value_dim": 72},
    "many features": {"length": 150, "tables": 1, "planes": 8, "decay": "token", "normalization": "none"},
    "many tables, documents": {"documents": [0, 64, 128, 150, 150, 210], "length": 210, "tables": 3, "planes": 5},
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("trained", [False, True], ids=["sampled", "trained"])
@pytest.mark.parametrize("name", PLANES)
def test_float32_planes_are_not_rounded(name: str, trained: bool) -> None:
    """Planes as ``sample_planes`` returns them by default, and trained ones, which get a gradient."""
    p, dout, dfinal = drawn(
        device="cpu",
        **{
            "heads": 1,
            "plane_dtype": torch.float32,
            "trained": trained,  # type: ignore[arg-type]
            **PLANES[name],
        },
    )
    check_pipelines(p, dout, dfinal, MOST, need_planes=trained)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("seed", range(12))
def test_random_problems_agree_with_float64(seed: int) -> None:
    g = random.Random(seed)
    length, packed = g.randint(65, 260), g.random() < 0.4
    tables, planes = g.choice([(4, 4), (2, 5), (1, 6), (3, 3), (5, 2), (16, 1), (1, 7), (5, 3)])
    many = tables * 2**planes > 64
    causal = many or g.random() < 0.8
    check_pipelines(
        *drawn(
            device="cpu",
            length=length,
            heads=g.randint(1, 2),
            batch=1 if packed else g.randint(1, 2),
            repeats=1 if many else g.randint(1, 3),
            dim=8 * g.randint(2, 16),
            value_dim=8 * g.randint(2, 16),
            tables=tables,
            planes=planes,
            causal=causal,
            normalization=g.choice(["global", "none"]),
            masked=g.random() < 0.3,
            decay=g.choice(["", "", "token", "hard"]) if causal else "",
            states=g.random() < 0.5,
            mean=g.choice([0.0, 1.0]),
            documents=[0, *sorted(g.randint(0, length) for _ in range(3)), length] if packed else None,
        ),
        MOST,
    )


@pytest.mark.usefixtures("hopper")
def test_results_do_not_depend_on_the_order_of_partitions() -> None:
    p, dout, dfinal = drawn(device="cpu", length=200, heads=1, states=True, decay="token")
    runs = []
    for seed in range(3):
        for pipe in launch.hopper_kernels().values():
            pipe.seed = 1000 * seed  # type: ignore[attr-defined]
        runs.append(both(p, dout, dfinal))
    for forward, gradients in runs[1:]:
        assert torch.equal(forward.out, runs[0][0].out)
        assert all(torch.equal(a, b) for a, b in zip(gradients[:3], runs[0][1][:3]))


@pytest.mark.parametrize("flaw", ["", *FLAWS])
def test_flaws_are_found(flaw: str) -> None:
    """The emulation itself: a correct pipeline passes, and each planted flaw is reported by name."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 64, 64).bfloat16(), torch.zeros(6, 64, 64, dtype=torch.bfloat16)
    launch = emulated(square_kernel)[(1,)]
    if not flaw:
        launch(x, y, 6, flaw)
        right = (x.float() @ x.float()).bfloat16()
        torch.testing.assert_close(y, right)
        return
    with pytest.raises((Hazard, Deadlock, IndexError), match=FLAWS[flaw]):
        launch(x, y, 6, flaw)
