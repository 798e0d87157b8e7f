"""Where things are: tile axes, time and row indices, and how four gates share one dot.

A state tile is [BLOCK_B, BLOCK_H], or [BLOCK_H, BLOCK_B] when UNITS_FIRST: then the weights are
the first operand of the dot, which keeps them on the wide axis of the matrix unit at small batch.

Sequence buffers are row major: row(t, b) = t * row_stride_t + b * row_stride_b, (B, 1) for
time-major and (1, T) for batch-first, followed by [D, 4, H] (gates, dgates) or [D, H] (out, cells,
dout). Rows are int64: T * B * 4H may pass 2^31. State buffers are [D, B, H].
"""

import triton
import triton.language as tl

from .records import Gates, Peephole, Position, State, Tile


@triton.jit
def per_row(v, how: tl.constexpr):
    """[BLOCK_B] -> broadcasts over the units of a state tile."""
    if how.UNITS_FIRST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def per_unit(v, how: tl.constexpr):
    """[BLOCK_H] -> broadcasts over the batch rows of a state tile."""
    if how.UNITS_FIRST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def own_tile(first_tile, batch, seq_len, row_stride_t, row_stride_b, lengths, how: tl.constexpr):
    """The tile of this program.

    Rows beyond the batch have the index and the length of its last one: they read what it reads, and store nothing.
    """
    hidden_tile = tl.program_id(0)
    batch_tile = first_tile + tl.program_id(1)
    direction = tl.program_id(2)
    row = (batch_tile * how.BLOCK_B + tl.arange(0, how.BLOCK_B)).to(tl.int64)
    unit = hidden_tile * how.BLOCK_H + tl.arange(0, how.BLOCK_H)
    in_batch = row < batch
    b = tl.minimum(row, batch - 1)
    owned = per_row(in_batch, how) & per_unit(unit < how.H, how)
    state = per_row((direction * batch + b) * how.H, how) + per_unit(unit, how)
    length = tl.zeros([how.BLOCK_B], tl.int32) + seq_len
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int32)
    group = direction * tl.cdiv(batch, how.BLOCK_B) + batch_tile
    return Tile(
        b, unit, in_batch, owned, state, length, hidden_tile, group, direction, runs_reversed(direction, how.ORDER),
        batch, row_stride_t, row_stride_b,
    )  # fmt: skip


@triton.jit
def runs_reversed(direction, ORDER: tl.constexpr):
    """Whether this set of weights goes from a row's end to its start; of "both" every second does."""
    if ORDER == "both":
        return direction % 2 == 1
    elif ORDER == "reverse":
        return direction >= 0
    else:
        return direction < 0


@triton.jit
def time_of(step, tile):
    """Time index (int64) that each row handles at `step`: a bijection of [0, T) onto itself.

    The reverse direction starts at each row's true end; steps beyond it visit the padding.
    """
    return tl.where(tile.reverse & (step < tile.length), tile.length - 1 - step, step).to(tl.int64)


@triton.jit
def rows_at(time, tile):
    """[BLOCK_B] rows of a sequence buffer."""
    return time * tile.row_stride_t + tile.b * tile.row_stride_b


@triton.jit
def position(step, marks, tile):
    """Where the tile is at a step."""
    active = step < tile.length
    time = time_of(step, tile)
    rows = rows_at(time, tile)
    return Position(step, time, rows, active, restarts(marks, step, rows, tile.in_batch, tile))


@triton.jit
def restarts(marks, step, rows, valid, tile):
    """[BLOCK_B] bool: rows whose state is reset before `step`.

    marks[t] separates t - 1 from t, so the reverse direction restarts before t - 1.
    """
    if marks is None:
        return valid & False
    else:
        mark = valid & (step < tile.length) & ((step > 0) | (tile.reverse == 0))
        shift = tile.reverse.to(tl.int64) * tile.row_stride_t
        return tl.load(marks + rows + shift, mask=mark, other=0) != 0


@triton.jit
def in_gates(rows, tile, how: tl.constexpr):
    """Offsets in a buffer [rows, D, 4, H], those of gate i: a state tile."""
    return per_row((rows * how.D + tile.direction) * (4 * how.H), how) + per_unit(tile.unit, how)


@triton.jit
def in_sequence(rows, tile, how: tl.constexpr):
    """Offsets in a buffer [rows, D, H]: a state tile."""
    return per_row((rows * how.D + tile.direction) * how.H, how) + per_unit(tile.unit, how)


@triton.jit
def of_units(vectors, index: tl.constexpr, COUNT: tl.constexpr, tile, how: tl.constexpr):
    """One of COUNT vectors [D, COUNT, H] for the units of a state tile, over which it broadcasts."""
    own = vectors + (tile.direction * COUNT + index) * how.H + per_unit(tile.unit, how)
    return tl.load(own, mask=per_unit(tile.unit < how.H, how), other=0.0).to(how.compute)


@triton.jit
def of_gates(vectors, tile, how: tl.constexpr):
    """The four vectors of [D, 4, H] as `of_units` gives them."""
    return Gates(
        of_units(vectors, 0, 4, tile, how),
        of_units(vectors, 1, 4, tile, how),
        of_units(vectors, 2, 4, tile, how),
        of_units(vectors, 3, 4, tile, how),
    )


@triton.jit
def of_peephole(vectors, tile, how: tl.constexpr):
    """The three vectors of [D, 3, H]."""
    return Peephole(
        of_units(vectors, 0, 3, tile, how), of_units(vectors, 1, 3, tile, how), of_units(vectors, 2, 3, tile, how)
    )  # fmt: skip


@triton.jit
def load_tile(buffer, offset, mask, how: tl.constexpr):
    """A state tile in the compute type, 0 where masked."""
    return tl.load(buffer + offset, mask=mask, other=0.0).to(how.compute)


@triton.jit
def load_state(state, tile, how: tl.constexpr):
    """The program's part of buffers [D, B, H]; zeros for None."""
    if state.h is None:
        return State(tl.zeros(tile.owned.shape, how.compute), tl.zeros(tile.owned.shape, how.compute))
    else:
        return State(
            load_tile(state.h, tile.state, tile.owned, how), load_tile(state.c, tile.state, tile.owned, how)
        )  # fmt: skip


@triton.jit
def load_gates(buffer, offset, mask, how: tl.constexpr):
    """Four state tiles of a [rows, D, 4, H] buffer, 0 where masked."""
    return Gates(
        load_tile(buffer, offset, mask, how),
        load_tile(buffer, offset + how.H, mask, how),
        load_tile(buffer, offset + 2 * how.H, mask, how),
        load_tile(buffer, offset + 3 * how.H, mask, how),
    )


@triton.jit
def store_gates(buffer, offset, mask, gates, how: tl.constexpr):
    tl.store(buffer + offset, gates.i.to(how.dtype), mask=mask)
    tl.store(buffer + offset + how.H, gates.f.to(how.dtype), mask=mask)
    tl.store(buffer + offset + 2 * how.H, gates.g.to(how.dtype), mask=mask)
    tl.store(buffer + offset + 3 * how.H, gates.o.to(how.dtype), mask=mask)


@triton.jit
def split_gates(acc, how: tl.constexpr):
    """Rows (columns) of `acc` run over (unit, gate), gate fastest -> four state tiles."""
    if how.UNITS_FIRST:
        quad = tl.permute(tl.reshape(acc, (how.BLOCK_H, 2, 2, how.BLOCK_B)), (0, 3, 1, 2))
    else:
        quad = tl.reshape(acc, (how.BLOCK_B, how.BLOCK_H, 2, 2))
    i_g, f_o = tl.split(quad)
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return Gates(i, f, g, o)


@triton.jit
def stack_gates(gates, how: tl.constexpr):
    """Four state tiles -> [SPLIT_K, ..]: of each gate the units in SPLIT_K / 4 parts."""
    PARTS: tl.constexpr = how.SPLIT_K // 4
    M: tl.constexpr = gates.i.shape[0]
    N: tl.constexpr = gates.i.shape[1]
    quad = tl.join(tl.join(gates.i, gates.g), tl.join(gates.f, gates.o))
    if how.UNITS_FIRST:
        parts = tl.permute(tl.reshape(quad, (PARTS, M // PARTS, N, 2, 2)), (3, 4, 0, 1, 2))
        return tl.reshape(parts, (how.SPLIT_K, M // PARTS, N))
    else:
        parts = tl.permute(tl.reshape(quad, (M, PARTS, N // PARTS, 2, 2)), (3, 4, 1, 0, 2))
        return tl.reshape(parts, (how.SPLIT_K, M, N // PARTS))
