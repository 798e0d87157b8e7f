"""Where things are: tile axes, time and row indices, and how four gates share one dot.

A state tile is [BLOCK_B, BLOCK_H], or [BLOCK_H, BLOCK_B] when UNITS_FIRST: then the weights are
the first operand of the dot, which keeps them on the wide axis of the matrix unit at small batch.

Sequence buffers are row major: row(t, b) = t * row_stride_t + b * row_stride_b, (B, 1) for
time-major and (1, T) for batch-first, followed by [D, 4, H] (gates, dgates) or [D, H] (out, cells,
dout). Rows are int64: T * B * 4H may pass 2^31. State buffers are [D, B, H].

D counts sets of weights: the directions of a layer, or of each member of an ensemble in turn.
"""

import triton
import triton.language as tl

# Never part of a binary: no size of a batch, a sequence or a launch compiles anything anew.
RUNTIME_SIZES = ["batch", "seq_len", "row_stride_t", "row_stride_b", "first_tile", "step_begin", "step_end"]


@triton.jit
def per_row(v, UNITS_FIRST: tl.constexpr):
    """[BLOCK_B] -> broadcasts over the units of a state tile."""
    if UNITS_FIRST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def per_unit(v, UNITS_FIRST: tl.constexpr):
    """[BLOCK_H] -> broadcasts over the batch rows of a state tile."""
    if UNITS_FIRST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def of_units(
    vectors,
    index: tl.constexpr,
    COUNT: tl.constexpr,
    direction,
    unit,
    H: tl.constexpr,
    compute: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
):
    """One of COUNT vectors [D, COUNT, H] for the units of a state tile, over which it broadcasts."""
    own = vectors + (direction * COUNT + index) * H + per_unit(unit, UNITS_FIRST)
    return tl.load(own, mask=per_unit(unit < H, UNITS_FIRST), other=0.0).to(compute)


@triton.jit
def of_gates(vectors, direction, unit, H: tl.constexpr, compute: tl.constexpr, UNITS_FIRST: tl.constexpr):
    """The four vectors of [D, 4, H] as `of_units` gives them."""
    i = of_units(vectors, 0, 4, direction, unit, H, compute, UNITS_FIRST)
    f = of_units(vectors, 1, 4, direction, unit, H, compute, UNITS_FIRST)
    g = of_units(vectors, 2, 4, direction, unit, H, compute, UNITS_FIRST)
    o = of_units(vectors, 3, 4, direction, unit, H, compute, UNITS_FIRST)
    return i, f, g, o


@triton.jit
def of_peepholes(vectors, direction, unit, H: tl.constexpr, compute: tl.constexpr, UNITS_FIRST: tl.constexpr):
    """The three vectors of [D, 3, H]."""
    i = of_units(vectors, 0, 3, direction, unit, H, compute, UNITS_FIRST)
    f = of_units(vectors, 1, 3, direction, unit, H, compute, UNITS_FIRST)
    o = of_units(vectors, 2, 3, direction, unit, H, compute, UNITS_FIRST)
    return i, f, o


@triton.jit
def load_gates(buffer, offset, mask, H: tl.constexpr, compute: tl.constexpr):
    """Four state tiles of a [rows, D, 4, H] buffer, 0 where masked."""
    i = tl.load(buffer + offset, mask=mask, other=0.0).to(compute)
    f = tl.load(buffer + offset + H, mask=mask, other=0.0).to(compute)
    g = tl.load(buffer + offset + 2 * H, mask=mask, other=0.0).to(compute)
    o = tl.load(buffer + offset + 3 * H, mask=mask, other=0.0).to(compute)
    return i, f, g, o


@triton.jit
def store_gates(buffer, offset, mask, i, f, g, o, H: tl.constexpr):
    dtype: tl.constexpr = buffer.dtype.element_ty
    tl.store(buffer + offset, i.to(dtype), mask=mask)
    tl.store(buffer + offset + H, f.to(dtype), mask=mask)
    tl.store(buffer + offset + 2 * H, g.to(dtype), mask=mask)
    tl.store(buffer + offset + 3 * H, o.to(dtype), mask=mask)


@triton.jit
def begin_sum(buffer, state, owned, compute: tl.constexpr, CARRIED: tl.constexpr):
    """A state tile of zeros, or what an earlier launch has left of this sum."""
    if CARRIED:
        return tl.load(buffer + state, mask=owned, other=0.0)
    else:
        return tl.zeros(owned.shape, compute)


@triton.jit
def own_tile(
    hidden_tile,
    batch_tile,
    direction,
    lengths,
    batch,
    seq_len,
    H: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What a program owns: b [BLOCK_B] int64 and unit [BLOCK_H], the batch rows that exist, the
    elements of its state tile that exist, their offsets in a [D, B, H] buffer, and row lengths.

    Rows beyond the batch have the index and the length of its last one: they read what it reads, and store nothing.
    """
    row = (batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    unit = hidden_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    in_batch = row < batch
    b = tl.minimum(row, batch - 1)
    owned = per_row(in_batch, UNITS_FIRST) & per_unit(unit < H, UNITS_FIRST)
    state = per_row((direction * batch + b) * H, UNITS_FIRST) + per_unit(unit, UNITS_FIRST)
    length = tl.zeros([BLOCK_B], tl.int32) + seq_len
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int32)
    return b, unit, in_batch, owned, state, length


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
def time_of(step, length, reverse):
    """Time index (int64) that each row handles at `step`: a bijection of [0, T) onto itself.

    The reverse direction starts at each row's true end; steps beyond it visit the padding.
    """
    return tl.where(reverse & (step < length), length - 1 - step, step).to(tl.int64)


@triton.jit
def restarts(reset_ptr, step, length, rows, valid, reverse, row_stride_t):
    """[BLOCK_B] bool: rows whose state is reset before `step`.

    reset[t] separates t - 1 from t, so the reverse direction restarts before t - 1.
    """
    if reset_ptr is None:
        return valid & False
    else:
        mark = valid & (step < length) & ((step > 0) | (reverse == 0))
        shift = reverse.to(tl.int64) * row_stride_t
        return tl.load(reset_ptr + rows + shift, mask=mark, other=0) != 0


@triton.jit
def split_gates(acc, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, UNITS_FIRST: tl.constexpr):
    """Rows (columns) of `acc` run over (unit, gate), gate fastest -> four state tiles i, f, g, o."""
    if UNITS_FIRST:
        quad = tl.permute(tl.reshape(acc, (BLOCK_H, 2, 2, BLOCK_B)), (0, 3, 1, 2))
    else:
        quad = tl.reshape(acc, (BLOCK_B, BLOCK_H, 2, 2))
    i_g, f_o = tl.split(quad)
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def stack_gates(i, f, g, o, SPLIT_K: tl.constexpr, UNITS_FIRST: tl.constexpr):
    """Four state tiles -> [SPLIT_K, ..]: of each gate the units in SPLIT_K / 4 parts."""
    PARTS: tl.constexpr = SPLIT_K // 4
    M: tl.constexpr = i.shape[0]
    N: tl.constexpr = i.shape[1]
    quad = tl.join(tl.join(i, g), tl.join(f, o))
    if UNITS_FIRST:
        parts = tl.permute(tl.reshape(quad, (PARTS, M // PARTS, N, 2, 2)), (3, 4, 0, 1, 2))
        return tl.reshape(parts, (SPLIT_K, M // PARTS, N))
    else:
        parts = tl.permute(tl.reshape(quad, (M, PARTS, N // PARTS, 2, 2)), (3, 4, 1, 0, 2))
        return tl.reshape(parts, (SPLIT_K, M, N // PARTS))
