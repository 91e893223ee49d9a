"""The forward pass: tile sums, scan over the tiles, output."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from race_dist.kernels import decode
from race_dist.kernels.arguments import Sketch, rows, scalars
from race_dist.ops.inputs import AttentionInputs, ForwardResult, Started
from race_dist.ops.triton.launch import KernelCall, contiguous_sketch, layout_key, with_log_decay
from race_dist.ops.triton.plan import is_decoding, states_shape
from race_dist.sketch import SketchState

DECODE_WIDTH = 32  # value columns of a program


class _Partial(NamedTuple):
    """Partial results of :func:`start_forward`."""

    call: KernelCall
    out: Tensor
    sums: Tensor


def forward(inputs: AttentionInputs) -> ForwardResult:
    """Output, denominators, the states before each tile (causal) or the totals (not causal), and the final state."""
    out = _new_output(inputs)
    call = KernelCall(inputs, moved=(out,))
    if is_decoding(inputs):
        return _decode(call, out)
    return _read_out(call, out, call.key_sums())


def start_forward(inputs: AttentionInputs, out: Tensor | None = None) -> Started:
    """The final state, and the sums of each tile."""
    out = _new_output(inputs) if out is None else out
    call = KernelCall(inputs, moved=(out,))
    sums = call.key_sums()
    return Started(call.total(sums, inputs.initial, reverse=False), _Partial(call, out, sums))


def finish_forward(started: Started, initial: SketchState) -> ForwardResult:
    """The forward pass from the state that enters."""
    call, out, sums = started.partial
    call.inputs = replace(call.inputs, initial=initial)
    if is_decoding(call.inputs):
        return _decode(call, out)
    return _read_out(call, out, sums)


def _read_out(call: KernelCall, out: Tensor, sums: Tensor) -> ForwardResult:
    """The output from the states before each tile."""
    inputs = call.inputs
    states, final = call.prefix_states(sums)
    den = inputs.q.new_empty(inputs.q.shape[:3] if inputs.normalization == "global" else (0,), dtype=torch.float32)
    call.launch(
        "fwd",
        call.kernel("fwd"),
        call.kernel_inputs,
        rows(out),
        scalars(den),
        states,
        programs=call.plan["fwd"].spec.NVB,
    )
    if states.shape != call.signature.states_shape:  # TMA cannot load these rows, and the plan with TMA has other tiles
        states = states.new_empty(call.signature.states_shape)  # the backward pass computes its own
    return ForwardResult(out, den, states, final)


def _decode(call: KernelCall, out: Tensor) -> ForwardResult:
    """The forward pass of one token per row."""
    inputs = call.inputs
    batch, value_dim = inputs.q.shape[0], inputs.v.shape[3]
    den = inputs.q.new_empty(inputs.q.shape[:3] if inputs.normalization == "global" else (0,), dtype=torch.float32)
    initial, final = contiguous_sketch(inputs.initial), call.new_sketch()
    call.signature.run(
        ("decode", *map(layout_key, initial or ())),
        decode.race_decode_kernel,
        batch * call.heads * -(-value_dim // DECODE_WIDTH),
        call.kernel_inputs,
        rows(out),
        scalars(den),
        initial,
        Sketch(final.values, final.mass),
        call.heads,
        call.plan["tile_sums_fwd"].constants,
        DECODE_WIDTH,
        num_warps=4,
    )
    states = inputs.q.new_empty(states_shape(inputs), dtype=torch.float32)
    return ForwardResult(out, den, states, with_log_decay(final, inputs))


def _new_output(inputs: AttentionInputs) -> Tensor:
    """``[B, T, Hq, Dv]``."""
    return inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])
