"""Flattening of the inputs and results of the attention."""

from __future__ import annotations

import torch

from race_dist.ops import chunked
from race_dist.ops.inputs import (
    INPUT_SCHEMA,
    AttentionInputs,
    ForwardResult,
    InputTensors,
    differentiable,
    split_arguments,
    take,
)
from race_dist.parallel.attention import ContextParallelResult, SavedCall
from tests.ops.cases import draw


def test_flattened_inputs_are_read_back() -> None:
    for seed in range(20):
        inputs = draw(seed).inputs
        tensors, options = inputs.flatten()
        read, read_options, others = split_arguments([*tensors, *options, "chunked", True])
        assert others == ["chunked", True]
        again = AttentionInputs.unflatten(read, read_options)
        assert again.flatten()[1] == options
        assert all(a is b for a, b in zip(again.flatten()[0], tensors, strict=True))
        saved = differentiable(tensors, need_planes=False, need_beta=True)
        assert saved[InputTensors._fields.index("planes")] is None
        assert saved[InputTensors._fields.index("beta")] is inputs.beta


def test_the_schema_names_every_tensor_and_option() -> None:
    names = [argument.split()[1] for argument in INPUT_SCHEMA.split(", ")]
    assert names == [*InputTensors._fields, "causal", "normalization"]


def test_gradients_are_flattened_in_the_order_of_the_inputs() -> None:
    case = next(c for c in map(draw, range(100)) if c.inputs.initial is not None and c.inputs.log_decay is not None)
    result = chunked.forward(case.inputs)
    gradients = chunked.backward(case.inputs, result, case.dout, case.dfinal, need_planes=True)
    flat = take(InputTensors, iter(gradients.flatten()))
    for gradient, x in zip(flat, differentiable(case.inputs.flatten()[0], need_planes=True), strict=True):
        assert (gradient is None) == (x is None)
        assert gradient is None or x is None or gradient.shape == x.shape


def test_saved_calls_are_read_back() -> None:
    case = next(c for c in map(draw, range(100)) if c.inputs.initial is not None)
    result = chunked.forward(case.inputs)
    assert case.inputs.initial is not None
    saved = [SavedCall.flatten(result, case.inputs.initial).copy_states() for _ in range(3)]
    final = (torch.ones(1), torch.zeros(1))
    flat = ContextParallelResult(result.out, final, saved).flatten()
    again = ContextParallelResult.unflatten(flat, num_final=2)
    assert again.final == final
    assert len(again.saved) == 3
    local, initial = again.saved[1].unflatten(again.out)
    assert isinstance(local, ForwardResult)
    assert local.states is result.states
    assert torch.equal(local.final.values, result.final.values)
    assert torch.equal(initial.mass, case.inputs.initial.mass)
