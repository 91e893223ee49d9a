"""The scan over a sequence's tiles: from each tile's sum to the state before the tile (or behind it, in reverse).

The running state is float64: at 2**31 tokens float32 sums of tile sums would be off by up to 1e-2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def race_scan_kernel(
    sums, initial, final, totals, tiles, H, c: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr, WRITE: tl.constexpr
):
    """Program (sequence, head, block of WIDTH elements) of the :class:`TileStates` ``sums [tile, H, E]``, E = S (Dv + 1).

    ``state <- exp(decay of tile) * state + sum of tile``, from the :class:`Sketch` ``initial`` to ``final`` (None: zeros; not
    asked for). Causal: the states before each tile (behind it, when REVERSE) overwrite the sums; otherwise the total of each
    sequence goes to ``totals [N, H, E]``. Without WRITE only ``final`` is written. ``tiles``: :class:`SequenceTiles`.
    """
    pid = tl.program_id(0).to(tl.int64)
    E: tl.constexpr = c.S * (c.Dv + 1)
    blocks = tl.cdiv(E, WIDTH)
    e = (pid % blocks) * WIDTH + tl.arange(0, WIDTH)  # [WIDTH]
    h = (pid // blocks) % H
    sequence = pid // (blocks * H)
    in_values = e < c.S * c.Dv
    in_mass = (e >= c.S * c.Dv) & (e < E)
    values_at = (sequence * H + h) * (c.S * c.Dv) + e
    mass_at = (sequence * H + h) * c.S + e - c.S * c.Dv
    if c.packed:
        first = tl.load(tiles.first + sequence)
        stop = tl.load(tiles.first + sequence + 1)
    else:
        first = sequence * tiles.per_row
        stop = first + tiles.per_row
    state = tl.zeros([WIDTH], tl.float64)
    if initial is not None:
        state += tl.load(initial.values_ptr + values_at, mask=in_values, other=0.0).to(tl.float64)
        state += tl.load(initial.mass_ptr + mass_at, mask=in_mass, other=0.0).to(tl.float64)
    for step in range(0, stop - first, 8):
        loaded = ()
        for i in tl.static_range(8):  # the loads of eight tiles are in flight together
            tile = stop - 1 - step - i if REVERSE else first + step + i
            inside = (e < E) & (step + i < stop - first)
            loaded = loaded + (tl.load(sums.states + (tile * H + h) * E + e, mask=inside, other=0.0),)
        for i in tl.static_range(8):
            tile = stop - 1 - step - i if REVERSE else first + step + i
            exists = step + i < stop - first
            if c.causal and WRITE:
                tl.store(sums.states + (tile * H + h) * E + e, state.to(tl.float32), mask=(e < E) & exists)
            if c.decay:
                decay = tl.load(sums.decays + tile * H + h, mask=exists, other=0.0)
                state *= tl.exp2(decay.to(tl.float32)).to(tl.float64)
            state += loaded[i].to(tl.float64)
    if final is not None:
        tl.store(final.values_ptr + values_at, state.to(final.values_ptr.dtype.element_ty), mask=in_values)
        tl.store(final.mass_ptr + mass_at, state.to(final.mass_ptr.dtype.element_ty), mask=in_mass)
    if not c.causal and WRITE:
        tl.store(totals + (sequence * H + h) * E + e, state.to(tl.float32), mask=e < E)
