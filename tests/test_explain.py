"""Reports of ``explain_plan``, and one warning per slow kind of call."""

from __future__ import annotations

import warnings

import pytest
import torch

from race_dist import attention, explain_plan, race_attention, sample_planes
from race_dist.hashing import as_bfloat16
from race_dist.ops import explain


def tensors(heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 40, n, dim, dtype=dtype) for n in (heads, 2, 2))


def test_on_a_cpu_it_is_pytorch() -> None:
    plan = explain_plan(*tensors(), sample_planes(2, 3, 16, seed=0))
    assert (plan.backend, plan.family, plan.kernels) == ("chunked", "PyTorch chunks", ())
    assert "q is on cpu" in str(plan)


def test_bad_arguments_are_those_of_the_call() -> None:
    q, k, v = tensors()
    for call in (explain_plan, race_attention):
        with pytest.raises(ValueError, match="planes must be"):
            call(q, k, v, sample_planes(2, 3, 8, seed=0), 1.0)


PIPELINE = (
    "race_tile_sums_fwd_kernel",
    "race_scan_kernel",
    "race_hopper_fwd_kernel",
    "race_hopper_bwd_dq_kernel",
    "race_scan_kernel",
    "race_hopper_bwd_dkv_kernel",
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as on a Hopper GPU; nothing is run."""
    pytest.importorskip("triton")
    from race_dist.kernels.plan import Spec
    from race_dist.ops import device
    from race_dist.ops import triton as backend

    monkeypatch.setattr(device, "has_pipelines", lambda device: True)
    monkeypatch.setattr(device, "supports_tma", lambda *tensors: tensors[0].shape[3] % 8 == 0)
    monkeypatch.setattr(device, "num_sms", lambda device: 132)
    monkeypatch.setattr(backend, "unsupported", lambda inputs: None)
    monkeypatch.setattr(Spec, "min_block", 64)
    monkeypatch.setattr(explain, "_said", set())
    backend.clear_plan_cache()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "family", "words"),
    [
        ({}, "pipeline", "fastest"),
        ({"trained": True}, "pipeline", "race_unproject_kernel"),
        ({"dtype": torch.float32}, "chunk recurrence", "q, k and v are float32: give bfloat16"),
        ({"dtype": torch.float16}, "chunk recurrence", "q, k and v are float16: give bfloat16"),
        ({"normalization": "bucket"}, "materialized states", '"global" and "none" have pipelines'),
        ({"dim": 12}, "chunk recurrence", "make D and Dv multiples of 8"),
        ({"dim": 160}, "materialized states", "at most 128"),
        ({"hash": (1, 8)}, "pipeline", "race_tile_sums_bwd_kernel"),
        ({"hash": (1, 8), "heads": 4}, "materialized states", "grouped queries"),
        ({"hash": (1, 8), "causal": False}, "materialized states", "causal calls only"),
        ({"hash": (16, 4)}, "materialized states", "L * P = 64 planes: give at most 32"),
        ({"hash": (1, 9)}, "materialized states", "S = L * 2**P = 512 features: give at most 256"),
    ],
)
def test_each_family_says_why(change: dict[str, object], family: str, words: str) -> None:
    options = dict(change)
    dim = int(options.pop("dim", 64))  # type: ignore[call-overload]
    planes = sample_planes(*options.pop("hash", (4, 4)), dim, seed=0)  # type: ignore[misc]
    planes.requires_grad_(bool(options.pop("trained", False)))
    given = tensors(int(options.pop("heads", 2)), dim, options.pop("dtype", torch.bfloat16))  # type: ignore[call-overload, arg-type]
    plan = explain_plan(*given, planes, backend="triton", **options)  # type: ignore[arg-type]
    assert plan.family == family
    assert words in str(plan)
    if not change:
        assert plan.kernels == PIPELINE
        assert plan.reason is None


def test_a_slow_kind_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "_said", set())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        explain.warn_slow("it is slow: give bfloat16")
        explain.warn_slow("it is slow: give bfloat16")
        explain.warn_slow("it is slow: give at most 64")
    assert [str(w.message).split(". ")[0] for w in heard] == ["it is slow: give bfloat16", "it is slow: give at most 64"]
    assert all(w.category is explain.SlowKernelWarning for w in heard)


def test_sampled_planes_are_read_as_bfloat16() -> None:
    """Decided by the origin of the planes, not from their values; planes that may differ keep their dtype."""
    planes = sample_planes(2, 3, 16, seed=0)
    narrow = as_bfloat16(planes)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.float(), planes)
    assert as_bfloat16(narrow) is narrow
    trained = sample_planes(2, 3, 16, seed=0).requires_grad_()
    assert as_bfloat16(trained) is trained
    changed = sample_planes(2, 3, 16, num_heads=2, seed=0)
    changed[0] *= 1.001
    assert as_bfloat16(changed) is changed
    for other in (planes.clone(), planes[:1], torch.randn(2, 3, 16)):
        assert as_bfloat16(other) is other


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_kernels_get_the_planes_that_cost_least(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, expected: torch.dtype
) -> None:
    seen = []
    monkeypatch.setattr(attention, "single_rank_attention", lambda inputs, backend: seen.append(inputs) or (inputs.v, None))
    race_attention(*tensors(dtype=dtype), sample_planes(2, 3, 16, seed=0), 2.0)
    assert [problem.planes.dtype for problem in seen] == [expected]


def test_planes_are_sampled_in_inference_mode() -> None:
    """In inference mode, where PyTorch does not count changes of a tensor."""
    q, k, v = tensors(dtype=torch.bfloat16)
    expected = race_attention(q, k, v, sample_planes(2, 3, 16, seed=0), 2.0)
    with torch.inference_mode():
        planes = sample_planes(2, 3, 16, seed=0)
        assert torch.equal(race_attention(q, k, v, planes, 2.0), expected)
        planes.mul_(2)
        assert as_bfloat16(planes) is planes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_sampled_planes_changes_nothing(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    planes = sample_planes(2, 3, 16, num_heads=2, seed=0)
    outs = [race_attention(q, k, v, p, 2.0) for p in (planes, planes.clone(), planes.bfloat16())]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
