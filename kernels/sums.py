"""Sums over the steps of a backward pass: state tiles that stay in registers, and between the launches of `stepwise` in
their buffers, [D, B, H] or several of these one after the other."""

import triton
import triton.language as tl

from .records import Peephole, Sums


@triton.jit
def begin_sum(buffer, tile, how: tl.constexpr):
    """A state tile of zeros, or what an earlier launch has left of this sum. buffer: None if nobody wants it."""
    if how.PLACEMENT == "stepwise" and buffer is not None:
        return tl.load(buffer + tile.state, mask=tile.owned, other=0.0)
    else:
        return tl.zeros(tile.owned.shape, how.compute)


@triton.jit
def begin_sums(dinitial, dreset, dpeephole, dnorm_c, states, tile, how: tl.constexpr):
    """All sums over steps, each as `begin_sum` has it. states: from one vector of a buffer to the next."""
    none = tl.zeros(tile.owned.shape, how.compute)
    dweights, dgain, dbias = Peephole(none, none, none), none, none
    if dpeephole is not None:
        of_f, of_o = begin_sum(dpeephole + states, tile, how), begin_sum(dpeephole + 2 * states, tile, how)
        dweights = Peephole(begin_sum(dpeephole, tile, how), of_f, of_o)
    if dnorm_c is not None:
        dgain, dbias = begin_sum(dnorm_c, tile, how), begin_sum(dnorm_c + states, tile, how)
    dh_kept, dh_reset = begin_sum(dinitial.h, tile, how), begin_sum(dreset.h, tile, how)
    return Sums(dh_kept, dh_reset, begin_sum(dreset.c, tile, how), dweights, dgain, dbias)


@triton.jit
def store_sums(sums, dinitial, dreset, dpeephole, dnorm_c, states, tile):
    """What `begin_sums` began, as far as it is wanted."""
    store_sum(dinitial.h, sums.dh_kept, tile)
    store_sum(dreset.h, sums.dh_reset, tile)
    store_sum(dreset.c, sums.dc_reset, tile)
    if dpeephole is not None:
        store_sum(dpeephole, sums.dpeephole.i, tile)
        store_sum(dpeephole + states, sums.dpeephole.f, tile)
        store_sum(dpeephole + 2 * states, sums.dpeephole.o, tile)
    if dnorm_c is not None:
        store_sum(dnorm_c, sums.dgain, tile)
        store_sum(dnorm_c + states, sums.dbias, tile)


@triton.jit
def store_sum(buffer, total, tile):
    """Store what `begin_sum` began, if it is wanted."""
    if buffer is not None:
        tl.store(buffer + tile.state, total, mask=tile.owned)


@triton.jit
def with_peephole(sums, da, cells, live):
    """Sums of the gradients of the peephole weights, with those of one more step."""
    return Peephole(
        sums.i + tl.where(live, da.i * cells.prev, 0.0),
        sums.f + tl.where(live, da.f * cells.prev, 0.0),
        sums.o + tl.where(live, da.o * cells.now, 0.0),
    )
