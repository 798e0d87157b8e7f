"""Pre-activations of all steps at once -> activated gates: the cell's forward step without its recurrence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cell import lstm_forward_step
from .config import Layout
from .extras import RUNTIME_EXTRAS, Extras
from .launch import on_device_of
from .masks import dropout_scale, step_bits
from .tiles import RUNTIME_SIZES, load_gates, of_peepholes, per_row, per_unit, runs_reversed, store_gates


@triton.jit(do_not_specialize=RUNTIME_SIZES + RUNTIME_EXTRAS)
def activate_kernel(
    gates,  # [rows, D, 4, H]
    c_prev,  # [rows, D, H] or None: nothing depends on it
    peephole,  # [D, 3, H] or None
    seed,  # [D] int64 or None
    time_begin,  # as for the recurrence
    recurrent_dropout,
    cell_clip,
    batch,
    seq_len,
    row_stride_t,
    row_stride_b,
    H: tl.constexpr,
    D: tl.constexpr,
    ORDER: tl.constexpr,
    COUPLED: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_H units of BLOCK_B pairs (step, row of the batch), of one set of weights."""
    compute: tl.constexpr = tl.float64 if gates.dtype.element_ty == tl.float64 else tl.float32
    EXACT: tl.constexpr = gates.dtype.element_ty == tl.float32
    pair = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    direction = tl.program_id(2)
    time, b = pair // batch, pair % batch
    rows = time * row_stride_t + b * row_stride_b
    owned = per_row(time < seq_len, False) & per_unit(unit < H, False)
    offset = per_row((rows * D + direction) * (4 * H), False) + per_unit(unit, False)
    a_i, a_f, a_g, a_o = load_gates(gates, offset, owned, H, compute)
    before = tl.zeros(owned.shape, compute)
    if c_prev is not None:
        state = per_row((rows * D + direction) * H, False) + per_unit(unit, False)
        before = tl.load(c_prev + state, mask=owned, other=0.0).to(compute)
    g_scale = None
    if SAMPLED and recurrent_dropout is not None:
        reverse = runs_reversed(direction, ORDER)
        _, _, bits_g = step_bits(seed, direction, reverse, unit, b, time + time_begin, SAMPLED, False)
        g_scale = dropout_scale(bits_g, recurrent_dropout, compute)
    w_ci = None
    w_cf = None
    w_co = None
    if peephole is not None:
        w_ci, w_cf, w_co = of_peepholes(peephole, direction, unit, H, compute, False)
    i, f, g, o, _ = lstm_forward_step(
        a_i, a_f, a_g, a_o, before, w_ci, w_cf, w_co, g_scale, cell_clip, COUPLED, False, EXACT
    )
    store_gates(gates, offset, owned, i, f, g, o, H)


def activate(
    gates: torch.Tensor, c_prev: torch.Tensor | None, layout: Layout, order: str, extras: Extras
) -> torch.Tensor:
    """Activate gates [rows, D, 4H] in place. c_prev [rows, D, H]: c_{t-1} of every step, for peepholes only."""
    _, directions, gate_size = gates.shape
    hidden_size, arguments = gate_size // 4, extras.arguments()
    for name in ("gain_hh", "norm_c", "h_mask", "zoneout_h", "zoneout_c"):
        del arguments[name]  # what they do comes before or after
    block_b, block_h = 16, min(128, triton.next_power_of_2(hidden_size))
    grid = (triton.cdiv(layout.rows, block_b), triton.cdiv(hidden_size, block_h), directions)
    with on_device_of(gates):
        activate_kernel[grid](
            gates, c_prev, batch=layout.batch, seq_len=layout.seq_len, row_stride_t=layout.stride_t,
            row_stride_b=layout.stride_b, H=hidden_size, D=directions, ORDER=order, BLOCK_B=block_b, BLOCK_H=block_h,
            **arguments,
        )  # fmt: skip
    return gates
