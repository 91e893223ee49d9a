"""Backends of the attention on one rank: their protocol, and the choice of one per call."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from race_dist import checks
from race_dist.ops.explain import warn_slow
from race_dist.ops.inputs import AttentionInputs, ForwardResult, GradBuffers, Gradients, Started
from race_dist.sketch import SketchState

BackendName = Literal["auto", "reference", "chunked", "triton"]
BACKEND_NAMES: tuple[BackendName, ...] = ("auto", "reference", "chunked", "triton")
HAS_TRITON = find_spec("triton") is not None
MODULES = {"chunked": "race_dist.ops.chunked", "triton": "race_dist.ops.triton"}


class Backend(Protocol):
    """Functions of a backend module; docs/architecture.md states the contract.

    One rank calls :meth:`forward` and :meth:`backward`. Context parallelism calls each pass in two phases and exchanges states
    between them: start (local sums, without the state that enters from other ranks), then finish (with that state).
    """

    def forward(self, inputs: AttentionInputs) -> ForwardResult: ...

    def backward(
        self,
        inputs: AttentionInputs,
        saved: ForwardResult,
        dout: Tensor,
        dfinal: SketchState | None,
        *,
        need_planes: bool,
        need_beta: bool = True,
    ) -> Gradients: ...

    def start_forward(self, inputs: AttentionInputs, out: Tensor | None = None) -> Started:
        """Sum up the local keys and values; ``out`` is the buffer of the output."""
        ...

    def finish_forward(self, started: Started, initial: SketchState) -> ForwardResult:
        """The forward pass from the state ``initial`` that enters the local tokens."""
        ...

    def start_backward(
        self,
        inputs: AttentionInputs,
        saved: ForwardResult,
        dout: Tensor,
        *,
        need_planes: bool,
        grad_buffers: GradBuffers | None = None,
    ) -> Started:
        """The gradient of the initial state as far as the local outputs determine it (``dfinal = 0``)."""
        ...

    def finish_backward(self, started: Started, dfinal: SketchState) -> Gradients:
        """All gradients, from the gradient ``dfinal`` of the local final state."""
        ...

    def states_shape(self, inputs: AttentionInputs) -> tuple[int, ...]:
        """Shape of ``ForwardResult.states`` (in the compute dtype), from shapes alone."""
        ...

    def unsupported(self, inputs: AttentionInputs) -> str | None:
        """Why this backend cannot compute ``inputs``, as the end of a sentence; None when it can."""
        ...


@cache
def get_backend(name: str) -> Backend:
    """Import the module of a backend.

    Raises:
        ImportError: "triton" without the package installed.
    """
    try:
        return cast(Backend, import_module(MODULES[name]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise ImportError(
            'backend="triton" needs the triton package: pip install "race-dist[triton]", or use backend="chunked"'
        ) from error


def check_backend(backend: object) -> None:
    """Raise ValueError unless ``backend`` names one."""
    if not isinstance(backend, str) or backend not in BACKEND_NAMES:
        raise ValueError(f'backend must be "auto", "reference", "chunked" or "triton"; got {checks.short_repr(backend)}')


class SelectedBackend(NamedTuple):
    """A backend, and where "auto" did not select the Triton kernels, why."""

    name: str
    reason: str | None = None


def select_backend(inputs: AttentionInputs, backend: str) -> SelectedBackend:
    """Resolve "auto", and refuse a backend that cannot compute ``inputs``.

    Raises:
        ValueError: backend="triton" does not support the inputs.
    """
    if backend in ("reference", "chunked"):
        return SelectedBackend(backend)
    reason: str | None = "needs triton and a CUDA device"
    if backend == "triton" or (inputs.q.is_cuda and HAS_TRITON):
        reason = _unsupported(inputs, "triton")
    if reason is None:
        return SelectedBackend("triton")
    if backend == "triton":
        raise ValueError(f'backend="triton" {reason}; use backend="chunked"')
    if inputs.q.is_cuda and inputs.q.dtype != torch.float64 and not torch.compiler.is_compiling():
        warn_slow(f'race_attention runs in PyTorch, without GPU kernels: backend="triton" {reason}')
    return SelectedBackend("chunked", reason)


def _unsupported(inputs: AttentionInputs, backend: str) -> str | None:
    """Why a backend cannot compute ``inputs``, as the end of a sentence; None when it can. Traceable by torch.compile."""
    if not torch.compiler.is_compiling():
        return get_backend(backend).unsupported(inputs)
    tables, planes = inputs.planes.shape[1:3]
    return _unsupported_constant(backend, inputs.q.device, inputs.q.dtype, inputs.q.shape[3], inputs.v.shape[3], tables, planes)


@torch.compiler.assume_constant_result
def _unsupported_constant(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, tables: int, planes: int
) -> str | None:
    """:func:`_unsupported` of inputs like these; a compiler can neither import a backend nor trace its checks."""
    empty = lambda *shape: torch.empty(shape, device=device, dtype=dtype)
    inputs = AttentionInputs(
        q=empty(1, 0, 1, head_dim),
        k=empty(1, 0, 1, head_dim),
        v=empty(1, 0, 1, value_dim),
        planes=empty(1, tables, planes, head_dim),
        beta=empty(1),
        log_decay=None,
        key_mask=None,
        cu_seqlens=None,
        initial=None,
        causal=True,
        normalization="global",
    )
    return get_backend(backend).unsupported(inputs)
