"""Layer normalisation inside a step (Ba et al., 2016): moments over units that several programs own.

Each program knows the mean and the sum of squared deviations of its own units; they are combined by the formula of
Chan et al. (1979), which loses nothing to cancellation. A normalised tile is (z - mean) * rstd, rstd being
1 / sqrt(variance + EPS), the biased variance as in `torch.nn.functional.layer_norm`.

A normalisation runs over the units of one state tile (c_t), or of one for each gate that there is: a tuple of them.
"""

import triton
import triton.language as tl

from .cell import rounded_product
from .exchange import share
from .records import Gates, Moments, NormWeights
from .tiles import of_gates, of_units, per_row

EPS = tl.constexpr(1e-5)  # of torch.nn.LayerNorm


@triton.jit
def norm_weights(norm, tile, how: tl.constexpr):
    """Gains and biases of the units of a state tile."""
    gain, bias = of_units(norm.norm_c, 0, 2, tile, how), of_units(norm.norm_c, 1, 2, tile, how)
    return NormWeights(of_gates(norm.gain_hh, tile, how), gain, bias)


@triton.jit
def over_units(tile, how: tl.constexpr):
    """State tile -> its sum over the units, [BLOCK_B]."""
    return tl.sum(tile, axis=0 if how.UNITS_FIRST else 1)


@triton.jit
def moments(tiles, sharing, tile, how: tl.constexpr):
    """Mean and rstd of every row, over the units of all tiles."""
    SIZES: tl.constexpr = len(tiles)
    own = tl.minimum(how.H - tile.hidden_tile * how.BLOCK_H, how.BLOCK_H) * SIZES
    total = over_units(tl.where(tile.owned, tiles[0], 0.0), how)
    for k in tl.static_range(1, SIZES):
        total += over_units(tl.where(tile.owned, tiles[k], 0.0), how)
    mean = total / own
    squares = tl.zeros_like(total)
    for k in tl.static_range(SIZES):
        off = tl.where(tile.owned, tiles[k] - per_row(mean, how), 0.0)
        squares += over_units(rounded_product(off, off), how)
    if how.TILES > 1:
        means, of_squares = share(mean, squares, sharing, tile, how)
        program = tl.arange(0, means.shape[1])
        counts = tl.maximum(tl.minimum(how.H - program * how.BLOCK_H, how.BLOCK_H), 0) * SIZES
        counts = counts.to(total.dtype)[None, :]
        mean = tl.sum(rounded_product(means, counts), axis=1) / (how.H * SIZES)
        off_mean = means - mean[:, None]
        squares = tl.sum(of_squares + rounded_product(counts * off_mean, off_mean), axis=1)
    return Moments(mean, 1.0 / tl.sqrt(squares / (how.H * SIZES) + EPS))


@triton.jit
def normalised(x, of, how: tl.constexpr):
    """A state tile with these moments -> (x - mean) * rstd."""
    return (x - per_row(of.mean, how)) * per_row(of.rstd, how)


@triton.jit
def store_moments(ptrs, of_z, of_c, mask):
    """ptrs: [BLOCK_B], each to a row's four numbers."""
    tl.store(ptrs, of_z.mean, mask=mask)
    tl.store(ptrs + 1, of_z.rstd, mask=mask)
    tl.store(ptrs + 2, of_c.mean, mask=mask)
    tl.store(ptrs + 3, of_c.rstd, mask=mask)


@triton.jit
def load_moments(ptrs, mask):
    """Of the recurrent product, and of c_t."""
    of_z = Moments(tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + 1, mask=mask, other=0.0))
    return of_z, Moments(tl.load(ptrs + 2, mask=mask, other=0.0), tl.load(ptrs + 3, mask=mask, other=0.0))


@triton.jit
def norm_backward(d, normed, rstd, sharing, tile, how: tl.constexpr):
    """Gradients of the normalised tiles (a tuple), and these -> gradients of the tiles before; rstd per row."""
    SIZES: tl.constexpr = len(d)
    first = over_units(tl.where(tile.owned, d[0], 0.0), how)
    second = over_units(tl.where(tile.owned, rounded_product(d[0], normed[0]), 0.0), how)
    for k in tl.static_range(1, SIZES):
        first += over_units(tl.where(tile.owned, d[k], 0.0), how)
        second += over_units(tl.where(tile.owned, rounded_product(d[k], normed[k]), 0.0), how)
    if how.TILES > 1:
        firsts, seconds = share(first, second, sharing, tile, how)
        first, second = tl.sum(firsts, axis=1), tl.sum(seconds, axis=1)
    mean, slope = per_row(first / (how.H * SIZES), how), per_row(second / (how.H * SIZES), how)
    result = ()
    for k in tl.static_range(SIZES):
        result = result + (per_row(rstd, how) * (d[k] - mean - normed[k] * slope),)
    return result


@triton.jit
def norm_gates(z, gain, sharing, tile, how: tl.constexpr):
    """The recurrent product of all gates -> normalised, with gains; its moments. A coupled f does not count."""
    tiles = (z.i, z.g, z.o) if how.COUPLED else (z.i, z.f, z.g, z.o)
    of = moments(tiles, sharing, tile, how)
    scaled = Gates(
        gain.i * normalised(z.i, of, how),
        gain.f * normalised(z.f, of, how),
        gain.g * normalised(z.g, of, how),
        gain.o * normalised(z.o, of, how),
    )
    return scaled, of


@triton.jit
def norm_gates_backward(d, z, gain, of, live, sharing, tile, how: tl.constexpr):
    """Gradients of what `norm_gates` gave, 0 where a step is not `live`, -> those of the recurrent product."""
    # What was saved beyond a row's length may be a NaN, and sums over units would keep it.
    n_i, n_f = tl.where(live, normalised(z.i, of, how), 0.0), tl.where(live, normalised(z.f, of, how), 0.0)
    n_g, n_o = tl.where(live, normalised(z.g, of, how), 0.0), tl.where(live, normalised(z.o, of, how), 0.0)
    d_i, d_f = rounded_product(d.i, gain.i), rounded_product(d.f, gain.f)
    d_g, d_o = rounded_product(d.g, gain.g), rounded_product(d.o, gain.o)
    ds = (d_i, d_g, d_o) if how.COUPLED else (d_i, d_f, d_g, d_o)
    normed = (n_i, n_g, n_o) if how.COUPLED else (n_i, n_f, n_g, n_o)
    found = norm_backward(ds, normed, of.rstd, sharing, tile, how)
    of_f = tl.zeros_like(d_f) if how.COUPLED else tl.where(live, found[1], 0.0)
    after: tl.constexpr = 1 if how.COUPLED else 2
    return Gates(
        tl.where(live, found[0], 0.0), of_f, tl.where(live, found[after], 0.0), tl.where(live, found[after + 1], 0.0)
    )  # fmt: skip
