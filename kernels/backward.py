"""Backward recurrence: dh_{t-1} = dgates_t W_hh, for all T steps in reverse.

Buffers (layouts in tiles.py; T*B rows):
- gates [rows, D, 4, H], cells [rows, D, H]: activated gates and c_t as the forward pass saved
  them; only read.
- dgates [rows, D, 4, H]: gradient of the pre-activations, written once, 0 beyond a row's length;
  with an exchange also what programs hand each other. Everything that is a function of it over
  the whole sequence (dx, dW, db, dh_0) is a GEMM or a reduction after the launch.
- dc_0 [D, B, H]: gradient of the initial cell state; dc_reset [D, B, H]: of the reset one,
  summed over a row's resets.
- carry_dc, carry_dc_reset [D, B, H] in the compute type: state between launches, `stepwise` only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cell import lstm_backward_step, lstm_gates_backward
from .config import Config, Layout
from .exchange import await_flags, publishable, raise_flag
from .launch import Launcher, Recurrence, compute_dtype, run
from .product import gate_weights, multiply, recurrent_product, resident_weights, zero_product
from .tiles import RUNTIME_SIZES, own_tile, per_row, per_unit, restarts, runs_reversed, time_of


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def lstm_backward_kernel(
    dout,  # [rows, D, H] or None: zeros
    dh_n,  # [D, B, H] or None: zeros
    dc_n,  # [D, B, H] or None: zeros
    dcells,  # [rows, D, H] or None: zeros
    dactivated,  # [rows, D, 4, H] or None: zeros
    gates,  # [rows, D, 4, H]
    cells,  # [rows, D, H]
    c_0,  # [D, B, H] or None: zeros
    reset_c,  # [D, B, H] or None: zeros
    w_hh,  # [D, 4H, H]
    dgates,  # [rows, D, 4, H]
    dc_0,  # [D, B, H]
    dc_reset,  # [D, B, H] or None
    carry_dc,  # [D, B, H] or None
    carry_dc_reset,  # [D, B, H] or None
    lengths,  # [B] int32 or None
    reset,  # [rows] uint8 or None
    flags,  # [D, batch tiles, hidden tiles] int32 or None
    batch,
    seq_len,
    row_stride_t,
    row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin,
    step_end,
    H: tl.constexpr,
    D: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    PLACEMENT: tl.constexpr,
    PROTOCOL: tl.constexpr,
    RESIDENT: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps step_end - 1 .. step_begin."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    dtype: tl.constexpr = dgates.dtype.element_ty
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

    dc = tl.zeros(owned.shape, compute)
    dc_fresh = tl.zeros(owned.shape, compute)
    if PLACEMENT == "stepwise":
        dc = tl.load(carry_dc + state, mask=owned, other=0.0)
        if dc_reset is not None:
            dc_fresh = tl.load(carry_dc_reset + state, mask=owned, other=0.0)
    elif dc_n is not None:
        dc = tl.load(dc_n + state, mask=owned, other=0.0).to(compute)

    w_hh += direction.to(tl.int64) * (4 * H * H)
    weights = ()
    if PLACEMENT == "local":
        weights = gate_weights(w_hh, unit, H, BLOCK_H)
    elif RESIDENT:
        weights = resident_weights(w_hh, unit, H, BLOCK_H, BLOCK_K, SPLIT_K, True)

    dh_rec = zero_product(BLOCK_H, BLOCK_B, UNITS_FIRST, 1, compute)
    last_row = time_of(step_end - 1, length, reverse) * row_stride_t + b * row_stride_b
    last = per_row((last_row * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
    c = tl.load(cells + last, mask=owned, other=0.0).to(compute)

    for count in range(step_end - step_begin):
        step = step_end - 1 - count
        active = step < length
        rows = time_of(step, length, reverse) * row_stride_t + b * row_stride_b
        restart = restarts(reset, step, length, rows, in_batch, reverse, row_stride_t)
        # What does not depend on the other programs is asked for before waiting for them.
        offset = per_row((rows * D + direction) * (4 * H), UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        i = tl.load(gates + offset, mask=owned, other=0.0).to(compute)
        f = tl.load(gates + offset + H, mask=owned, other=0.0).to(compute)
        g = tl.load(gates + offset + 2 * H, mask=owned, other=0.0).to(compute)
        o = tl.load(gates + offset + 3 * H, mask=owned, other=0.0).to(compute)
        before = time_of(step - 1, length, reverse) * row_stride_t + b * row_stride_b
        earlier = per_row((before * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        c_before = tl.load(cells + earlier, mask=owned & (step > 0), other=0.0).to(compute)
        c_prev = c_before
        if c_0 is not None:
            c_prev += tl.load(c_0 + state, mask=owned & (step == 0), other=0.0).to(compute)
        fresh = per_row(restart, UNITS_FIRST) & owned
        if reset is not None:
            c_prev = tl.where(fresh, 0.0, c_prev)
            if reset_c is not None:
                c_prev += tl.load(reset_c + state, mask=fresh, other=0.0).to(compute)
        dh = tl.zeros(owned.shape, compute)
        if dout is not None:
            sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
            dh = tl.load(dout + sequence, mask=owned, other=0.0).to(compute)
        if dh_n is not None:
            final = per_row(step == length - 1, UNITS_FIRST)
            dh += tl.load(dh_n + state, mask=owned & final, other=0.0).to(compute)

        if PLACEMENT != "local":
            after = time_of(step + 1, length, reverse) * row_stride_t + b * row_stride_b
            source = dgates + (after * D + direction) * (4 * H)
            waiting = in_batch & (step + 1 < seq_len)
            await_flags(flags, seq_len - 1 - step, TILES, triton.next_power_of_2(TILES), PROTOCOL)
            dh_rec = recurrent_product(
                source, waiting, waiting, weights, w_hh, unit, compute, H, 4 * H, True, PRECISION,
                PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
            )  # fmt: skip
            if reset is not None:
                after_restart = restarts(reset, step + 1, length, after, waiting, reverse, row_stride_t)
                dh_rec = tl.where(per_row(after_restart, UNITS_FIRST), 0.0, dh_rec)
        dh += dh_rec

        live = per_row(active, UNITS_FIRST) & owned
        if dcells is not None:
            sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
            dc += tl.load(dcells + sequence, mask=live, other=0.0).to(compute)
        di, df, dg, do, dc_prev = lstm_backward_step(i, f, g, o, c, c_prev, dh, dc)
        if dactivated is not None:
            di += tl.load(dactivated + offset, mask=live, other=0.0).to(compute)
            df += tl.load(dactivated + offset + H, mask=live, other=0.0).to(compute)
            dg += tl.load(dactivated + offset + 2 * H, mask=live, other=0.0).to(compute)
            do += tl.load(dactivated + offset + 3 * H, mask=live, other=0.0).to(compute)
        da_i, da_f, da_g, da_o = lstm_gates_backward(i, f, g, o, di, df, dg, do)
        # Beyond its length a row's saved gates mean nothing, not even a finite number.
        d_i = publishable(tl.where(live, da_i, 0.0), dtype)
        d_f = publishable(tl.where(live, da_f, 0.0), dtype)
        d_g = publishable(tl.where(live, da_g, 0.0), dtype)
        d_o = publishable(tl.where(live, da_o, 0.0), dtype)
        tl.store(dgates + offset, d_i, mask=owned)
        tl.store(dgates + offset + H, d_f, mask=owned)
        tl.store(dgates + offset + 2 * H, d_g, mask=owned)
        tl.store(dgates + offset + 3 * H, d_o, mask=owned)
        raise_flag(flags, hidden_tile, seq_len - step, PROTOCOL)

        dc = tl.where(live, dc_prev, dc)
        if reset is not None:
            if dc_reset is not None:
                dc_fresh += tl.where(fresh & live, dc_prev, 0.0)
            dc = tl.where(fresh & live, 0.0, dc)
        c = c_before
        if PLACEMENT == "local":
            dh_rec = zero_product(BLOCK_H, BLOCK_B, UNITS_FIRST, 1, compute)
            dh_rec = multiply(d_i, weights[0], dh_rec, UNITS_FIRST, True, PRECISION)
            dh_rec = multiply(d_f, weights[1], dh_rec, UNITS_FIRST, True, PRECISION)
            dh_rec = multiply(d_g, weights[2], dh_rec, UNITS_FIRST, True, PRECISION)
            dh_rec = multiply(d_o, weights[3], dh_rec, UNITS_FIRST, True, PRECISION)
            if reset is not None:
                dh_rec = tl.where(fresh, 0.0, dh_rec)

    if PLACEMENT == "stepwise":
        tl.store(carry_dc + state, dc, mask=owned)
        if dc_reset is not None:
            tl.store(carry_dc_reset + state, dc_fresh, mask=owned)
    tl.store(dc_0 + state, dc.to(dc_0.dtype.element_ty), mask=owned)
    if dc_reset is not None:
        tl.store(dc_reset + state, dc_fresh.to(dc_reset.dtype.element_ty), mask=owned)


def lstm_backward(
    dout: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    gates: torch.Tensor,
    cells: torch.Tensor,
    w_hh: torch.Tensor,
    c_0: torch.Tensor | None,
    layout: Layout,
    config: Config,
    precision: str,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reset_c: torch.Tensor | None = None,
    order: str | None = None,
    dcells: torch.Tensor | None = None,
    dactivated: torch.Tensor | None = None,
    launch: Launcher = run,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the backward recurrence of one layer -> dgates [rows, D, 4H], dc_0 and, with reset_c, its gradient.

    All tensors are contiguous and of one floating type, but for c_0, reset_c and dc_n, which may have
    any; nothing given is modified. dcells [rows, D, H], dactivated [rows, D, 4H]: gradients of the saved
    cells and activated gates themselves. The gradients of c_0 and reset_c come in the compute type.
    """
    directions, hidden_size = w_hh.shape[0], w_hh.shape[2]
    dgates = torch.empty_like(gates)
    dtype = compute_dtype(gates.dtype)
    dc_0 = gates.new_empty((directions, layout.batch, hidden_size), dtype=dtype)
    dc_reset = torch.empty_like(dc_0) if reset_c is not None else None
    carry_dc = carry_dc_reset = None
    if config.placement == "stepwise":
        carry_dc = torch.zeros_like(dc_0) if dc_n is None else dc_n.to(dtype, copy=True)
        carry_dc_reset = torch.zeros_like(carry_dc) if reset_c is not None else None
    arguments = {
        "dout": dout,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "dcells": dcells,
        "dactivated": dactivated,
        "gates": gates,
        "cells": cells,
        "c_0": c_0,
        "reset_c": reset_c,
        "w_hh": w_hh,
        "dgates": dgates,
        "dc_0": dc_0,
        "dc_reset": dc_reset,
        "carry_dc": carry_dc,
        "carry_dc_reset": carry_dc_reset,
        "lengths": lengths,
        "reset": None if reset is None else reset.view(torch.uint8),
    }
    recurrence = Recurrence(config, layout, hidden_size, directions, order, precision, dgates, backward=True)
    launch(lstm_backward_kernel, recurrence, arguments)
    return dgates, dc_0, dc_reset
