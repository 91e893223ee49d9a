"""The scan over a sequence's tiles: each tile's sum becomes the state that enters the tile, forwards or backwards.

The running state is float64: at 2**31 tokens plain float32 sums of tile sums would be off by up to 1e-2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def race_scan_kernel(
    sums,
    decays,
    initial_values,
    initial_mass,
    final_values,
    final_mass,
    totals,
    row_tiles,
    per_row,
    H,
    c: tl.constexpr,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Program (row, head, block of WIDTH elements) of ``sums [tile, H, E]``, E = S (Dv + 1): values, then mass.

    ``state <- exp(decay of tile) * state + sum of tile``, from the initial sketch to the final one (INITIAL, FINAL: if
    given and asked for). Causal: the states before each tile (behind it, when REVERSE) overwrite the sums; otherwise
    the total of each row goes to ``totals [row, H, E]``. Without WRITE there is only the final sketch.
    """
    pid = tl.program_id(0).to(tl.int64)
    E: tl.constexpr = c.S * (c.Dv + 1)
    blocks = tl.cdiv(E, WIDTH)
    e = (pid % blocks) * WIDTH + tl.arange(0, WIDTH)
    h = (pid // blocks) % H
    row = pid // (blocks * H)
    in_values = e < c.S * c.Dv
    in_mass = (e >= c.S * c.Dv) & (e < E)
    of_values = (row * H + h) * (c.S * c.Dv) + e
    of_mass = (row * H + h) * c.S + e - c.S * c.Dv
    if c.packed:
        first = tl.load(row_tiles + row)
        stop = tl.load(row_tiles + row + 1)
    else:
        first = row * per_row
        stop = first + per_row
    state = tl.zeros([WIDTH], tl.float64)
    if INITIAL:
        state += tl.load(initial_values + of_values, mask=in_values, other=0.0).to(tl.float64)
        state += tl.load(initial_mass + of_mass, mask=in_mass, other=0.0).to(tl.float64)
    for step in range(0, stop - first, 8):
        parts = ()
        for i in tl.static_range(8):  # the loads of eight tiles are in flight together
            tile = stop - 1 - step - i if REVERSE else first + step + i
            parts = parts + (tl.load(sums + (tile * H + h) * E + e, mask=(e < E) & (step + i < stop - first), other=0.0),)
        for i in tl.static_range(8):
            tile = stop - 1 - step - i if REVERSE else first + step + i
            there = step + i < stop - first
            if c.causal and WRITE:
                tl.store(sums + (tile * H + h) * E + e, state.to(tl.float32), mask=(e < E) & there)
            if c.decay:
                state *= tl.exp2(tl.load(decays + tile * H + h, mask=there, other=0.0).to(tl.float32)).to(tl.float64)
            state += parts[i].to(tl.float64)
    if FINAL:
        tl.store(final_values + of_values, state.to(final_values.dtype.element_ty), mask=in_values)
        tl.store(final_mass + of_mass, state.to(final_mass.dtype.element_ty), mask=in_mass)
    if not c.causal and WRITE:
        tl.store(totals + (row * H + h) * E + e, state.to(tl.float32), mask=e < E)
