"""Forward recurrence: gates_t = xp_t + h_{t-1} W_hh^T, then the cell with its variants, for all T steps.

Buffers (layouts in tiles.py; T*B rows; records.py has those of its records):
- gates [rows, D, 4, H]: holds xp = x W_ih^T + bias on entry, unless `single` computes it in this launch. With SAVE the
  activated gates i, f, g, o overwrite it; each program owns its tile, so nobody else reads what it overwrites.
- out [rows, D, H]: h_t, written once; with an exchange also what programs hand each other.
- cells [rows, D, H]: c_t, written with SAVE only.
- final [D, B, H]: the last state of each row.
- carry [D, B, H] in the compute type: state between launches, `stepwise` only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cell import lstm_forward_step, lstm_output, zoneout
from .config import Config, Layout, compute_dtype
from .exchange import await_flags, publish, publishable, raise_flag
from .launch import Launcher, Recurrence, how_of, run, wide_marks
from .masks import draw
from .norm import moments, norm_gates, norm_weights, normalised, store_moments
from .product import gates_of, in_registers, local_product, recurrent_product, resident_weights
from .records import RUNTIME, Gates, Norm, Peephole, Peers, Projection, Resets, Sharing, Source, State
from .tiles import (
    in_gates,
    in_sequence,
    load_gates,
    load_state,
    load_tile,
    of_gates,
    of_peephole,
    own_tile,
    per_row,
    position,
    rows_at,
    store_gates,
    time_of,
)
from .variants import PLAIN, Variants


@triton.jit(do_not_specialize=RUNTIME)
def lstm_forward_kernel(
    gates,  # [rows, D, 4, H]
    w_hh,  # [D, 4H, H]
    initial,  # State [D, B, H]; None for zeros
    resets,  # Resets
    out,  # [rows, D, H]
    cells,  # [rows, D, H] or None
    final,  # State [D, B, H]
    carry,  # State [D, B, H]
    lengths,  # [B] int32 or None
    single,  # Projection
    exchange,  # Exchange
    peephole,  # [D, 3, H] or None: to i, f and o
    norm,  # Norm
    masks,  # Masks
    scalars,  # Scalars
    batch, seq_len, row_stride_t, row_stride_b,
    first_tile,  # first batch tile of this launch
    step_begin, step_end,
    time_begin,  # time of the first row, where this is a window of a longer sequence
    how: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H units of BLOCK_B sequences in one direction, steps [step_begin, step_end)."""
    tile = own_tile(first_tile, batch, seq_len, row_stride_t, row_stride_b, lengths, how)
    flags = exchange.flags + tile.group * how.TILES if how.PROTOCOL == "flags" else None
    if how.PLACEMENT == "stepwise":
        state = load_state(carry, tile, how)
    else:
        state = load_state(initial, tile, how)
    weights_c = Peephole(None, None, None)
    if peephole is not None:
        weights_c = of_peephole(peephole, tile, how)
    if how.NORM:
        gains = norm_weights(norm, tile, how)
    w_hh += tile.direction.to(tl.int64) * (4 * how.H * how.H)
    weights = resident_weights(w_hh, tile, how)
    state = State(state.h, in_registers(weights, state.c, step_begin < 0, how))
    own_mask = None
    if masks.h_mask is not None:
        own_mask = load_tile(masks.h_mask, tile.state, tile.owned, how)
    if how.PLACEMENT == "single":
        x = project(single, weights, tile, how)

    for step in range(step_begin, step_end):
        at = position(step, resets.marks, tile)
        peers = Peers(flags, exchange.board, step)
        # The projected input does not depend on the others: ask for it before waiting for them.
        offset = in_gates(at.rows, tile, how)
        if how.PLACEMENT != "single":
            x = load_gates(gates, offset, tile.owned, how)
        drawn = draw(masks, at.time + time_begin, tile, how)
        before = restarted(state, resets, at, tile, how)

        if how.PLACEMENT == "local":
            z = local_product(before.h if own_mask is None else before.h * own_mask, weights, how)
        else:
            rows = rows_before(out, initial, resets, masks, at, tile, how)
            source = Source(rows, step > 0, at.restart if resets.h is not None else None)
            await_flags(peers, step * how.PUBLISHED, how.TILES, how.PROTOCOL)
            z = recurrent_product(source, weights, w_hh, peers, tile, how.H, how)
            z = unless_zeros(z, initial, resets, at, how)
        z = gates_of(z, 2, how)
        pairs = None
        if how.NORM:
            pairs = norm.pairs + (at.rows * how.D + tile.direction) * (4 * how.TILES)
            z, of_z = norm_gates(z, gains.gates, Sharing(pairs, step * how.PUBLISHED + 1, peers), tile, how)

        a = Gates(z.i + x.i, z.f + x.f, z.g + x.g, z.o + x.o)
        activated, c = lstm_forward_step(a, before.c, weights_c, drawn.g_scale, scalars, how)
        seen = c
        if how.NORM:
            of_c = moments((c,), Sharing(pairs + 2 * how.TILES, step * how.PUBLISHED + 2, peers), tile, how)
            seen = gains.gain * normalised(c, of_c, how) + gains.bias
        h = zoneout(lstm_output(activated.o, seen, how.EXACT), before.h, drawn.keep_h, how.ZONEOUT_H, how.SAMPLED)
        if how.ZONEOUT_H:
            h = h.to(how.dtype).to(how.compute)  # what is kept is what was stored: a cut in time changes nothing
        c = zoneout(c, before.c, drawn.keep_c, how.ZONEOUT_C, how.SAMPLED)
        live = per_row(at.active, how)
        state = State(tl.where(live, h, state.h), tl.where(live, c, state.c))

        sequence = in_sequence(at.rows, tile, how)
        send(out + sequence, masks.sent, sequence, tl.where(live, h, 0.0), own_mask, tile, how)
        raise_flag(peers, tile.hidden_tile, (step + 1) * how.PUBLISHED, how.PROTOCOL)
        if how.SAVE:
            if how.NORM:
                stats = norm.stats + (at.rows * how.D + tile.direction) * 4
                store_moments(stats, of_z, of_c, tile.in_batch & (tile.hidden_tile == 0))
            store_gates(gates, offset, tile.owned, activated, how)
            tl.store(cells + sequence, state.c.to(how.dtype), mask=tile.owned)

    if how.PLACEMENT == "stepwise":
        tl.store(carry.h + tile.state, state.h, mask=tile.owned)
        tl.store(carry.c + tile.state, state.c, mask=tile.owned)
    tl.store(final.h + tile.state, state.h.to(how.dtype), mask=tile.owned)
    tl.store(final.c + tile.state, state.c.to(final.c.dtype.element_ty), mask=tile.owned)


@triton.jit
def project(single, weights, tile, how: tl.constexpr):
    """The projected input of the one step that there is: gates."""
    source = Source(single.x + tile.b * how.INPUTS, False, None)
    w_ih = single.w_ih + tile.direction.to(tl.int64) * (4 * how.H * how.INPUTS)
    # Restored only for the weights: inputs are often numbers of few digits, which lose nothing.
    x = gates_of(recurrent_product(source, weights, w_ih, None, tile, how.INPUTS, how), 1, how)
    if single.bias is None:
        return x
    else:
        bias = of_gates(single.bias, tile, how)
        return Gates(x.i + bias.i, x.f + bias.f, x.g + bias.g, x.o + bias.o)


@triton.jit
def restarted(state, resets, at, tile, how: tl.constexpr):
    """The state before a step, begun anew where it is reset; h where the program itself reads it, see `rows_before`."""
    if resets.marks is None:
        return state
    else:
        restart = per_row(at.restart, how) & tile.owned
        if how.PLACEMENT == "local" or how.ZONEOUT_H:
            return State(
                replaced(state.h, resets.h, restart, tile, how), replaced(state.c, resets.c, restart, tile, how)
            )
        else:
            return State(state.h, replaced(state.c, resets.c, restart, tile, how))


@triton.jit
def replaced(old, buffer, where, tile, how: tl.constexpr):
    """A state tile with the values of a buffer [D, B, H], or zeros for None, at some places."""
    if buffer is None:
        return tl.where(where, 0.0, old)
    else:
        return tl.where(where, load_tile(buffer, tile.state, where, how), old)


@triton.jit
def rows_before(out, initial, resets, masks, at, tile, how: tl.constexpr):
    """Where each row's h_{t-1} lies, as the product reads it: among those of one step ago, or in a given state.

    Where a row begins with zeros anything is read, and not used (see `unless_zeros`): a masked load would clear its
    registers first, in every step.
    """
    exchanged = out if masks.sent is None else masks.sent
    before = rows_at(time_of(tl.maximum(at.step - 1, 0), tile), tile)
    rows = exchanged + (before * how.D + tile.direction) * how.H
    own = (tile.direction * tile.batch + tile.b) * how.H
    if initial.h is not None:
        rows = tl.where(at.step == 0, (initial.h if masks.h_0 is None else masks.h_0) + own, rows)
    if resets.h is not None:
        rows = tl.where(at.restart, (resets.h if masks.reset_h is None else masks.reset_h) + own, rows)
    if how.ALIGNED:  # from Triton 3.8 on, what was known of both pointers is not known of the chosen one
        rows = tl.multiple_of(rows, 16)
    return rows


@triton.jit
def unless_zeros(product, initial, resets, at, how: tl.constexpr):
    """A recurrent product without what was read where h_{t-1} is zero."""
    if initial.h is None:
        begun = at.step > 0
        if resets.h is not None:
            begun = per_row(at.restart | begun, how)
        product = tl.where(begun, product, 0.0)
    if resets.marks is not None and resets.h is None:
        product = tl.where(per_row(at.restart, how), 0.0, product)
    return product


@triton.jit
def send(out, sent, sequence, h, own_mask, tile, how: tl.constexpr):
    """Store h_t for the layer's result and for the other programs, who read it masked if there is a mask."""
    h_t = publishable(h, how.dtype)
    if sent is None:
        publish(out, h_t, tile.owned, how.PROTOCOL)
    else:
        tl.store(out, h_t, mask=tile.owned)
        publish(sent + sequence, publishable(h * own_mask, how.dtype), tile.owned, how.PROTOCOL)


def lstm_forward(
    gates: torch.Tensor | None,
    w_hh: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    layout: Layout,
    config: Config,
    precision: str,
    save: bool,
    *,
    lengths: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    reset_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    order: str | None = None,
    c_dtype: torch.dtype | None = None,
    projection: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    variants: Variants = PLAIN,
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
    variants.check(config, hidden_size)
    single = Projection(*(projection or ()))
    out = w_hh.new_empty((layout.rows, directions, hidden_size))
    h_n = w_hh.new_empty((directions, layout.batch, hidden_size))
    final = State(h_n, torch.empty_like(h_n, dtype=c_dtype))
    cells = torch.empty_like(out) if save else None
    initial, resets = State(*(state or ())), Resets(wide_marks(reset), *(reset_state or ()))
    masks = variants.masks()
    if variants.h_mask is not None:
        masks = masks._replace(
            h_0=variants.masked(initial.h),
            reset_h=variants.masked(resets.h),
            sent=torch.empty_like(out) if config.placement != "local" else None,
        )
    pairs, stats = variants.pairs(layout, config, hidden_size, w_hh), variants.stats(layout, w_hh) if save else None
    carry = State()
    if config.placement == "stepwise":
        dtype = compute_dtype(w_hh.dtype)
        options: dict[str, Any] = {"dtype": dtype, "memory_format": torch.contiguous_format, "copy": True}
        carry = State(*(torch.zeros_like(h_n, dtype=dtype) if one is None else one.to(**options) for one in initial))
    arguments = dict(
        gates=gates, w_hh=w_hh, initial=initial, resets=resets, out=out, cells=cells, final=final, carry=carry,
        lengths=lengths, single=single, peephole=variants.peephole,
        norm=Norm(variants.gain_hh, variants.norm_c, pairs, stats), masks=masks, scalars=variants.scalars(),
        time_begin=variants.time_begin,
    )  # fmt: skip
    collected = initial.h, resets.h, masks.h_0, masks.reset_h  # out and sent are of our own making
    how = how_of(
        config, hidden_size, directions, order, precision, w_hh.dtype, variants.features,
        save=save,
        inputs=0 if single.x is None else single.x.shape[1],
        aligned=all(one is None or one.data_ptr() % 16 == 0 for one in collected)
        and hidden_size * w_hh.element_size() % 16 == 0,
    )  # fmt: skip
    exchanged = (out if masks.sent is None else masks.sent, pairs)
    launch(lstm_forward_kernel, Recurrence(config, layout, how, exchanged), arguments)
    return out, final.h, final.c, cells, stats
