"""Softmax attention over many ranks as baselines: Ulysses (all-to-all of heads for tokens) and ring attention.

Both are exact and causal, and use PyTorch's flash attention for the local work. Ring attention uses zigzag shards, so that
every rank has the same work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from race_dist.distributed.communication import group_rank, group_size, start_all_to_all, start_shift

Block = tuple[Tensor, Tensor, tuple[Any, ...]]  # output, log-sum-exp, further tensors for the backward pass


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Block:
    """Attention of ``[B, H, T, D]``: output, ``[B, H, T]`` float32 log-sum-exp, and further tensors for the backward pass."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, ()
    out, lse, *block_state = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, lse, tuple(block_state[:6])


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_state: tuple[Any, ...], *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the output and log-sum-exp of all blocks."""
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(dout, q, k, v, out, lse, 0.0, causal)
    cum_q, cum_k, max_q, max_k, seed, offset = block_state
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return op(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset)


class _AllToAll(torch.autograd.Function):
    """``[W, ...]``: row d goes to rank d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return start_all_to_all(x, group).wait()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return start_all_to_all(dx, ctx.group).wait(), None


def ulysses(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
    """Attention over contiguous shards ``[B, T/W, H, D]``; the number of heads is a multiple of the ranks."""
    world = group_size(group)

    def to_heads(x: Tensor) -> Tensor:
        parts = x.unflatten(2, (world, -1)).movedim(2, 0)  # [W, B, t, H/W, D]
        return _AllToAll.apply(parts, group).movedim(0, 1).flatten(1, 2)

    q, k, v = (to_heads(x).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    parts = out.unflatten(1, (world, -1)).movedim(1, 0)  # [W, B, t, H/W, D]
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


def ring(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
    """Attention over zigzag shards ``[B, T/W, H, D]``: keys and values are passed around the ring of ranks."""
    return _Ring.apply(q, k, v, group)


class _Ring(torch.autograd.Function):
    """Rank r holds slices r and 2W-1-r. All queries see the first slice of rank s < r; the later half of the
    queries sees both slices of rank s > r."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out, lse, block_state = flash(q, k, v, causal=True)
        out = out.float()
        ctx.block_states = [block_state]
        half = q.shape[2] // 2
        for step, (_, source, (keys, values)) in enumerate(_ring_steps((k, v), group)):
            if step == 0:
                continue
            rows, columns = _part(source, group_rank(group), half)
            part, part_lse, block_state = flash(
                q[:, :, rows].contiguous(), keys[:, :, columns].contiguous(), values[:, :, columns].contiguous(), causal=False
            )
            ctx.block_states.append(block_state)
            total = torch.logaddexp(lse[:, :, rows], part_lse)
            weights = ((one - total).exp()[..., None] for one in (lse[:, :, rows], part_lse))
            out[:, :, rows] = next(weights) * out[:, :, rows] + next(weights) * part.float()
            lse[:, :, rows] = total
        ctx.group = group
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, dout = ctx.group, dout.transpose(1, 2).contiguous()
        rank, half = group_rank(group), q.shape[2] // 2
        dq, dk, dv = (g.float() for g in flash_backward(dout, q, k, v, out, lse, ctx.block_states[0], causal=True))
        for step, (_, source, (keys, values)) in enumerate(_ring_steps((k, v), group)):
            if step == 0:
                continue
            dk, dv = (_pass_on(x, group) for x in (dk, dv))  # gradients are passed on with their keys and values
            rows, columns = _part(source, rank, half)
            d, queries, o, total = (x[:, :, rows].contiguous() for x in (dout, q, out, lse))
            block_keys, block_values = (x[:, :, columns].contiguous() for x in (keys, values))
            grads = flash_backward(d, queries, block_keys, block_values, o, total, ctx.block_states[step], causal=False)
            dq[:, :, rows] += grads[0]
            dk[:, :, columns] += grads[1]
            dv[:, :, columns] += grads[2]
        dk, dv = (_pass_on(x, group) for x in (dk, dv))  # back to the owner
        return *(g.transpose(1, 2).to(q.dtype) for g in (dq, dk, dv)), None


def _part(source: int, rank: int, half: int) -> tuple[slice, slice]:
    """Rows of this rank's queries and of the keys of ``source`` that attend to each other."""
    return (slice(None), slice(0, half)) if source < rank else (slice(half, None), slice(None))


def _pass_on(x: Tensor, group: ProcessGroup) -> Tensor:
    """x of the previous rank in the ring."""
    return start_shift(x, 1, group, ring=True).wait()


def _ring_steps(tensors: tuple[Tensor, Tensor], group: ProcessGroup) -> Any:
    """``(step, source, tensors)``: this rank's own tensors, then those of the previous ranks in turn."""
    world, rank = group_size(group), group_rank(group)
    yield 0, rank, tensors
    for step in range(1, world):
        tensors = (_pass_on(tensors[0], group), _pass_on(tensors[1], group))
        yield step, (rank - step) % world, tensors
