"""Random masks that are never stored: every pass draws the same ones again from a seed.

Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed [D] int64 of a set
of weights and counting (unit, row of the batch, time, kind and direction): a mask depends neither on the tile nor on
the launch that draws it, nor on the batch's size. Both directions of a layer have one seed, and share the mask on its
input. `lstm_triton.reference.masks` draws the same in plain PyTorch.

A threshold is a probability in units of 2^-24 (`config.chance`); 24 random bits below it say yes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import CHANCE_BITS
from .launch import on_device_of
from .records import Drawn
from .tiles import per_row, per_unit, runs_reversed

STEP, RECURRENT, INPUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # kinds; the last two of a whole sequence
REVERSE = tl.constexpr(4)  # added to the kind where the reverse direction has a mask of its own
ONE = tl.constexpr(2**CHANCE_BITS)


@triton.jit
def draws(seed, unit, b, time, kind):
    """Four uint32 for every element of the broadcast unit, b and time."""
    zero = (unit * 0 + b * 0 + time * 0).to(tl.int32)
    return tl.philox(seed, zero + unit.to(tl.int32), zero + b.to(tl.int32), zero + time.to(tl.int32), zero + kind)


@triton.jit
def happens(bits, threshold):
    return (bits >> 8).to(tl.int32) < tl.cast(threshold, tl.int32)


@triton.jit
def dropout_scale(bits, threshold, compute: tl.constexpr):
    """0 with the given probability, else what keeps the mean at 1."""
    return tl.where(happens(bits, threshold), 0.0, tl.cast(ONE, compute) / (ONE - threshold))


@triton.jit
def kept_by_zoneout(bits, threshold, how: tl.constexpr):
    """What `cell.zoneout` takes: a mask, or its mean."""
    if how.SAMPLED:
        return happens(bits, threshold)
    else:
        return tl.cast(threshold, how.compute) / ONE


@triton.jit
def draw(masks, time, tile, how: tl.constexpr):
    """What zoneout of h, zoneout of c and recurrent dropout do at a step, at time [BLOCK_B] of the whole sequence."""
    bits_h, bits_c, bits_g = 0, 0, 0
    if how.SAMPLED:
        bits_h, bits_c, bits_g, _ = draws(
            tl.load(masks.seed + tile.direction), per_unit(tile.unit, how), per_row(tile.b, how), per_row(time, how),
            STEP + REVERSE * tile.reverse.to(tl.int32),
        )  # fmt: skip
    keep_h, keep_c, g_scale = 0, 0, 0
    if how.ZONEOUT_H:
        keep_h = kept_by_zoneout(bits_h, masks.zoneout_h, how)
    if how.ZONEOUT_C:
        keep_c = kept_by_zoneout(bits_c, masks.zoneout_c, how)
    if how.DROPOUT:
        g_scale = dropout_scale(bits_g, masks.recurrent_dropout, how.compute)
    return Drawn(keep_h, keep_c, g_scale)


@triton.jit(do_not_specialize=["batch"])
def sequence_mask_kernel(
    seed,  # [D] int64
    mask,  # [D, B, N]
    batch,
    threshold,  # a float, and so never part of a binary
    N: tl.constexpr,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK units of one row of the batch, of one set of weights."""
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, direction = tl.program_id(0), tl.program_id(2)
    kind = KIND + REVERSE * runs_reversed(direction, ORDER).to(tl.int32)
    bits, _, _, _ = draws(tl.load(seed + direction), unit, b, b * 0, kind)
    dtype: tl.constexpr = mask.dtype.element_ty
    scale = dropout_scale(bits, threshold, tl.float64 if dtype == tl.float64 else tl.float32)
    tl.store(mask + (direction * batch + b).to(tl.int64) * N + unit, scale.to(dtype), mask=unit < N)


def sequence_mask(
    seed: torch.Tensor, batch: int, size: int, kind: int, threshold: int, dtype: torch.dtype, order: str = "forward"
) -> torch.Tensor:
    """The dropout mask of whole sequences: [D, batch, size], 0 or 1 / (1 - p). kind: RECURRENT or INPUT.

    order: which sets have the mask of a reverse direction, see `runs_reversed`.
    """
    seed = seed.contiguous()
    mask = seed.new_empty((seed.shape[0], batch, size), dtype=dtype)
    block = 256
    grid = (batch, triton.cdiv(size, block), seed.shape[0])  # only the first axis is unlimited
    with on_device_of(seed):
        sequence_mask_kernel[grid](seed, mask, batch, float(threshold), size, kind, order, block)
    return mask
