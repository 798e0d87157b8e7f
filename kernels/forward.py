"""Forward recurrence: gates_t = xp_t + h_{t-1} W_hh^T, then the cell, for all T steps.

Buffers (layouts in tiles.py; T*B rows):
- gates [rows, D, 4, H]: holds xp = x W_ih^T + bias on entry. With SAVE the activated gates i, f,
  g, o overwrite it; each program owns its tile, so nobody else reads what it overwrites.
- out [rows, D, H]: h_t, written once; with an exchange also what programs hand each other.
- cells [rows, D, H]: c_t, written with SAVE only.
- h_n, c_n [D, B, H]: the last state of each row.
- carry_h, carry_c [D, B, H] in the compute type: state between launches, `stepwise` only.
- x [B, I], w_ih [D, 4H, I], bias [D, 4H]: `single` only, where one launch computes xp as well and
  gates need not hold anything on entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cell import lstm_forward_step
from .config import Config, Layout
from .exchange import await_flags, publishable, raise_flag
from .launch import Launcher, Recurrence, compute_dtype, run
from .product import multiply, recurrent_product, resident_weights, zero_product
from .tiles import RUNTIME_SIZES, own_tile, per_row, per_unit, restarts, runs_reversed, split_gates, time_of


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def lstm_forward_kernel(
    gates,  # [rows, D, 4, H]
    w_hh,  # [D, 4H, H]
    h_0,  # [D, B, H] or None: zeros
    c_0,  # [D, B, H] or None
    reset_h,  # [D, B, H] or None: zeros
    reset_c,  # [D, B, H] or None
    out,  # [rows, D, H]
    cells,  # [rows, D, H] or None
    h_n,  # [D, B, H]
    c_n,  # [D, B, H]
    carry_h,  # [D, B, H] or None
    carry_c,  # [D, B, H] or None
    lengths,  # [B] int32 or None
    reset,  # [rows] uint8 or None
    flags,  # [D, batch tiles, hidden tiles] int32 or None
    x,  # [B, I] or None
    w_ih,  # [D, 4H, I] or None
    bias,  # [D, 4H] or None
    batch,
    seq_len,
    row_stride_t,
    row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin,
    step_end,
    H: tl.constexpr,
    INPUTS: tl.constexpr,
    D: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
    PLACEMENT: tl.constexpr,
    PROTOCOL: tl.constexpr,
    RESIDENT: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps [step_begin, step_end)."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    dtype: tl.constexpr = out.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    hidden_tile = tl.program_id(0)
    batch_tile = first_tile + tl.program_id(1)
    direction = tl.program_id(2)
    reverse = runs_reversed(direction, ORDER)
    b, unit, in_batch, owned, state, length = own_tile(
        hidden_tile, batch_tile, direction, lengths, batch, seq_len, H, UNITS_FIRST, BLOCK_B, BLOCK_H
    )
    if flags is not None:
        flags += (direction * tl.cdiv(batch, BLOCK_B) + batch_tile) * TILES

    h = tl.zeros(owned.shape, compute)
    c = tl.zeros(owned.shape, compute)
    if PLACEMENT == "stepwise":
        h = tl.load(carry_h + state, mask=owned, other=0.0)
        c = tl.load(carry_c + state, mask=owned, other=0.0)
    elif h_0 is not None:
        h = tl.load(h_0 + state, mask=owned, other=0.0).to(compute)
        c = tl.load(c_0 + state, mask=owned, other=0.0).to(compute)

    w_hh += direction.to(tl.int64) * (4 * H * H)
    weights = ()
    if RESIDENT:
        weights = resident_weights(w_hh, unit, H, BLOCK_H, BLOCK_K, SPLIT_K, False)

    if PLACEMENT == "single":
        projected = recurrent_product(
            x + b * INPUTS, in_batch, in_batch, weights, w_ih + direction.to(tl.int64) * (4 * H * INPUTS), unit,
            compute, H, INPUTS, False, PRECISION, PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        x_i, x_f, x_g, x_o = split_gates(projected, BLOCK_B, BLOCK_H, UNITS_FIRST)
        if bias is not None:
            of_unit = bias + direction * (4 * H) + per_unit(unit, UNITS_FIRST)
            exists = per_unit(unit < H, UNITS_FIRST)
            x_i += tl.load(of_unit, mask=exists, other=0.0)
            x_f += tl.load(of_unit + H, mask=exists, other=0.0)
            x_g += tl.load(of_unit + 2 * H, mask=exists, other=0.0)
            x_o += tl.load(of_unit + 3 * H, mask=exists, other=0.0)

    for step in range(step_begin, step_end):
        active = step < length
        rows = time_of(step, length, reverse) * row_stride_t + b * row_stride_b
        restart = restarts(reset, step, length, rows, in_batch, reverse, row_stride_t)
        # The projected input does not depend on the others: ask for it before waiting for them.
        offset = per_row((rows * D + direction) * (4 * H), UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        if PLACEMENT != "single":
            x_i = tl.load(gates + offset, mask=owned, other=0.0)
            x_f = tl.load(gates + offset + H, mask=owned, other=0.0)
            x_g = tl.load(gates + offset + 2 * H, mask=owned, other=0.0)
            x_o = tl.load(gates + offset + 3 * H, mask=owned, other=0.0)

        c_prev = c
        if reset is not None:
            fresh = per_row(restart, UNITS_FIRST) & owned
            if reset_c is None:
                c_prev = tl.where(fresh, 0.0, c)
            else:
                c_prev = tl.where(fresh, tl.load(reset_c + state, mask=fresh, other=0.0).to(compute), c)
        if PLACEMENT == "local":
            h_prev = h
            if reset is not None:
                if reset_h is None:
                    h_prev = tl.where(fresh, 0.0, h)
                else:
                    h_prev = tl.where(fresh, tl.load(reset_h + state, mask=fresh, other=0.0).to(compute), h)
            acc = zero_product(4 * BLOCK_H, BLOCK_B, UNITS_FIRST, 1, compute)
            acc = multiply(h_prev.to(dtype), weights[0], acc, UNITS_FIRST, False, PRECISION)
        else:
            # Row by row: the output one step ago, the initial state, or the reset state.
            before = time_of(step - 1, length, reverse) * row_stride_t + b * row_stride_b
            source = out + (before * D + direction) * H
            waiting = in_batch & (step > 0) & (restart == 0)
            readable = waiting
            if h_0 is not None:
                start = in_batch & (step == 0) & (restart == 0)
                source = tl.where(start, h_0 + (direction * batch + b) * H, source)
                readable = readable | start
            if reset_h is not None:
                source = tl.where(restart, reset_h + (direction * batch + b) * H, source)
                readable = readable | restart
            await_flags(flags, step, TILES, triton.next_power_of_2(TILES), PROTOCOL)
            acc = recurrent_product(
                source, readable, waiting, weights, w_hh, unit, compute, H, H, False, PRECISION,
                PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
            )  # fmt: skip

        a_i, a_f, a_g, a_o = split_gates(acc, BLOCK_B, BLOCK_H, UNITS_FIRST)
        i, f, g, o, c_new, h_new = lstm_forward_step(a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o, c_prev)
        live = per_row(active, UNITS_FIRST)
        c = tl.where(live, c_new, c)
        h = tl.where(live, h_new, h)
        sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        h_t = publishable(tl.where(live, h_new, 0.0), dtype)
        tl.store(out + sequence, h_t, mask=owned)
        raise_flag(flags, hidden_tile, step + 1, PROTOCOL)
        if SAVE:
            tl.store(gates + offset, i.to(dtype), mask=owned)
            tl.store(gates + offset + H, f.to(dtype), mask=owned)
            tl.store(gates + offset + 2 * H, g.to(dtype), mask=owned)
            tl.store(gates + offset + 3 * H, o.to(dtype), mask=owned)
            tl.store(cells + sequence, c.to(dtype), mask=owned)

    if PLACEMENT == "stepwise":
        tl.store(carry_h + state, h, mask=owned)
        tl.store(carry_c + state, c, mask=owned)
    tl.store(h_n + state, h.to(dtype), mask=owned)
    tl.store(c_n + state, c.to(c_n.dtype.element_ty), mask=owned)


def lstm_forward(
    gates: torch.Tensor | None,
    w_hh: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    layout: Layout,
    config: Config,
    precision: str,
    save: bool,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reset_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    order: str | None = None,
    c_dtype: torch.dtype | None = None,
    projection: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    launch: Launcher = run,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the forward recurrence of one layer -> out [rows, D, H], h_n, c_n [D, B, H], cells or None.

    gates [rows, D, 4H] is consumed: with `save` it holds the activated gates afterwards. All
    tensors are contiguous and of one floating type, but for c_0, which may have any; lengths [B]
    int32, reset [rows] bool. order: see `runs_reversed`, by default "both" for D = 2. c_dtype: of c_n.
    projection: x [B, I], w_ih [D, 4H, I] and bias [D, 4H] for the placement `single`, of one step;
    gates is then only written, or None without `save`.
    """
    directions, hidden_size = w_hh.shape[0], w_hh.shape[2]
    if (projection is None) != (config.placement != "single") or (projection is not None and layout.seq_len != 1):
        raise ValueError("placement 'single' is for one step, with the projection of its input")
    x, w_ih, bias = projection or (None, None, None)
    out = w_hh.new_empty((layout.rows, directions, hidden_size))
    h_n = w_hh.new_empty((directions, layout.batch, hidden_size))
    c_n = torch.empty_like(h_n, dtype=c_dtype)
    cells = torch.empty_like(out) if save else None
    h_0, c_0 = state if state is not None else (None, None)
    reset_h, reset_c = reset_state if reset_state is not None else (None, None)
    carry_h = carry_c = None
    if config.placement == "stepwise":
        carry = {"dtype": compute_dtype(w_hh.dtype), "memory_format": torch.contiguous_format, "copy": True}
        carry_h = torch.zeros_like(h_n, dtype=compute_dtype(w_hh.dtype)) if h_0 is None else h_0.to(**carry)
        carry_c = torch.zeros_like(carry_h) if c_0 is None else c_0.to(**carry)
    arguments = {
        "gates": gates,
        "w_hh": w_hh,
        "h_0": h_0,
        "c_0": c_0,
        "reset_h": reset_h,
        "reset_c": reset_c,
        "out": out,
        "cells": cells,
        "h_n": h_n,
        "c_n": c_n,
        "carry_h": carry_h,
        "carry_c": carry_c,
        "lengths": lengths,
        "reset": None if reset is None else reset.view(torch.uint8),
        "x": x,
        "w_ih": w_ih,
        "bias": bias,
        "INPUTS": 0 if x is None else x.shape[1],
        "SAVE": save,
    }
    recurrence = Recurrence(config, layout, hidden_size, directions, order, precision, out, backward=False)
    launch(lstm_forward_kernel, recurrence, arguments)
    return out, h_n, c_n, cells
