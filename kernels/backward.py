"""Backward recurrence: dh_{t-1} = dgates_t W_hh, for all T steps in reverse.

Buffers (layouts in tiles.py; T*B rows; records.py has those of its records):
- kept: activated gates [rows, D, 4, H] and cells c_t [rows, D, H] as the forward pass saved them; only read.
- dgates [rows, D, 4, H]: gradient of the pre-activations, written once, 0 beyond a row's length;
  with an exchange also what programs hand each other. Everything that is a function of it over
  the whole sequence (dx, dW, db, dh_0) is a GEMM or a reduction after the launch.
- dinitial, dreset [D, B, H] in the compute type: c: gradients of the initial cell state, and of the reset one, summed
  over a row's resets; h, with zoneout: what reaches the initial and the reset h by it, not through the recurrent
  product. Between the launches of `stepwise` they hold the state, and so do all that are sums.
- dpeephole [3, D, B, H], norm.dnorm_c [2, D, B, H] in the compute type: of these weights, for each row of the batch.
- norm.dproduct [rows, D, 4, H]: gradient of h_{t-1} W_hh^T, which is then what programs exchange in place of dgates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import clipped, lstm_backward_step, lstm_output_backward, next_cell, rounded_product, zoneout_backward
from .config import Config, Layout, compute_dtype
from .exchange import await_flags, publish_gates, publishable_gates, raise_flag
from .launch import Launcher, Recurrence, how_of, run, wide_marks
from .masks import draw
from .norm import load_moments, norm_backward, norm_gates_backward, norm_weights, normalised
from .product import in_registers, local_product, recurrent_product, resident_weights, restored
from .records import (
    RUNTIME,
    Cells,
    Gates,
    Incoming,
    Kept,
    Norm,
    Peephole,
    Peers,
    Resets,
    Sharing,
    Source,
    State,
    Sums,
)
from .sums import begin_sum, begin_sums, store_sum, store_sums, with_peephole
from .tiles import (
    in_gates,
    in_sequence,
    load_gates,
    load_tile,
    of_peephole,
    own_tile,
    per_row,
    position,
    restarts,
    rows_at,
    stack_gates,
    store_gates,
    time_of,
)
from .variants import PLAIN, Gradients, Variants


@triton.jit(do_not_specialize=RUNTIME)
def lstm_backward_kernel(
    incoming,  # Incoming
    kept,  # Kept
    initial_c,  # [D, B, H] or None: zeros
    resets,  # Resets; h is not read
    w_hh,  # [D, 4H, H]
    dgates,  # [rows, D, 4, H]
    dinitial,  # State [D, B, H]; h with zoneout
    dreset,  # State [D, B, H]; what is None is not wanted
    lengths,  # [B] int32 or None
    exchange,  # Exchange
    peephole,  # [D, 3, H] or None: to i, f and o
    dpeephole,  # [3, D, B, H] or None
    norm,  # Norm
    masks,  # Masks
    scalars,  # Scalars
    batch, seq_len, row_stride_t, row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin, step_end,
    time_begin,  # time of the first row, where this is a window of a longer sequence
    how: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps step_end - 1 .. step_begin."""
    tile = own_tile(first_tile, batch, seq_len, row_stride_t, row_stride_b, lengths, how)
    flags = exchange.flags + tile.group * how.TILES if how.PROTOCOL == "flags" else None
    weights_c = Peephole(None, None, None)
    if peephole is not None:
        weights_c = of_peephole(peephole, tile, how)
    if how.NORM:
        gains = norm_weights(norm, tile, how)
    own_mask = None
    if masks.h_mask is not None:
        own_mask = load_tile(masks.h_mask, tile.state, tile.owned, how)
    states = tl.cast(batch, tl.int64) * (how.D * how.H)  # from one sum of dpeephole, dnorm_c to the next
    sums = begin_sums(dinitial, dreset, dpeephole, norm.dnorm_c, states, tile, how)
    dh_kept, dh_reset, dc_reset, dweights, dgain, dbias = sums

    exchanged = norm.dproduct if how.NORM else dgates
    w_hh += tile.direction.to(tl.int64) * (4 * how.H * how.H)
    weights = resident_weights(w_hh, tile, how)
    dc = in_registers(weights, last_dc(incoming.final, dinitial, tile, how), step_begin < 0, how)
    dh_next = tl.zeros(tile.owned.shape, how.compute)
    c = cell_at(kept.cells, step_end - 1, tile.owned, tile, how)

    for count in range(step_end - step_begin):
        step = step_end - 1 - count
        published = (seq_len - 1 - step) * how.PUBLISHED
        at = position(step, resets.marks, tile)
        peers = Peers(flags, exchange.board, step)
        # What does not depend on the other programs is asked for before waiting for them.
        offset = in_gates(at.rows, tile, how)
        gates = load_gates(kept.gates, offset, tile.owned, how)
        c_before = cell_at(kept.cells, step - 1, tile.owned & (step > 0), tile, how)
        restart = per_row(at.restart, how) & tile.owned
        c_prev = cell_before(c_before, initial_c, resets, restart, step, tile, how)
        drawn = draw(masks, at.time + time_begin, tile, how)
        if how.NORM:
            if how.PLACEMENT != "local":
                z = load_gates(norm.product, offset, tile.owned, how)
            of_z, of_c = load_moments(norm.stats + (at.rows * how.D + tile.direction) * 4, tile.in_batch)
        dh = given_dh(incoming, at, tile, how)

        if how.PLACEMENT != "local":
            dh_next = product_after(exchanged, weights, w_hh, resets.marks, seq_len, peers, tile, how)
        dh += restored(dh_next if own_mask is None else dh_next * own_mask, 2, False, how)
        if how.ZONEOUT_H:
            dh += dh_kept

        live = per_row(at.active, how) & tile.owned
        if incoming.kept.cells is not None:
            dc += load_tile(incoming.kept.cells, in_sequence(at.rows, tile, how), live, how)
        dh_new, dh_old = zoneout_backward(dh, drawn.keep_h, how.ZONEOUT_H, how.SAMPLED)
        dc_new, dc_old = zoneout_backward(dc, drawn.keep_c, how.ZONEOUT_C, how.SAMPLED)
        cells = cells_of(gates, c_prev, c, drawn.g_scale, scalars, how)
        if how.NORM:
            pairs = norm.pairs + (at.rows * how.D + tile.direction) * (4 * how.TILES)
            normed = normalised(cells.now, of_c, how)
            do, dseen = lstm_output_backward(gates.o, gains.gain * normed + gains.bias, dh_new, how.EXACT)
            # Beyond its length a row's saved tensors mean nothing, and sums would keep a NaN.
            dseen, normed = tl.where(live, dseen, 0.0), tl.where(live, normed, 0.0)
            dgain += dseen * normed
            dbias += dseen
            dnormed, sharing = rounded_product(dseen, gains.gain), Sharing(pairs, published + 1, peers)
            dc_new += norm_backward((dnormed,), (normed,), of_c.rstd, sharing, tile, how)[0]
        else:
            do, dseen = lstm_output_backward(gates.o, cells.now, dh_new, how.EXACT)
            dc_new += dseen
        d = Gates(None, None, None, do)
        if incoming.kept.gates is not None:
            d = with_activated(do, incoming.kept.gates, offset, live, how)
        da, dc_prev = lstm_backward_step(gates, cells, d, dc_new, weights_c, drawn.g_scale, scalars, how)
        if how.ZONEOUT_C:
            dc_prev += dc_old
        da = within(live, da)
        if dpeephole is not None:
            dweights = with_peephole(dweights, da, cells, live)
        d = publishable_gates(da, how.dtype)
        if how.NORM:
            store_gates(dgates, offset, tile.owned, d, how)
            if how.PLACEMENT == "local":  # late, with nobody to wait for: its tiles are large, and registers few
                z = load_gates(norm.product, offset, tile.owned, how)
            sharing = Sharing(pairs + 2 * how.TILES, published + 2, peers)
            d = publishable_gates(norm_gates_backward(da, z, gains.gates, of_z, live, sharing, tile, how), how.dtype)
        publish_gates(exchanged + offset, d, tile.owned, how.H, how.PROTOCOL)
        raise_flag(peers, tile.hidden_tile, (seq_len - step) * how.PUBLISHED, how.PROTOCOL)

        if dreset.c is not None:
            dc_reset += tl.where(restart & live, dc_prev, 0.0)
        dc = unless_restarted(tl.where(live, dc_prev, dc), resets.marks, restart & live)
        if dreset.h is not None:
            dh_reset += tl.where(restart & live, dh_old, 0.0)
        if how.ZONEOUT_H:
            dh_kept = unless_restarted(tl.where(live, dh_old, dh_kept), resets.marks, restart & live)
        c = c_before
        if how.PLACEMENT == "local":
            dh_next = unless_restarted(local_product(stack_gates(d, how), weights, how), resets.marks, restart)

    sums = Sums(dh_kept, dh_reset, dc_reset, dweights, dgain, dbias)
    store_sums(sums, dinitial, dreset, dpeephole, norm.dnorm_c, states, tile)
    store_sum(dinitial.c, dc, tile)


@triton.jit
def cells_of(gates, c_prev, c, g_scale, scalars, how: tl.constexpr):
    """c_t before and after it was clipped: c as it was saved, or made again where that is something else."""
    if scalars.cell_clip is None and not how.ZONEOUT_C:
        return Cells(c_prev, c, c)
    else:
        raw = next_cell(gates, c_prev, g_scale, how)
        return Cells(c_prev, raw, clipped(raw, scalars.cell_clip))


@triton.jit
def last_dc(final, dinitial, tile, how: tl.constexpr):
    """The gradient of the last c, or what an earlier launch has left."""
    if final.c is not None and how.PLACEMENT != "stepwise":
        return load_tile(final.c, tile.state, tile.owned, how)
    else:
        return begin_sum(dinitial.c, tile, how)


@triton.jit
def cell_at(cells, step, mask, tile, how: tl.constexpr):
    """c_t of a step as the forward pass saved it, 0 where masked."""
    return load_tile(cells, in_sequence(rows_at(time_of(step, tile), tile), tile, how), mask, how)


@triton.jit
def cell_before(c_before, initial_c, resets, restart, step, tile, how: tl.constexpr):
    """c_{t-1} as the cell has read it: that of the step before (0 at the first one), the initial or the reset one."""
    c = c_before
    if initial_c is not None:
        c += load_tile(initial_c, tile.state, tile.owned & (step == 0), how)
    if resets.marks is not None:
        c = tl.where(restart, 0.0, c)
        if resets.c is not None:
            c += load_tile(resets.c, tile.state, restart, how)
    return c


@triton.jit
def given_dh(incoming, at, tile, how: tl.constexpr):
    """The gradient of h_t that is given: of the output, and at a row's last step of h_n."""
    dh = tl.zeros(tile.owned.shape, how.compute)
    if incoming.out is not None:
        dh = load_tile(incoming.out, in_sequence(at.rows, tile, how), tile.owned, how)
    if incoming.final.h is not None:
        last = per_row(at.step == tile.length - 1, how)
        dh += load_tile(incoming.final.h, tile.state, tile.owned & last, how)
    return dh


@triton.jit
def product_after(exchanged, weights, w_hh, marks, seq_len, peers, tile, how: tl.constexpr):
    """The gradient that reaches h_t through the recurrent product of the step after."""
    step = peers.step
    inner = step + 1 < seq_len  # at the last step anything is read, and not used
    after = rows_at(time_of(tl.minimum(step + 1, seq_len - 1), tile), tile)
    await_flags(peers, (seq_len - 1 - step) * how.PUBLISHED, how.TILES, how.PROTOCOL)
    source = Source(exchanged + (after * how.D + tile.direction) * (4 * how.H), inner, None)
    dh = tl.where(inner, recurrent_product(source, weights, w_hh, peers, tile, 4 * how.H, how), 0.0)
    if marks is not None:
        restart = restarts(marks, step + 1, after, tile.in_batch & inner, tile)
        dh = tl.where(per_row(restart, how), 0.0, dh)
    return dh


@triton.jit
def with_activated(do, given, offset, live, how: tl.constexpr):
    """Gradients of the activated gates: of o through h_t, and of all what is given."""
    more = load_gates(given, offset, live, how)
    return Gates(more.i, more.f, more.g, do + more.o)


@triton.jit
def within(live, d):
    """Gradients of gates, 0 beyond a row's length: what is saved there means nothing, it may be no finite number."""
    return Gates(tl.where(live, d.i, 0.0), tl.where(live, d.f, 0.0), tl.where(live, d.g, 0.0), tl.where(live, d.o, 0.0))


@triton.jit
def unless_restarted(d, marks, restart):
    """A gradient of the state before a step, 0 where that began anew."""
    if marks is None:
        return d
    else:
        return tl.where(restart, 0.0, d)


def lstm_backward(
    dout: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, gates: Tensor, cells: Tensor, w_hh: Tensor,
    c_0: Tensor | None, layout: Layout, config: Config, precision: str, *, lengths: Tensor | None = None,
    reset: Tensor | None = None, reset_c: Tensor | None = None, order: str | None = None,
    dcells: Tensor | None = None, dactivated: Tensor | None = None, variants: Variants = PLAIN,
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
    variants.check(config, hidden_size)
    dgates = torch.empty_like(gates)
    stepwise, shape = config.placement == "stepwise", (directions, layout.batch, hidden_size)

    def new(*vectors: int) -> Tensor:
        """A buffer of states or of sums, to which the launches of `stepwise` add."""
        make = gates.new_zeros if stepwise else gates.new_empty
        return make((*vectors, *shape), dtype=compute_dtype(gates.dtype))

    zoneout, norm, fresh = variants.cell.zoneout_h > 0, variants.gain_hh is not None, reset_c is not None
    dc_0 = new() if dc_n is None or not stepwise else dc_n.to(compute_dtype(gates.dtype), copy=True)
    dinitial = State(new() if zoneout else None, dc_0)
    dreset = State(new() if zoneout and fresh else None, new() if fresh else None)
    dpeephole = new(3) if variants.peephole is not None else None
    dnorm_c = new(2) if norm else None
    dproduct = torch.empty_like(dgates) if norm else None
    pairs = variants.pairs(layout, config, hidden_size, w_hh)
    arguments = dict(
        incoming=Incoming(dout, State(dh_n, dc_n), Kept(dactivated, dcells)), kept=Kept(gates, cells), initial_c=c_0,
        resets=Resets(wide_marks(reset), None, reset_c), w_hh=w_hh, dgates=dgates, dinitial=dinitial, dreset=dreset,
        lengths=lengths, peephole=variants.peephole, dpeephole=dpeephole,
        norm=Norm(variants.gain_hh, variants.norm_c, pairs, stats, product, dproduct, dnorm_c), masks=variants.masks(),
        scalars=variants.scalars(), time_begin=variants.time_begin,
    )  # fmt: skip
    how = how_of(config, hidden_size, directions, order, precision, w_hh.dtype, variants.features, backward=True)
    exchanged = (dgates if dproduct is None else dproduct, pairs)
    launch(lstm_backward_kernel, Recurrence(config, layout, how, exchanged), arguments)
    return Gradients(dgates, dinitial.c, dreset.c, dproduct, dinitial.h, dreset.h, dpeephole, dnorm_c)
