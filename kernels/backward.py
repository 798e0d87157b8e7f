"""Backward recurrence: dh_{t-1} = dgates_t W_hh, for all T steps in reverse.

Buffers (layouts in tiles.py; T*B rows):
- gates [rows, D, 4, H], cells [rows, D, H]: activated gates and c_t as the forward pass saved
  them; only read.
- dgates [rows, D, 4, H]: gradient of the pre-activations, written once, 0 beyond a row's length;
  with an exchange also what programs hand each other. Everything that is a function of it over
  the whole sequence (dx, dW, db, dh_0) is a GEMM or a reduction after the launch.
- dc_0 [D, B, H]: gradient of the initial cell state; dc_reset [D, B, H]: of the reset one, summed
  over a row's resets. Both in the compute type; between the launches of `stepwise` they hold the
  state, and so do those of the following that are sums.

With variants of the cell, each in the compute type:
- dh_0, dh_reset [D, B, H]: what reaches the initial and the reset h by zoneout, not through the recurrent product.
- dpeephole [3, D, B, H], dnorm_c [2, D, B, H]: gradients of these weights, for each row of the batch.
- product [rows, D, 4, H]: h_{t-1} W_hh^T, for layer normalisation, with the stats of the forward pass.
- dproduct [rows, D, 4, H]: its gradient, which is then what programs exchange in place of dgates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import candidate, clipped, lstm_backward_step, lstm_output_backward, zoneout_backward
from .config import Config, Layout
from .exchange import await_flags, publish_gates, publishable_gates, raise_flag
from .extras import PLAIN, RUNTIME_EXTRAS, Extras, Gradients
from .launch import Launcher, Recurrence, compute_dtype, run, wide_marks
from .masks import dropout_scale, kept_by_zoneout, step_bits
from .norm import load_moments, norm_gates_backward, norm_state_backward
from .product import gate_weights, gates_product, in_registers, recurrent_product, resident_weights, restored
from .tiles import (
    RUNTIME_SIZES,
    begin_sum,
    load_gates,
    of_gates,
    of_peepholes,
    of_units,
    own_tile,
    per_row,
    per_unit,
    restarts,
    runs_reversed,
    stack_gates,
    store_gates,
    time_of,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES + RUNTIME_EXTRAS)
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
    lengths,  # [B] int32 or None
    reset,  # [rows] int32 or None
    flags,  # [D, batch tiles, hidden tiles] int32 or None
    board,  # int64 or None, see alarm.py
    peephole,  # [D, 3, H] or None: to i, f and o
    gain_hh,  # [D, 4, H] or None: without layer normalisation
    norm_c,  # [D, 2, H] or None: gain and bias
    seed,  # [D] int64 or None: no masks of single steps are drawn
    h_mask,  # [D, B, H] or None
    product,  # [rows, D, 4, H] or None
    stats,  # [rows, D, 4] or None
    pairs,  # [rows, D, 2, hidden tiles, 2] or None
    dproduct,  # [rows, D, 4, H] or None
    dh_0,  # [D, B, H] or None
    dh_reset,  # [D, B, H] or None
    dpeephole,  # [3, D, B, H] or None
    dnorm_c,  # [2, D, B, H] or None
    time_begin,  # time of the first row, where this is a window of a longer sequence
    zoneout_h, zoneout_c, recurrent_dropout,  # probabilities in units of 2^-24, None for 0
    cell_clip, grad_clip,  # None for none
    batch, seq_len, row_stride_t, row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin, step_end,
    H: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr, PRECISION: tl.constexpr,
    COUPLED: tl.constexpr, SAMPLED: tl.constexpr,
    PLACEMENT: tl.constexpr, PROTOCOL: tl.constexpr, RESIDENT: tl.constexpr, UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps step_end - 1 .. step_begin."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    NORM: tl.constexpr = gain_hh is not None
    PUBLISHED: tl.constexpr = 3 if NORM else 1  # tiles that a program publishes in a step
    dtype: tl.constexpr = dgates.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    EXACT: tl.constexpr = dtype == tl.float32 and PRECISION != "tf32"
    hidden_tile = tl.program_id(0)
    batch_tile = first_tile + tl.program_id(1)
    direction = tl.program_id(2)
    reverse = runs_reversed(direction, ORDER)
    b, unit, in_batch, owned, state, length = own_tile(
        hidden_tile, batch_tile, direction, lengths, batch, seq_len, H, UNITS_FIRST, BLOCK_B, BLOCK_H
    )
    if flags is not None:
        flags += (direction * tl.cdiv(batch, BLOCK_B) + batch_tile) * TILES

    CARRIED: tl.constexpr = PLACEMENT == "stepwise"
    dc = begin_sum(dc_0, state, owned, compute, CARRIED)
    if dc_n is not None and not CARRIED:
        dc = tl.load(dc_n + state, mask=owned, other=0.0).to(compute)
    if dc_reset is not None:
        dc_fresh = begin_sum(dc_reset, state, owned, compute, CARRIED)

    w_ci, w_cf, w_co = None, None, None
    if peephole is not None:
        w_ci, w_cf, w_co = of_peepholes(peephole, direction, unit, H, compute, UNITS_FIRST)
    if NORM:
        gain_i, gain_f, gain_g, gain_o = of_gates(gain_hh, direction, unit, H, compute, UNITS_FIRST)
        gain_c = of_units(norm_c, 0, 2, direction, unit, H, compute, UNITS_FIRST)
        bias_c = of_units(norm_c, 1, 2, direction, unit, H, compute, UNITS_FIRST)
    STATES = tl.cast(batch, tl.int64) * (D * H)  # from one sum of dpeephole, dnorm_c to the next
    if h_mask is not None:
        own_mask = tl.load(h_mask + state, mask=owned, other=0.0).to(compute)
    if zoneout_h is not None:
        dh_old = begin_sum(dh_0, state, owned, compute, CARRIED)
        if dh_reset is not None:
            dh_fresh = begin_sum(dh_reset, state, owned, compute, CARRIED)
    if peephole is not None:
        dw_ci = begin_sum(dpeephole, state, owned, compute, CARRIED)
        dw_cf = begin_sum(dpeephole + STATES, state, owned, compute, CARRIED)
        dw_co = begin_sum(dpeephole + 2 * STATES, state, owned, compute, CARRIED)
    if NORM:
        dgain_c = begin_sum(dnorm_c, state, owned, compute, CARRIED)
        dbias_c = begin_sum(dnorm_c + STATES, state, owned, compute, CARRIED)

    exchanged = dproduct if NORM else dgates
    weights, w_hh = (), w_hh + direction.to(tl.int64) * (4 * H * H)
    if PLACEMENT == "local":
        weights = gate_weights(w_hh, unit, H, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H)
    elif RESIDENT:
        weights = resident_weights(w_hh, unit, H, True, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K)
    if RESIDENT and PLACEMENT != "stepwise":
        never = step_begin < 0
        dc = in_registers(weights, dc, never, dtype, compute, True, PRECISION, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H)

    dh_rec = tl.zeros(owned.shape, compute)
    last_row = time_of(step_end - 1, length, reverse) * row_stride_t + b * row_stride_b
    last = per_row((last_row * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
    c = tl.load(cells + last, mask=owned, other=0.0).to(compute)

    for count in range(step_end - step_begin):
        step = step_end - 1 - count
        active = step < length
        watch = (board, step)
        time = time_of(step, length, reverse)
        rows = time * row_stride_t + b * row_stride_b
        restart = restarts(reset, step, length, rows, in_batch, reverse, row_stride_t)
        # What does not depend on the other programs is asked for before waiting for them.
        offset = per_row((rows * D + direction) * (4 * H), UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        i, f, g, o = load_gates(gates, offset, owned, H, compute)
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
        keep_h, keep_c, g_scale = None, None, None
        bits_h, bits_c, bits_g = step_bits(seed, direction, reverse, unit, b, time + time_begin, SAMPLED, UNITS_FIRST)
        if zoneout_h is not None:
            keep_h = kept_by_zoneout(bits_h, zoneout_h, compute, SAMPLED)
        if zoneout_c is not None:
            keep_c = kept_by_zoneout(bits_c, zoneout_c, compute, SAMPLED)
        if recurrent_dropout is not None:
            g_scale = dropout_scale(bits_g, recurrent_dropout, compute)
        if NORM:
            if PLACEMENT != "local":
                z_i, z_f, z_g, z_o = load_gates(product, offset, owned, H, compute)
            mean_z, rstd_z, mean_c, rstd_c = load_moments(stats + (rows * D + direction) * 4, in_batch)
        dh = tl.zeros(owned.shape, compute)
        if dout is not None:
            sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
            dh = tl.load(dout + sequence, mask=owned, other=0.0).to(compute)
        if dh_n is not None:
            final = per_row(step == length - 1, UNITS_FIRST)
            dh += tl.load(dh_n + state, mask=owned & final, other=0.0).to(compute)

        if PLACEMENT != "local":
            inner = step + 1 < seq_len  # at the last step anything is read, and not used
            after = time_of(tl.minimum(step + 1, seq_len - 1), length, reverse) * row_stride_t + b * row_stride_b
            await_flags(flags, (seq_len - 1 - step) * PUBLISHED, watch, TILES, triton.next_power_of_2(TILES), PROTOCOL)
            dh_rec = recurrent_product(
                exchanged + (after * D + direction) * (4 * H), inner, None, watch, weights, w_hh, unit, compute,
                H, 4 * H, True, PRECISION, PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
            )  # fmt: skip
            dh_rec = tl.where(inner, dh_rec, 0.0)
            if reset is not None:
                after_restart = restarts(reset, step + 1, length, after, in_batch & inner, reverse, row_stride_t)
                dh_rec = tl.where(per_row(after_restart, UNITS_FIRST), 0.0, dh_rec)
        if h_mask is not None:
            dh_rec *= own_mask
        dh += restored(dh_rec, 2, PRECISION, False)
        if zoneout_h is not None:
            dh += dh_old

        live = per_row(active, UNITS_FIRST) & owned
        if dcells is not None:
            sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
            dc += tl.load(dcells + sequence, mask=live, other=0.0).to(compute)
        dh_new, dh_kept = zoneout_backward(dh, keep_h, SAMPLED)
        dc_new, dc_kept = zoneout_backward(dc, keep_c, SAMPLED)
        raw, c_new = c, c
        if cell_clip is not None or zoneout_c is not None:
            raw = candidate(i, f, g, c_prev, g_scale, NORM)
            c_new = clipped(raw, cell_clip)
        seen = c_new
        if NORM:
            own_pairs = pairs + (rows * D + direction) * (4 * TILES)
            published = (seq_len - 1 - step) * PUBLISHED
            normed = (c_new - per_row(mean_c, UNITS_FIRST)) * per_row(rstd_c, UNITS_FIRST)
            seen = gain_c * normed + bias_c
        do, dseen = lstm_output_backward(o, seen, dh_new, EXACT)
        if NORM:
            # Beyond its length a row's saved tensors mean nothing, and sums would keep a NaN.
            dseen = tl.where(live, dseen, 0.0)
            normed = tl.where(live, normed, 0.0)
            dgain_c += dseen * normed
            dbias_c += dseen
            dseen = norm_state_backward(
                dseen, gain_c, normed, rstd_c, owned, watch, own_pairs, in_batch, flags, published + 1, H,
                BLOCK_H, UNITS_FIRST, PROTOCOL,
            )  # fmt: skip
        dc_new += dseen
        di = None
        df = None
        dg = None
        if dactivated is not None:
            di, df, dg, more = load_gates(dactivated, offset, live, H, compute)
            do += more
        da_i, da_f, da_g, da_o, dc_prev = lstm_backward_step(
            i, f, g, o, c_prev, raw, c_new, di, df, dg, do, dc_new, w_ci, w_cf, w_co, g_scale, cell_clip, grad_clip,
            COUPLED,
        )  # fmt: skip
        if zoneout_c is not None:
            dc_prev += dc_kept
        # Beyond its length a row's saved gates mean nothing, not even a finite number.
        da_i, da_f = tl.where(live, da_i, 0.0), tl.where(live, da_f, 0.0)
        da_g, da_o = tl.where(live, da_g, 0.0), tl.where(live, da_o, 0.0)
        if peephole is not None:
            dw_ci += tl.where(live, da_i * c_prev, 0.0)
            dw_cf += tl.where(live, da_f * c_prev, 0.0)
            dw_co += tl.where(live, da_o * c_new, 0.0)
        d_i, d_f, d_g, d_o = publishable_gates(da_i, da_f, da_g, da_o, dtype)
        if not NORM:
            publish_gates(dgates + offset, d_i, d_f, d_g, d_o, owned, H, PROTOCOL)
        else:
            store_gates(dgates, offset, owned, d_i, d_f, d_g, d_o, H)
            if PLACEMENT == "local":  # late, with nobody to wait for: its tiles are large, and registers few
                z_i, z_f, z_g, z_o = load_gates(product, offset, owned, H, compute)
            dz_i, dz_f, dz_g, dz_o = norm_gates_backward(
                da_i, da_f, da_g, da_o, z_i, z_f, z_g, z_o, gain_i, gain_f, gain_g, gain_o, mean_z, rstd_z, live, owned,
                watch, own_pairs + 2 * TILES, in_batch, flags, published + 2, H, COUPLED, BLOCK_H, UNITS_FIRST,
                PROTOCOL,
            )  # fmt: skip
            d_i, d_f, d_g, d_o = publishable_gates(dz_i, dz_f, dz_g, dz_o, dtype)
            publish_gates(dproduct + offset, d_i, d_f, d_g, d_o, owned, H, PROTOCOL)
        raise_flag(flags, hidden_tile, (seq_len - step) * PUBLISHED, PROTOCOL)

        dc = tl.where(live, dc_prev, dc)
        if reset is not None:
            if dc_reset is not None:
                dc_fresh += tl.where(fresh & live, dc_prev, 0.0)
            dc = tl.where(fresh & live, 0.0, dc)
        if zoneout_h is not None:
            dh_old = tl.where(live, dh_kept, dh_old)
            if reset is not None:
                if dh_reset is not None:
                    dh_fresh += tl.where(fresh & live, dh_kept, 0.0)
                dh_old = tl.where(fresh & live, 0.0, dh_old)
        c = c_before
        if PLACEMENT == "local":
            d = stack_gates(d_i, d_f, d_g, d_o, SPLIT_K, UNITS_FIRST)
            dh_rec = gates_product(d, weights[0], compute, PRECISION, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H)
            if reset is not None:
                dh_rec = tl.where(fresh, 0.0, dh_rec)

    if zoneout_h is not None:
        tl.store(dh_0 + state, dh_old, mask=owned)
        if dh_reset is not None:
            tl.store(dh_reset + state, dh_fresh, mask=owned)
    if peephole is not None:
        tl.store(dpeephole + state, dw_ci, mask=owned)
        tl.store(dpeephole + STATES + state, dw_cf, mask=owned)
        tl.store(dpeephole + 2 * STATES + state, dw_co, mask=owned)
    if NORM:
        tl.store(dnorm_c + state, dgain_c, mask=owned)
        tl.store(dnorm_c + STATES + state, dbias_c, mask=owned)
    tl.store(dc_0 + state, dc, mask=owned)
    if dc_reset is not None:
        tl.store(dc_reset + state, dc_fresh, mask=owned)


def lstm_backward(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, cells: Tensor, w_hh: Tensor,
    c_0: Tensor | None, layout: Layout, config: Config, precision: str, lengths: Tensor | None = None,
    reset: Tensor | None = None, reset_c: Tensor | None = None, order: str | None = None,
    dcells: Tensor | None = None, dactivated: Tensor | None = None, extras: Extras = PLAIN,
    product: Tensor | None = None, stats: Tensor | None = None, launch: Launcher = run,
) -> Gradients:  # fmt: skip
    """Run the backward recurrence of one layer.

    All tensors are contiguous and of one floating type, but for c_0, reset_c and dc_n, which may have
    any; nothing given is modified. dcells [rows, D, H], dactivated [rows, D, 4H]: gradients of the saved
    cells and activated gates themselves. product, stats: with layer normalisation. The gradients of
    states come in the compute type.
    """
    directions, hidden_size = w_hh.shape[0], w_hh.shape[2]
    if config.placement == "local" and config.split_k not in (4, 8):
        raise ValueError("placement 'local' splits the depth by gates in the backward pass: split_k is 4 or 8")
    extras.check(config, hidden_size)
    dgates = torch.empty_like(gates)
    dtype = compute_dtype(gates.dtype)
    dc_0 = gates.new_empty((directions, layout.batch, hidden_size), dtype=dtype)
    dc_reset = torch.empty_like(dc_0) if reset_c is not None else None
    if config.placement == "stepwise":
        dc_0 = torch.zeros_like(dc_0) if dc_n is None else dc_n.to(dtype, copy=True)
        dc_reset = torch.zeros_like(dc_0) if reset_c is not None else None
    own = extras.gradients(dgates, dc_0, reset_c is not None)
    pairs = extras.pairs(layout, config, hidden_size, w_hh)
    arguments = dict(
        dout=dout, dh_n=dh_n, dc_n=dc_n, dcells=dcells, dactivated=dactivated, gates=gates, cells=cells, c_0=c_0,
        reset_c=reset_c, w_hh=w_hh, dgates=dgates, dc_0=dc_0, dc_reset=dc_reset,
        lengths=lengths, reset=wide_marks(reset), product=product, stats=stats, pairs=pairs,
        grad_clip=extras.cell.grad_clip or None,
    )  # fmt: skip
    dproduct = own["dproduct"]
    exchanged = (dgates if dproduct is None else dproduct, pairs)
    recurrence = Recurrence(config, layout, hidden_size, directions, order, precision, exchanged, backward=True)
    launch(lstm_backward_kernel, recurrence, arguments | own | extras.arguments())
    return Gradients(dgates, dc_0, dc_reset, **own)
