"""Forward recurrence: gates_t = xp_t + h_{t-1} W_hh^T, then the cell with its variants, for all T steps.

Buffers (layouts in tiles.py; T*B rows):
- gates [rows, D, 4, H]: holds xp = x W_ih^T + bias on entry. With SAVE the activated gates i, f,
  g, o overwrite it; each program owns its tile, so nobody else reads what it overwrites.
- out [rows, D, H]: h_t, written once; with an exchange also what programs hand each other.
- cells [rows, D, H]: c_t, written with SAVE only.
- h_n, c_n [D, B, H]: the last state of each row.
- carry_h, carry_c [D, B, H] in the compute type: state between launches, `stepwise` only.
- stats [rows, D, 4] in the compute type, with layer normalisation and SAVE: mean and rstd of h_{t-1} W_hh^T, then of
  c_t before zoneout.
- sent [rows, D, H], with a mask on the recurrent h: h_t masked, which is then what programs hand each other; its
  initial and reset states come as masked_h_0 and masked_reset_h.
- pairs [rows, D, 2, hidden tiles, 2] in the compute type: what programs share for layer normalisation.
- x [B, I], w_ih [D, 4H, I], bias [D, 4H]: `single` only, where one launch computes xp as well and
  gates need not hold anything on entry.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cell import lstm_forward_step, lstm_output, zoneout
from .config import Config, Layout
from .exchange import await_flags, publish, publishable, raise_flag
from .extras import PLAIN, RUNTIME_EXTRAS, Extras
from .launch import Launcher, Recurrence, compute_dtype, run, wide_marks
from .masks import dropout_scale, kept_by_zoneout, step_bits
from .norm import moments, norm_gates, store_moments
from .product import in_registers, multiply, recurrent_product, resident_weights, restored, zero_product
from .tiles import (
    RUNTIME_SIZES,
    load_gates,
    of_gates,
    of_peepholes,
    of_units,
    own_tile,
    per_row,
    per_unit,
    restarts,
    runs_reversed,
    split_gates,
    store_gates,
    time_of,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES + RUNTIME_EXTRAS)
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
    reset,  # [rows] int32 or None
    flags,  # [D, batch tiles, hidden tiles] int32 or None
    board,  # int64 or None, see alarm.py
    x,  # [B, I] or None
    w_ih,  # [D, 4H, I] or None
    bias,  # [D, 4H] or None
    peephole,  # [D, 3, H] or None: to i, f and o
    gain_hh,  # [D, 4, H] or None: without layer normalisation
    norm_c,  # [D, 2, H] or None: gain and bias
    seed,  # [D] int64 or None: no masks of single steps are drawn
    h_mask,  # [D, B, H] or None
    masked_h_0,  # [D, B, H] or None
    masked_reset_h,  # [D, B, H] or None
    sent,  # [rows, D, H] or None
    pairs,  # [rows, D, 2, hidden tiles, 2] or None
    stats,  # [rows, D, 4] or None
    time_begin,  # time of the first row, where this is a window of a longer sequence
    zoneout_h, zoneout_c, recurrent_dropout,  # probabilities in units of 2^-24, None for 0
    cell_clip,  # None for none
    batch, seq_len, row_stride_t, row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin, step_end,
    H: tl.constexpr, INPUTS: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr, PRECISION: tl.constexpr,
    SAVE: tl.constexpr, COUPLED: tl.constexpr, SAMPLED: tl.constexpr, ALIGNED: tl.constexpr,
    PLACEMENT: tl.constexpr, PROTOCOL: tl.constexpr, RESIDENT: tl.constexpr, UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps [step_begin, step_end)."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    NORM: tl.constexpr = gain_hh is not None
    PUBLISHED: tl.constexpr = 3 if NORM else 1  # tiles that a program publishes in a step
    dtype: tl.constexpr = out.dtype.element_ty
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

    h = tl.zeros(owned.shape, compute)
    c = tl.zeros(owned.shape, compute)
    if PLACEMENT == "stepwise":
        h = tl.load(carry_h + state, mask=owned, other=0.0)
        c = tl.load(carry_c + state, mask=owned, other=0.0)
    elif h_0 is not None:
        h = tl.load(h_0 + state, mask=owned, other=0.0).to(compute)
        c = tl.load(c_0 + state, mask=owned, other=0.0).to(compute)

    w_ci, w_cf, w_co = None, None, None
    if peephole is not None:
        w_ci, w_cf, w_co = of_peepholes(peephole, direction, unit, H, compute, UNITS_FIRST)
    if NORM:
        gain_i, gain_f, gain_g, gain_o = of_gates(gain_hh, direction, unit, H, compute, UNITS_FIRST)
        gain_c = of_units(norm_c, 0, 2, direction, unit, H, compute, UNITS_FIRST)
        bias_c = of_units(norm_c, 1, 2, direction, unit, H, compute, UNITS_FIRST)
    start_h, fresh_h, exchanged = h_0, reset_h, out
    if h_mask is not None:
        start_h, fresh_h = masked_h_0, masked_reset_h
        own_mask = tl.load(h_mask + state, mask=owned, other=0.0).to(compute)
        if sent is not None:
            exchanged = sent

    w_hh += direction.to(tl.int64) * (4 * H * H)
    weights = ()
    if RESIDENT:
        weights = resident_weights(w_hh, unit, H, False, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K)
        if PLACEMENT != "stepwise":
            never = step_begin < 0
            c = in_registers(
                weights, c, never, dtype, compute, False, PRECISION, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H
            )

    if PLACEMENT == "single":
        projected = recurrent_product(
            x + b * INPUTS, False, None, None, weights, w_ih + direction.to(tl.int64) * (4 * H * INPUTS), unit,
            compute, H, INPUTS, False, PRECISION, PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
        )  # fmt: skip
        x_i, x_f, x_g, x_o = split_gates(projected, BLOCK_B, BLOCK_H, UNITS_FIRST)
        # Only for the weights: inputs are often numbers of few digits, which lose nothing.
        x_i, x_f = restored(x_i, 1, PRECISION, False), restored(x_f, 1, PRECISION, False)
        x_g, x_o = restored(x_g, 1, PRECISION, False), restored(x_o, 1, PRECISION, False)
        if bias is not None:
            b_i, b_f, b_g, b_o = of_gates(bias, direction, unit, H, compute, UNITS_FIRST)
            x_i, x_f, x_g, x_o = x_i + b_i, x_f + b_f, x_g + b_g, x_o + b_o

    for step in range(step_begin, step_end):
        active = step < length
        watch = (board, step)
        time = time_of(step, length, reverse)
        rows = time * row_stride_t + b * row_stride_b
        restart = restarts(reset, step, length, rows, in_batch, reverse, row_stride_t)
        # The projected input does not depend on the others: ask for it before waiting for them.
        offset = per_row((rows * D + direction) * (4 * H), UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        if PLACEMENT != "single":
            x_i, x_f, x_g, x_o = load_gates(gates, offset, owned, H, compute)
        keep_h, keep_c, g_scale = None, None, None
        bits_h, bits_c, bits_g = step_bits(seed, direction, reverse, unit, b, time + time_begin, SAMPLED, UNITS_FIRST)
        if zoneout_h is not None:
            keep_h = kept_by_zoneout(bits_h, zoneout_h, compute, SAMPLED)
        if zoneout_c is not None:
            keep_c = kept_by_zoneout(bits_c, zoneout_c, compute, SAMPLED)
        if recurrent_dropout is not None:
            g_scale = dropout_scale(bits_g, recurrent_dropout, compute)

        c_prev = c
        h_prev = h
        if reset is not None:
            fresh = per_row(restart, UNITS_FIRST) & owned
            if reset_c is None:
                c_prev = tl.where(fresh, 0.0, c)
            else:
                c_prev = tl.where(fresh, tl.load(reset_c + state, mask=fresh, other=0.0).to(compute), c)
            if PLACEMENT == "local" or zoneout_h is not None:
                if reset_h is None:
                    h_prev = tl.where(fresh, 0.0, h)
                else:
                    h_prev = tl.where(fresh, tl.load(reset_h + state, mask=fresh, other=0.0).to(compute), h)
        if PLACEMENT == "local":
            acc = zero_product(4 * BLOCK_H, BLOCK_B, UNITS_FIRST, 1, compute)
            operand = h_prev if h_mask is None else h_prev * own_mask
            acc = multiply(operand.to(dtype), weights[0], acc, UNITS_FIRST, PRECISION)
        else:
            # Row by row: the output one step ago, the initial state, or the reset state. Where a row begins with
            # zeros anything is read, and not used: a masked load would clear its registers first, in every step.
            before = time_of(tl.maximum(step - 1, 0), length, reverse) * row_stride_t + b * row_stride_b
            source = exchanged + (before * D + direction) * H
            foreign = None
            if h_0 is not None:
                source = tl.where(step == 0, start_h + (direction * batch + b) * H, source)
            if reset_h is not None:
                source = tl.where(restart, fresh_h + (direction * batch + b) * H, source)
                foreign = restart
            if ALIGNED:  # from Triton 3.8 on, what was known of both pointers is not known of the chosen one
                source = tl.multiple_of(source, 16)
            await_flags(flags, step * PUBLISHED, watch, TILES, triton.next_power_of_2(TILES), PROTOCOL)
            acc = recurrent_product(
                source, step > 0, foreign, watch, weights, w_hh, unit, compute, H, H, False, PRECISION,
                PROTOCOL, RESIDENT, UNITS_FIRST, SPLIT_K, BLOCK_B, BLOCK_H, BLOCK_K,
            )  # fmt: skip
            if h_0 is None:
                begun = step > 0
                if reset_h is not None:
                    begun = per_row(restart | begun, UNITS_FIRST)
                acc = tl.where(begun, acc, 0.0)
            if reset is not None and reset_h is None:
                acc = tl.where(per_row(restart, UNITS_FIRST), 0.0, acc)

        a_i, a_f, a_g, a_o = split_gates(acc, BLOCK_B, BLOCK_H, UNITS_FIRST)
        a_i, a_f = restored(a_i, 2, PRECISION, NORM), restored(a_f, 2, PRECISION, NORM)
        a_g, a_o = restored(a_g, 2, PRECISION, NORM), restored(a_o, 2, PRECISION, NORM)
        if NORM:
            own_pairs = pairs + (rows * D + direction) * (4 * TILES)
            a_i, a_f, a_g, a_o, mean_z, rstd_z = norm_gates(
                a_i, a_f, a_g, a_o, gain_i, gain_f, gain_g, gain_o, owned, watch, own_pairs, in_batch, flags,
                step * PUBLISHED + 1, H, COUPLED, BLOCK_H, UNITS_FIRST, PROTOCOL,
            )  # fmt: skip
        i, f, g, o, c_new = lstm_forward_step(
            a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o, c_prev, w_ci, w_cf, w_co, g_scale, cell_clip, COUPLED, NORM,
            EXACT,
        )  # fmt: skip
        seen = c_new
        if NORM:
            mean_c, rstd_c = moments(
                (c_new,), owned, watch, own_pairs + 2 * TILES, in_batch, flags, step * PUBLISHED + 2, H, BLOCK_H,
                UNITS_FIRST, PROTOCOL,
            )  # fmt: skip
            seen = gain_c * ((c_new - per_row(mean_c, UNITS_FIRST)) * per_row(rstd_c, UNITS_FIRST)) + bias_c
        h_new = zoneout(lstm_output(o, seen, EXACT), h_prev, keep_h, SAMPLED)
        if zoneout_h is not None:
            h_new = h_new.to(dtype).to(compute)  # what is kept is what was stored: a cut in time changes nothing
        c_new = zoneout(c_new, c_prev, keep_c, SAMPLED)
        live = per_row(active, UNITS_FIRST)
        c = tl.where(live, c_new, c)
        h = tl.where(live, h_new, h)
        sequence = per_row((rows * D + direction) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
        h_t = publishable(tl.where(live, h_new, 0.0), dtype)
        if sent is None:
            publish(out + sequence, h_t, owned, PROTOCOL)
        else:
            tl.store(out + sequence, h_t, mask=owned)
            publish(sent + sequence, publishable(tl.where(live, h_new * own_mask, 0.0), dtype), owned, PROTOCOL)
        raise_flag(flags, hidden_tile, (step + 1) * PUBLISHED, PROTOCOL)
        if SAVE and stats is not None:
            mine = in_batch & (hidden_tile == 0)
            store_moments(stats + (rows * D + direction) * 4, mean_z, rstd_z, mean_c, rstd_c, mine)
        if SAVE:
            store_gates(gates, offset, owned, i, f, g, o, H)
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
    extras: Extras = PLAIN,
    launch: Launcher = run,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run the forward recurrence of one layer -> out [rows, D, H], h_n, c_n [D, B, H], cells and stats or None.

    gates [rows, D, 4H] is consumed: with `save` it holds the activated gates afterwards. All
    tensors are contiguous and of one floating type, but for c_0, which may have any; lengths [B]
    int32, reset [rows] bool. order: see `runs_reversed`, by default "both" for D = 2. c_dtype: of c_n.
    projection: x [B, I], w_ih [D, 4H, I] and bias [D, 4H] for the placement `single`, of one step;
    gates is then only written, or None without `save`.
    """
    directions, hidden_size = w_hh.shape[0], w_hh.shape[2]
    if (projection is None) != (config.placement != "single") or (projection is not None and layout.seq_len != 1):
        raise ValueError("placement 'single' is for one step, with the projection of its input")
    if config.placement == "local" and config.split_k > 1:
        raise ValueError("placement 'local' takes no split_k in the forward pass")
    extras.check(config, hidden_size)
    x, w_ih, bias = projection or (None, None, None)
    out = w_hh.new_empty((layout.rows, directions, hidden_size))
    h_n = w_hh.new_empty((directions, layout.batch, hidden_size))
    c_n = torch.empty_like(h_n, dtype=c_dtype)
    cells = torch.empty_like(out) if save else None
    h_0, c_0 = state if state is not None else (None, None)
    reset_h, reset_c = reset_state if reset_state is not None else (None, None)
    masked_h_0, masked_reset_h = (extras.masked(h) for h in (h_0, reset_h))
    sent = torch.empty_like(out) if extras.h_mask is not None and config.placement != "local" else None
    pairs, stats = extras.pairs(layout, config, hidden_size, w_hh), extras.stats(layout, w_hh) if save else None
    carry_h = carry_c = None
    if config.placement == "stepwise":
        dtype = compute_dtype(w_hh.dtype)
        carry: dict[str, Any] = {"dtype": dtype, "memory_format": torch.contiguous_format, "copy": True}
        carry_h = torch.zeros_like(h_n, dtype=dtype) if h_0 is None else h_0.to(**carry)
        carry_c = torch.zeros_like(carry_h) if c_0 is None else c_0.to(**carry)
    arguments = dict(
        gates=gates, w_hh=w_hh, h_0=h_0, c_0=c_0, reset_h=reset_h, reset_c=reset_c, out=out, cells=cells, h_n=h_n,
        c_n=c_n, carry_h=carry_h, carry_c=carry_c, lengths=lengths, reset=wide_marks(reset), x=x, w_ih=w_ih, bias=bias,
        masked_h_0=masked_h_0, masked_reset_h=masked_reset_h, sent=sent, pairs=pairs, stats=stats, SAVE=save,
        INPUTS=0 if x is None else x.shape[1],
        ALIGNED=all(one is None or one.data_ptr() % 16 == 0 for one in (h_0, reset_h, masked_h_0, masked_reset_h))
        and hidden_size * w_hh.element_size() % 16 == 0,  # out and sent are of our own making
    )  # fmt: skip
    exchanged = (out if sent is None else sent, pairs)
    recurrence = Recurrence(config, layout, hidden_size, directions, order, precision, exchanged, backward=False)
    launch(lstm_forward_kernel, recurrence, arguments | extras.arguments())
    return out, h_n, c_n, cells, stats
