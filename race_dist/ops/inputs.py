"""Inputs and results of the attention on one rank, as every backend takes and returns them.

:meth:`AttentionInputs.flatten` and :meth:`AttentionInputs.unflatten` are the one boundary to PyTorch: autograd functions,
custom operators and compiled graphs pass ``(*InputTensors, *InputOptions)`` and read saved tensors back with :func:`take`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from race_dist.sketch import SketchState

Normalization = Literal["global", "bucket", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("global", "bucket", "none")
BUCKET_EPS = 1e-6  # of the "bucket" normalization, as in the paper's released code

_Group = TypeVar("_Group")


class InputTensors(NamedTuple):
    """Tensors of :class:`AttentionInputs` in flattened order, which is also the order of their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial_mass: Tensor | None
    initial_values: Tensor | None


class InputOptions(NamedTuple):
    """Static options of :class:`AttentionInputs`; they follow the tensors in flattened order."""

    causal: bool
    normalization: Normalization


# the flattened inputs in the language of torch.library
INPUT_SCHEMA = (
    ", ".join(f"{'Tensor' if kind is Tensor else 'Tensor?'} {name}" for name, kind in get_type_hints(InputTensors).items())
    + ", bool causal, str normalization"
)


@dataclass(frozen=True)
class AttentionInputs:
    """Validated inputs of one attention call on one rank. Tensors may have any strides; keys and values are never expanded
    over query heads.

    Attributes:
        q: ``[B, T, Hq, D]``.
        k: ``[B, T, Hkv, D]``.
        v: ``[B, T, Hkv, Dv]``.
        planes: ``[Hkv, L, P, D]`` (stride 0 over heads that share them).
        beta: ``[Hkv]``, on the device, in the compute dtype.
        log_decay: ``[B, T, Hkv]`` or None, at most 0 (stride 0 over batch and tokens when constant).
        key_mask: ``[B, T]`` bool or None; masked (False) keys add nothing. race_attention has set their decay to 0.
        cu_seqlens: ``[N + 1]`` int64 on the device or None; with packed documents B = 1.
        initial: state before the first token, one row per batch row or document, without a total log decay; or None.
        causal: whether token i attends to tokens j <= i only.
        normalization: "global", "bucket" or "none".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor
    beta: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial: SketchState | None
    causal: bool
    normalization: Normalization

    def flatten(self) -> tuple[InputTensors, InputOptions]:
        """The tensors and the static options; :meth:`unflatten` is the inverse."""
        mass, values = (None, None) if self.initial is None else (self.initial.mass, self.initial.values)
        tensors = InputTensors(
            self.q, self.k, self.v, self.planes, self.beta, self.log_decay, self.key_mask, self.cu_seqlens, mass, values
        )
        return tensors, InputOptions(self.causal, self.normalization)

    @classmethod
    def unflatten(cls, tensors: InputTensors, options: InputOptions) -> AttentionInputs:
        """The inverse of :meth:`flatten`."""
        *fields, mass, values = tensors
        initial = None if mass is None or values is None else SketchState.unchecked(mass, values)
        inputs = object.__new__(cls)  # __init__ of a frozen dataclass takes several times as long
        vars(inputs).update(zip(cls.__match_args__, (*fields, initial, *options)))
        return inputs

    @property
    def features(self) -> int:
        """``S = L * 2**P``."""
        return self.planes.shape[1] * 2 ** self.planes.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 otherwise."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of returned states: the initial state's where there is one, the compute dtype otherwise."""
        return self.compute_dtype if self.initial is None else self.initial.mass.dtype

    @property
    def num_states(self) -> int:
        """Rows of the initial and final state: documents if packed, batch rows otherwise."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


def take(group: type[_Group], values: Iterator[Any]) -> _Group:
    """Read the next values as one named tuple."""
    return group._make(islice(values, len(group._fields)))  # type: ignore[attr-defined]


def split_arguments(arguments: Sequence[Any]) -> tuple[InputTensors, InputOptions, list[Any]]:
    """Split the arguments of an operator ``(*InputTensors, *InputOptions, *others)``."""
    values = iter(arguments)
    return take(InputTensors, values), take(InputOptions, values), list(values)


def differentiable(tensors: InputTensors, *, need_planes: bool, need_beta: bool = True) -> list[Tensor | None]:
    """The inputs that get a gradient, None for the others."""
    return list(
        tensors._replace(
            planes=tensors.planes if need_planes else None,  # type: ignore[arg-type]
            beta=tensors.beta if need_beta else None,  # type: ignore[arg-type]
            key_mask=None,
            cu_seqlens=None,
        )
    )


class ResultTensors(NamedTuple):
    """Tensors of :class:`ForwardResult` in flattened order."""

    out: Tensor
    den: Tensor
    states: Tensor
    final_mass: Tensor
    final_values: Tensor


class ForwardResult(NamedTuple):
    """Result of a forward pass, which the backward pass needs again.

    Attributes:
        out: ``[B, T, Hq, Dv]`` in q's dtype.
        den: ``[B, T, Hq]`` denominators in the compute dtype ("global" only, else empty).
        states: the backend's own saved states.
        final: the state after the last token of each row.
    """

    out: Tensor
    den: Tensor
    states: Tensor
    final: SketchState

    def flatten(self) -> ResultTensors:
        """The tensors; the total log decay of the final state is a function of the inputs (:func:`total_log_decay`)."""
        return ResultTensors(self.out, self.den, self.states, self.final.mass, self.final.values)

    @classmethod
    def unflatten(cls, tensors: ResultTensors) -> ForwardResult:
        """The inverse of :meth:`flatten`."""
        out, den, states, mass, values = tensors
        return cls(out, den, states, SketchState.unchecked(mass, values))


class Started(NamedTuple):
    """Result of the first phase of a pass, which needs nothing from other ranks.

    Attributes:
        state: the local sums that other ranks need: in the forward pass the final state, in the backward pass the gradient
            of the initial state.
        partial: the backend's partial results, for the second phase.
    """

    state: SketchState
    partial: Any


class GradBuffers(NamedTuple):
    """Tensors of any strides, shaped like q, k and v, that a backward pass writes their gradients to."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def empty_like(cls, inputs: AttentionInputs) -> GradBuffers:
        """Contiguous buffers."""
        return cls(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.q, inputs.k, inputs.v)))


class Gradients(NamedTuple):
    """Gradients of the inputs; None where none was asked for or the call has no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: Tensor | None
    beta: Tensor | None
    log_decay: Tensor | None
    initial: SketchState | None

    def flatten(self) -> tuple[Tensor | None, ...]:
        """The gradients in the order of :class:`InputTensors`."""
        mass, values = (None, None) if self.initial is None else (self.initial.mass, self.initial.values)
        return self.q, self.k, self.v, self.planes, self.beta, self.log_decay, None, None, mass, values


def den_floor(dtype: torch.dtype) -> float:
    """Below this denominator a row of the "global" normalization, and all its gradients, are 0."""
    return 2.0**-960 if dtype == torch.float64 else 2.0**-96


def total_log_decay(inputs: AttentionInputs) -> Tensor | None:
    """Sum of the log decays of each batch row or document, ``[B or N, Hkv]`` in the state dtype; differentiable."""
    if inputs.log_decay is None:
        return None
    log_decay = inputs.log_decay.to(inputs.state_dtype)
    if inputs.cu_seqlens is None:
        return log_decay.sum(1)
    total = log_decay.new_zeros(inputs.num_states, log_decay.shape[2])
    return total.index_add(0, document_ids(inputs.cu_seqlens, inputs.q.shape[1]), log_decay[0])


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """``[T]``: the document of each token."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)
