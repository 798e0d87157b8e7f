"""Layer normalisation inside a step (Ba et al., 2016): moments over units that several programs own.

Each program knows the mean and the sum of squared deviations of its own units; they are combined by the formula of
Chan et al. (1979), which loses nothing to cancellation. A normalised tile is (z - mean) * rstd, rstd being
1 / sqrt(variance + EPS), the biased variance as in `torch.nn.functional.layer_norm`.

A normalisation runs over the units of one tile of the state (c_t), or of one for each gate that there is: `tiles` is a
tuple of them.
"""

import triton
import triton.language as tl

from .cell import rounded_product
from .exchange import share
from .tiles import per_row

EPS = tl.constexpr(1e-5)  # of torch.nn.LayerNorm


@triton.jit
def over_units(tile, UNITS_FIRST: tl.constexpr):
    """State tile -> its sum over the units, [BLOCK_B]."""
    return tl.sum(tile, axis=0 if UNITS_FIRST else 1)


@triton.jit
def moments(
    tiles,
    owned,
    watch,
    pairs,
    in_batch,
    flags,
    count,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """mean and rstd [BLOCK_B] of every row. watch, pairs, in_batch, flags, count: see exchange.py."""
    SIZES: tl.constexpr = len(tiles)
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    own = tl.minimum(H - tl.program_id(0) * BLOCK_H, BLOCK_H) * SIZES
    total = over_units(tl.where(owned, tiles[0], 0.0), UNITS_FIRST)
    for k in tl.static_range(1, SIZES):
        total += over_units(tl.where(owned, tiles[k], 0.0), UNITS_FIRST)
    mean = total / own
    squares = tl.zeros_like(total)
    for k in tl.static_range(SIZES):
        off = tl.where(owned, tiles[k] - per_row(mean, UNITS_FIRST), 0.0)
        squares += over_units(rounded_product(off, off), UNITS_FIRST)
    if TILES > 1:
        means, of_squares = share(mean, squares, pairs, in_batch, watch, flags, count, TILES, PROTOCOL)
        tile = tl.arange(0, means.shape[1])
        counts = tl.maximum(tl.minimum(H - tile * BLOCK_H, BLOCK_H), 0) * SIZES
        counts = counts.to(total.dtype)[None, :]
        mean = tl.sum(rounded_product(means, counts), axis=1) / (H * SIZES)
        off_mean = means - mean[:, None]
        squares = tl.sum(of_squares + rounded_product(counts * off_mean, off_mean), axis=1)
    return mean, 1.0 / tl.sqrt(squares / (H * SIZES) + EPS)


@triton.jit
def store_moments(ptrs, mean_z, rstd_z, mean_c, rstd_c, mask):
    """ptrs: [BLOCK_B], each to a row's four numbers."""
    tl.store(ptrs, mean_z, mask=mask)
    tl.store(ptrs + 1, rstd_z, mask=mask)
    tl.store(ptrs + 2, mean_c, mask=mask)
    tl.store(ptrs + 3, rstd_c, mask=mask)


@triton.jit
def load_moments(ptrs, mask):
    mean_z, rstd_z = tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + 1, mask=mask, other=0.0)
    return mean_z, rstd_z, tl.load(ptrs + 2, mask=mask, other=0.0), tl.load(ptrs + 3, mask=mask, other=0.0)


@triton.jit
def norm_backward(
    d,
    normed,
    rstd,
    owned,
    watch,
    pairs,
    in_batch,
    flags,
    count,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Gradients of the normalised tiles (a tuple), and these -> gradients of the tiles before; rstd per row."""
    SIZES: tl.constexpr = len(d)
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    first = over_units(tl.where(owned, d[0], 0.0), UNITS_FIRST)
    second = over_units(tl.where(owned, rounded_product(d[0], normed[0]), 0.0), UNITS_FIRST)
    for k in tl.static_range(1, SIZES):
        first += over_units(tl.where(owned, d[k], 0.0), UNITS_FIRST)
        second += over_units(tl.where(owned, rounded_product(d[k], normed[k]), 0.0), UNITS_FIRST)
    if TILES > 1:
        firsts, seconds = share(first, second, pairs, in_batch, watch, flags, count, TILES, PROTOCOL)
        first, second = tl.sum(firsts, axis=1), tl.sum(seconds, axis=1)
    mean, slope = per_row(first / (H * SIZES), UNITS_FIRST), per_row(second / (H * SIZES), UNITS_FIRST)
    result = ()
    for k in tl.static_range(SIZES):
        result = result + (per_row(rstd, UNITS_FIRST) * (d[k] - mean - normed[k] * slope),)
    return result


@triton.jit
def norm_state_backward(
    dseen, gain, normed, rstd, owned, watch, pairs, in_batch, flags, count,
    H: tl.constexpr, BLOCK_H: tl.constexpr, UNITS_FIRST: tl.constexpr, PROTOCOL: tl.constexpr,
):  # fmt: skip
    """Gradient of gain * normed, the normalised c_t -> that of c_t."""
    found = norm_backward(
        (rounded_product(dseen, gain),), (normed,), rstd, owned, watch, pairs, in_batch, flags, count, H, BLOCK_H,
        UNITS_FIRST, PROTOCOL,
    )  # fmt: skip
    return found[0]


@triton.jit
def norm_gates(
    z_i, z_f, z_g, z_o, gain_i, gain_f, gain_g, gain_o, owned, watch, pairs, in_batch, flags, count,
    H: tl.constexpr, COUPLED: tl.constexpr, BLOCK_H: tl.constexpr, UNITS_FIRST: tl.constexpr, PROTOCOL: tl.constexpr,
):  # fmt: skip
    """The recurrent product of all gates -> normalised, with gains; mean, rstd. A coupled f does not count."""
    tiles = (z_i, z_g, z_o) if COUPLED else (z_i, z_f, z_g, z_o)
    mean, rstd = moments(
        tiles, owned, watch, pairs, in_batch, flags, count, H, BLOCK_H, UNITS_FIRST, PROTOCOL
    )  # fmt: skip
    shift, scale = per_row(mean, UNITS_FIRST), per_row(rstd, UNITS_FIRST)
    z_i, z_f = gain_i * ((z_i - shift) * scale), gain_f * ((z_f - shift) * scale)
    z_g, z_o = gain_g * ((z_g - shift) * scale), gain_o * ((z_o - shift) * scale)
    return z_i, z_f, z_g, z_o, mean, rstd


@triton.jit
def norm_gates_backward(
    d_i, d_f, d_g, d_o, z_i, z_f, z_g, z_o, gain_i, gain_f, gain_g, gain_o, mean, rstd, live, owned, watch, pairs,
    in_batch, flags, count,
    H: tl.constexpr, COUPLED: tl.constexpr, BLOCK_H: tl.constexpr, UNITS_FIRST: tl.constexpr, PROTOCOL: tl.constexpr,
):  # fmt: skip
    """Gradients of what `norm_gates` gave, 0 where a step is not `live`, -> those of the recurrent product."""
    shift, scale = per_row(mean, UNITS_FIRST), per_row(rstd, UNITS_FIRST)
    # What was saved beyond a row's length may be a NaN, and sums over units would keep it.
    n_i, n_f = tl.where(live, (z_i - shift) * scale, 0.0), tl.where(live, (z_f - shift) * scale, 0.0)
    n_g, n_o = tl.where(live, (z_g - shift) * scale, 0.0), tl.where(live, (z_o - shift) * scale, 0.0)
    d_i, d_f = rounded_product(d_i, gain_i), rounded_product(d_f, gain_f)
    d_g, d_o = rounded_product(d_g, gain_g), rounded_product(d_o, gain_o)
    d = (d_i, d_g, d_o) if COUPLED else (d_i, d_f, d_g, d_o)
    normed = (n_i, n_g, n_o) if COUPLED else (n_i, n_f, n_g, n_o)
    found = norm_backward(
        d, normed, rstd, owned, watch, pairs, in_batch, flags, count, H, BLOCK_H, UNITS_FIRST, PROTOCOL
    )  # fmt: skip
    of_f = tl.zeros_like(d_f) if COUPLED else tl.where(live, found[1], 0.0)
    after: tl.constexpr = 1 if COUPLED else 2
    return tl.where(live, found[0], 0.0), of_f, tl.where(live, found[after], 0.0), tl.where(live, found[after + 1], 0.0)
