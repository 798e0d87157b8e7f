"""The recurrent product: a tile of h (or dgates) times the slice of W_hh that a program owns.

Forward: depth H, width 4 * BLOCK_H, h_{t-1} W_hh^T for four gates of BLOCK_H units.
Backward: depth 4H, width BLOCK_H, dgates_{t+1} W_hh.

Ways to lay it on the matrix unit:
- UNITS_FIRST: dot(weights [width, K], tile [K, BLOCK_B]); the weights fill the wide M axis at a
  small batch tile, so wgmma serves BLOCK_B = 16, and mma.sync BLOCK_B = 8 with nothing wasted.
- not UNITS_FIRST: dot(tile [BLOCK_B, K], weights [K, width]).
- SPLIT_K > 1: either as a batched dot over SPLIT_K slices of the depth, one per warp, and a sum.
  A narrow product (16 x 16 x 4096) would otherwise be one long chain that every warp repeats.
  Where one program owns every unit, the slices of the backward product are the gates, or halves of them.

The depth comes in chunks of BLOCK_K: the tile is in registers on its way to the dot, and a whole
row block would not fit. RESIDENT weights are a tuple of chunks loaded before the time loop; the
compiler keeps each in shared memory (or registers) for all steps.

For tf32 NVIDIA's matrix unit drops the low 13 bits of both factors, where cuDNN has them rounded. To round the tiles is
5 to 110% more instructions in the loop, so the sum of the products is made longer by what it lacks on average, which
costs nothing: see `restored`.
"""

import triton
import triton.language as tl

from .cell import has_ptx, rounded_product
from .config import REGISTER_BYTES
from .exchange import collect
from .records import Gates, Part
from .tiles import split_gates

FEW_BYTES = tl.constexpr(REGISTER_BYTES)
# What a factor loses by it on average: half of the last place that stays, 2^-11 / m, over mantissas m of density
# 1 / (m ln 2), which products of many numbers have.
DROPPED = tl.constexpr(2**-11 * 0.5 / 0.6931471805599453)


@triton.jit
def depth_of(chunk, how: tl.constexpr):
    """Depth indices of a chunk: [BLOCK_K], or [SPLIT_K, BLOCK_K / SPLIT_K]."""
    k = chunk * how.BLOCK_K + tl.arange(0, how.BLOCK_K // how.SPLIT_K)
    if how.SPLIT_K > 1:
        # Not a reshape: that would hide from the compiler that k is contiguous.
        return k[None, :] + (tl.arange(0, how.SPLIT_K) * (how.BLOCK_K // how.SPLIT_K))[:, None]
    else:
        return k


@triton.jit
def swapped(tile):
    """The last two axes of a tile, or of every slice of one, changed for each other."""
    return tl.trans(tile) if len(tile.shape) == 2 else tl.permute(tile, (0, 2, 1))


@triton.jit
def load_weights(w, unit, k, DEPTH: tl.constexpr, how: tl.constexpr):
    """The chunk `k` of the weights of `unit` [BLOCK_H] in W_hh [4H, H], or forward in any [4H, DEPTH].

    [.., K, width], or [.., width, K] with UNITS_FIRST; forward the width runs over (unit, gate) with gate fastest.
    """
    # A transposed operand of wgmma may be misread, see perf/NOTES.md: its weights are loaded as they are multiplied.
    # Those of mma.sync are not: transposing them is what lets the compiler keep them in registers.
    WGMMA: tl.constexpr = how.UNITS_FIRST and not how.BACKWARD and how.BLOCK_B >= 16 and len(k.shape) == 1
    if not WGMMA:
        k = tl.expand_dims(k, -1)
    if how.BACKWARD:
        chunk = tl.load(w + k * how.H + unit, mask=(k < 4 * how.H) & (unit < how.H), other=0.0)
    else:
        lane = tl.arange(0, 4 * how.BLOCK_H)
        if WGMMA:
            lane = lane[:, None]
        row_unit = tl.min(unit, axis=0) + lane // 4
        row = (lane % 4) * how.H + row_unit
        chunk = tl.load(w + row * DEPTH + k, mask=(row_unit < how.H) & (k < DEPTH), other=0.0)
    return swapped(chunk) if how.UNITS_FIRST and not WGMMA else chunk


@triton.jit
def multiply(tile, weights, acc, how: tl.constexpr):
    """acc += the product of the tile and the weights, each as it is loaded."""
    # Without a matrix unit a product is a chain of multiply-adds. Over the whole depth its roundings would add up.
    CHAIN: tl.constexpr = has_ptx() and tile.dtype == tl.float32 and how.PRECISION == "ieee"
    onto = tl.zeros_like(acc) if CHAIN else acc
    if how.UNITS_FIRST:
        product = tl.dot(weights, tile, onto, input_precision=how.PRECISION, out_dtype=acc.dtype)
    else:
        product = tl.dot(tile, weights, onto, input_precision=how.PRECISION, out_dtype=acc.dtype)
    return apart(acc, product) if CHAIN else product


@triton.jit
def apart(acc, product):
    """acc + product by an addition that the compiler does not merge into the product."""
    asm: tl.constexpr = "add.rn.f32 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [acc, product], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def nearest(tile, PRECISION: tl.constexpr):
    """For tf32 a tile that has been rounded to it: for what is not in a loop over steps."""
    if has_ptx() and PRECISION == "tf32":
        asm: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tile


@triton.jit
def restored(product, FACTORS: tl.constexpr, SUMMED: tl.constexpr, how: tl.constexpr):
    """A sum of products without the bias of its truncated FACTORS: what is left is as large as that of rounding.

    Added to something it costs nothing: the two become one multiply-add. SUMMED: it goes into sums over lanes.
    """
    if has_ptx() and how.PRECISION == "tf32":
        if SUMMED:
            return rounded_product(product, 1.0 + FACTORS * DROPPED)
        else:
            return product * (1.0 + FACTORS * DROPPED)
    else:
        return product


@triton.jit
def gates_of(acc, FACTORS: tl.constexpr, how: tl.constexpr):
    """A forward product -> its gates, `restored`."""
    z = split_gates(acc, how)
    return Gates(
        restored(z.i, FACTORS, how.NORM, how),
        restored(z.f, FACTORS, how.NORM, how),
        restored(z.g, FACTORS, how.NORM, how),
        restored(z.o, FACTORS, how.NORM, how),
    )


@triton.jit
def zeros(WIDTH: tl.constexpr, dtype: tl.constexpr, how: tl.constexpr):
    """For a product of this width, or a tile of this depth."""
    M: tl.constexpr = WIDTH if how.UNITS_FIRST else how.BLOCK_B
    N: tl.constexpr = how.BLOCK_B if how.UNITS_FIRST else WIDTH
    return tl.zeros([how.SPLIT_K, M, N] if how.SPLIT_K > 1 else [M, N], dtype)


@triton.jit
def resident_weights(w, tile, how: tl.constexpr):
    """Every chunk of this program's weights, as a tuple; an empty one if they are read anew in every step."""
    DEPTH: tl.constexpr = 4 * how.H if how.BACKWARD else how.H
    weights = ()
    if how.BACKWARD and how.PLACEMENT == "local":
        weights = (gate_weights(w, tile.unit, how),)
    elif how.RESIDENT:
        for chunk in tl.static_range((DEPTH + how.BLOCK_K - 1) // how.BLOCK_K):
            weights = weights + (load_weights(w, tile.unit, depth_of(chunk, how), DEPTH, how),)
    return weights


@triton.jit
def gate_weights(w, unit, how: tl.constexpr):
    """Backward weights of a program that owns every unit, slices as `stack_gates` has them."""
    PARTS: tl.constexpr = how.SPLIT_K // 4
    slice = tl.arange(0, how.SPLIT_K)[:, None]
    lane = (slice % PARTS) * (how.BLOCK_H // PARTS) + tl.arange(0, how.BLOCK_H // PARTS)[None, :]
    k = tl.where(lane < how.H, (slice // PARTS) * how.H + lane, 4 * how.H)  # 4H and up is masked
    return load_weights(w, unit, k, 4 * how.H, how)


@triton.jit
def sum_slices(acc, how: tl.constexpr):
    """[SPLIT_K, ..] -> [..]. The last two slices come apart by tl.split, which also moves the result from the dot's
    register layout into the plain one that the cell update is loaded in; without it every tile of the update is
    converted instead (53 block barriers a step against 25)."""
    if how.SPLIT_K == 1:
        return acc
    else:
        M: tl.constexpr = acc.shape[1]
        N: tl.constexpr = acc.shape[2]
        pair = tl.sum(tl.reshape(acc, (2, how.SPLIT_K // 2, M, N)), axis=1)
        low, high = tl.split(tl.permute(pair, (1, 2, 0)))
        return low + high


@triton.jit
def local_product(tile, weights, how: tl.constexpr):
    """The product of a program that owns every unit: of its h, or of dgates as `stack_gates` has them."""
    acc = zeros(how.BLOCK_H if how.BACKWARD else 4 * how.BLOCK_H, how.compute, how)
    return sum_slices(multiply(tile.to(how.dtype), weights[0], acc, how), how)


@triton.jit
def in_registers(weights, state, never, how: tl.constexpr):
    """`state` (a state tile), and where the weights are few a use of them outside of the time loop.

    With it the compiler keeps them in registers; without it it would fetch them from shared memory in every step. wgmma
    reads them there anyway. never: false, which the compiler cannot know.
    """
    if how.RESIDENT and how.PLACEMENT != "stepwise":
        WIDTH: tl.constexpr = how.BLOCK_H if how.BACKWARD else 4 * how.BLOCK_H
        PARTS: tl.constexpr = 2 if how.PRECISION == "tf32x3" and how.dtype == tl.float32 else 1
        SIZE: tl.constexpr = PARTS * how.dtype.primitive_bitwidth // 8
        if len(weights) * weights[0].numel * SIZE <= FEW_BYTES:
            acc = zeros(WIDTH, how.compute, how)
            tile = zeros(weights[0].numel // WIDTH // how.SPLIT_K, how.dtype, how) + never.to(how.dtype)
            for chunk in tl.static_range(len(weights)):
                acc = multiply(tile, weights[chunk], acc, how)
            acc = sum_slices(acc, how)
            if not how.BACKWARD:
                acc = split_gates(acc, how).i
            state = tl.where(never, acc, state)
    return state


@triton.jit
def collect_chunk(source, chunk, peers, DEPTH: tl.constexpr, how: tl.constexpr):
    """A chunk of the depth of the rows of `source`; see `collect`."""
    k = depth_of(chunk, how)
    inside = None
    if DEPTH % how.BLOCK_K != 0:
        inside = tl.expand_dims(k < DEPTH, -2)
    part = Part(chunk * how.BLOCK_K, DEPTH, how.H, how.BLOCK_H)
    tile = collect(source, tl.expand_dims(k, -2), inside, part, peers, how.PROTOCOL)
    if how.UNITS_FIRST:
        tile = swapped(tile)
    return tile


@triton.jit
def recurrent_product(source, weights, w, peers, tile, DEPTH: tl.constexpr, how: tl.constexpr):
    """The product of rows of `source` over the whole depth: [BLOCK_B, width], or [width, BLOCK_B] with UNITS_FIRST.

    weights: see `resident_weights`; w: where those are that are not resident. DEPTH: H forward (another for a product
    with something else than h), 4H backward.
    """
    CHUNKS: tl.constexpr = (DEPTH + how.BLOCK_K - 1) // how.BLOCK_K
    acc = zeros(how.BLOCK_H if how.BACKWARD else 4 * how.BLOCK_H, how.compute, how)
    if how.RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            acc = multiply(collect_chunk(source, chunk, peers, DEPTH, how), weights[chunk], acc, how)
    else:
        for chunk in range(CHUNKS):
            loaded = load_weights(w, tile.unit, depth_of(chunk, how), DEPTH, how)
            acc = multiply(collect_chunk(source, chunk, peers, DEPTH, how), loaded, acc, how)
    return sum_slices(acc, how)
