"""Pre-activations of all steps at once -> activated gates: the cell's forward step without its recurrence."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .cell import lstm_forward_step
from .config import Config, Layout
from .launch import given, how_of, on_device_of
from .masks import draw
from .records import RUNTIME, Peephole, Tile
from .tiles import (
    in_gates,
    in_sequence,
    load_gates,
    load_tile,
    of_peephole,
    per_row,
    per_unit,
    rows_at,
    runs_reversed,
    store_gates,
)
from .variants import Variants


@triton.jit(do_not_specialize=RUNTIME)
def activate_kernel(
    gates,  # [rows, D, 4, H]
    c_prev,  # [rows, D, H] or None: nothing depends on it
    peephole,  # [D, 3, H] or None
    masks,  # Masks; those of single steps
    scalars,  # Scalars
    batch,
    seq_len,
    row_stride_t,
    row_stride_b,
    time_begin,  # as for the recurrence
    how: tl.constexpr,
):
    """One program: BLOCK_H units of BLOCK_B pairs (step, row of the batch), of one set of weights."""
    pair = tl.program_id(0).to(tl.int64) * how.BLOCK_B + tl.arange(0, how.BLOCK_B)
    unit = tl.program_id(1) * how.BLOCK_H + tl.arange(0, how.BLOCK_H)
    direction = tl.program_id(2)
    time, b = pair // batch, pair % batch
    owned = per_row(time < seq_len, how) & per_unit(unit < how.H, how)
    reverse = runs_reversed(direction, how.ORDER)
    tile = Tile(b, unit, None, owned, None, None, None, None, direction, reverse, batch, row_stride_t, row_stride_b)
    rows = rows_at(time, tile)
    offset = in_gates(rows, tile, how)
    a = load_gates(gates, offset, owned, how)
    before = tl.zeros(owned.shape, how.compute)
    if c_prev is not None:
        before = load_tile(c_prev, in_sequence(rows, tile, how), owned, how)
    g_scale = draw(masks, time + time_begin, tile, how).g_scale
    weights_c = Peephole(None, None, None)
    if peephole is not None:
        weights_c = of_peephole(peephole, tile, how)
    activated, _ = lstm_forward_step(a, before, weights_c, g_scale, scalars, how)
    store_gates(gates, offset, owned, activated, how)


def activate(
    gates: torch.Tensor, c_prev: torch.Tensor | None, layout: Layout, order: str, variants: Variants
) -> torch.Tensor:
    """Activate gates [rows, D, 4H] in place. c_prev [rows, D, H]: c_{t-1} of every step, for peepholes only."""
    _, directions, gate_size = gates.shape
    hidden_size = gate_size // 4
    block_b, block_h = 16, min(128, max(16, triton.next_power_of_2(hidden_size)))
    config = Config("stepwise", "none", False, False, 1, block_b, block_h, 16, 4)
    # Only what happens between the pre-activations and the gates: the rest comes before or after.
    own = replace(variants, cell=replace(variants.cell, zoneout_h=0, zoneout_c=0), h_mask=None)
    # Layer normalisation stays: c is then made by the same multiply-add as in the forward pass.
    how = how_of(config, hidden_size, directions, order, "ieee", gates.dtype, own.features)
    grid = (triton.cdiv(layout.rows, block_b), triton.cdiv(hidden_size, block_h), directions)
    with on_device_of(gates):
        activate_kernel[grid](
            gates, c_prev, own.peephole, own.masks(), own.scalars(),
            layout.batch, layout.seq_len, layout.stride_t, layout.stride_b, variants.time_begin,
            given(how),
        )  # fmt: skip
    return gates
