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
from .tiles import split_gates

FEW_BYTES = tl.constexpr(REGISTER_BYTES)
# What a factor loses by it on average: half of the last place that stays, 2^-11 / m, over mantissas m of density
# 1 / (m ln 2), which products of many numbers have.
DROPPED = tl.constexpr(2**-11 * 0.5 / 0.6931471805599453)


@triton.jit
def depth_of(chunk, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Depth indices of a chunk: [BLOCK_K], or [SPLIT_K, BLOCK_K / SPLIT_K]."""
    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K // SPLIT_K)
    if SPLIT_K > 1:
        # Not a reshape: that would hide from the compiler that k is contiguous.
        return k[None, :] + (tl.arange(0, SPLIT_K) * (BLOCK_K // SPLIT_K))[:, None]
    else:
        return k


@triton.jit
def swapped(tile):
    """The last two axes of a tile, or of every slice of one, changed for each other."""
    return tl.trans(tile) if len(tile.shape) == 2 else tl.permute(tile, (0, 2, 1))


@triton.jit
def load_weights(
    w_hh,
    unit,
    k,
    H: tl.constexpr,
    DEPTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The chunk `k` of the weights of `unit` [BLOCK_H] in W_hh [4H, H], or forward in any [4H, DEPTH].

    [.., K, width], or [.., width, K] with UNITS_FIRST; forward the width runs over (unit, gate) with gate fastest.
    """
    # A transposed operand of wgmma may be misread, see perf/NOTES.md: its weights are loaded as they are multiplied.
    # Those of mma.sync are not: transposing them is what lets the compiler keep them in registers.
    WGMMA: tl.constexpr = UNITS_FIRST and not BACKWARD and BLOCK_B >= 16 and len(k.shape) == 1
    if not WGMMA:
        k = tl.expand_dims(k, -1)
    if BACKWARD:
        w = tl.load(w_hh + k * H + unit, mask=(k < 4 * H) & (unit < H), other=0.0)
    else:
        lane = tl.arange(0, 4 * BLOCK_H)
        if WGMMA:
            lane = lane[:, None]
        row_unit = tl.min(unit, axis=0) + lane // 4
        row = (lane % 4) * H + row_unit
        w = tl.load(w_hh + row * DEPTH + k, mask=(row_unit < H) & (k < DEPTH), other=0.0)
    return swapped(w) if UNITS_FIRST and not WGMMA else w


@triton.jit
def multiply(tile, w, acc, UNITS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc += the product of the tile and the weights, each as it is loaded."""
    # Without a matrix unit a product is a chain of multiply-adds. Over the whole depth its roundings would add up.
    CHAIN: tl.constexpr = has_ptx() and tile.dtype == tl.float32 and PRECISION == "ieee"
    onto = tl.zeros_like(acc) if CHAIN else acc
    if UNITS_FIRST:
        product = tl.dot(w, tile, onto, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        product = tl.dot(tile, w, onto, input_precision=PRECISION, out_dtype=acc.dtype)
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
def restored(product, FACTORS: tl.constexpr, PRECISION: tl.constexpr, SUMMED: tl.constexpr):
    """A sum of products without the bias of its truncated FACTORS: what is left is as large as that of rounding.

    Added to something it costs nothing: the two become one multiply-add. SUMMED: it goes into sums over lanes.
    """
    if has_ptx() and PRECISION == "tf32":
        if SUMMED:
            return rounded_product(product, 1.0 + FACTORS * DROPPED)
        else:
            return product * (1.0 + FACTORS * DROPPED)
    else:
        return product


@triton.jit
def zero_product(
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, UNITS_FIRST: tl.constexpr, SPLIT_K: tl.constexpr, dtype: tl.constexpr
):
    if SPLIT_K > 1:
        return tl.zeros([SPLIT_K, WIDTH, BLOCK_B] if UNITS_FIRST else [SPLIT_K, BLOCK_B, WIDTH], dtype)
    else:
        return tl.zeros([WIDTH, BLOCK_B] if UNITS_FIRST else [BLOCK_B, WIDTH], dtype)


@triton.jit
def resident_weights(
    w_hh,
    unit,
    H: tl.constexpr,
    BACKWARD: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every chunk of this program's weights, as a tuple."""
    DEPTH: tl.constexpr = 4 * H if BACKWARD else H
    weights = ()
    for chunk in tl.static_range((DEPTH + BLOCK_K - 1) // BLOCK_K):
        k = depth_of(chunk, BLOCK_K, SPLIT_K)
        weights = weights + (load_weights(w_hh, unit, k, H, DEPTH, BACKWARD, UNITS_FIRST, BLOCK_B, BLOCK_H),)
    return weights


@triton.jit
def gate_weights(
    w_hh,
    unit,
    H: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Backward weights of a program that owns every unit, slices as `stack_gates` has them."""
    PARTS: tl.constexpr = SPLIT_K // 4
    slice = tl.arange(0, SPLIT_K)[:, None]
    lane = (slice % PARTS) * (BLOCK_H // PARTS) + tl.arange(0, BLOCK_H // PARTS)[None, :]
    k = tl.where(lane < H, (slice // PARTS) * H + lane, 4 * H)  # 4H and up is masked
    return (load_weights(w_hh, unit, k, H, 4 * H, True, UNITS_FIRST, BLOCK_B, BLOCK_H),)


@triton.jit
def sum_slices(acc, SPLIT_K: tl.constexpr):
    """[SPLIT_K, ..] -> [..]. The last two slices come apart by tl.split, which also moves the result from the dot's
    register layout into the plain one that the cell update is loaded in; without it every tile of the update is
    converted instead (53 block barriers a step against 25)."""
    M: tl.constexpr = acc.shape[1]
    N: tl.constexpr = acc.shape[2]
    pair = tl.sum(tl.reshape(acc, (2, SPLIT_K // 2, M, N)), axis=1)
    low, high = tl.split(tl.permute(pair, (1, 2, 0)))
    return low + high


@triton.jit
def gates_product(
    d,  # as `stack_gates` has them
    weights,  # as `gate_weights` has them
    compute: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dgates W_hh of a program that owns every unit."""
    acc = zero_product(BLOCK_H, BLOCK_B, UNITS_FIRST, SPLIT_K, compute)
    return sum_slices(multiply(d, weights, acc, UNITS_FIRST, PRECISION), SPLIT_K)


@triton.jit
def in_registers(
    weights,
    state,  # a state tile
    never,  # bool, false, which the compiler cannot know
    dtype: tl.constexpr,
    compute: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`state`, and where the weights are few a use of them outside of the time loop: with it the compiler keeps them in
    registers, without it it would fetch them from shared memory in every step. wgmma reads them there anyway."""
    WIDTH: tl.constexpr = BLOCK_H if BACKWARD else 4 * BLOCK_H
    PARTS: tl.constexpr = 2 if PRECISION == "tf32x3" and dtype == tl.float32 else 1
    SIZE: tl.constexpr = PARTS * dtype.primitive_bitwidth // 8
    CHUNK: tl.constexpr = weights[0].numel // WIDTH // SPLIT_K
    if len(weights) * weights[0].numel * SIZE <= FEW_BYTES:
        acc = zero_product(WIDTH, BLOCK_B, UNITS_FIRST, SPLIT_K, compute)
        tile = zero_product(CHUNK, BLOCK_B, UNITS_FIRST, SPLIT_K, dtype) + never.to(dtype)
        for chunk in tl.static_range(len(weights)):
            acc = multiply(tile, weights[chunk], acc, UNITS_FIRST, PRECISION)
        if SPLIT_K > 1:
            acc = sum_slices(acc, SPLIT_K)
        if not BACKWARD:
            acc, _, _, _ = split_gates(acc, BLOCK_B, BLOCK_H, UNITS_FIRST)
        state = tl.where(never, acc, state)
    return state


@triton.jit
def collect_chunk(
    source, waiting, foreign, chunk, watch,
    H: tl.constexpr, DEPTH: tl.constexpr, UNITS_FIRST: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, PROTOCOL: tl.constexpr,
):  # fmt: skip
    """A chunk of the depth of the rows that `source` [BLOCK_B] points to; see `collect`."""
    k = depth_of(chunk, BLOCK_K, SPLIT_K)
    inside = None
    if DEPTH % BLOCK_K != 0:
        inside = tl.expand_dims(k < DEPTH, -2)
    depth, begin = tl.expand_dims(k, -2), chunk * BLOCK_K
    tile = collect(source, depth, inside, waiting, foreign, begin, watch, DEPTH, H, BLOCK_H, PROTOCOL)
    if UNITS_FIRST:
        tile = swapped(tile)
    return tile


@triton.jit
def recurrent_product(
    source,  # [BLOCK_B] pointers to rows of DEPTH values, all of which may be read
    waiting,  # bool: whether this launch publishes them
    foreign,  # [BLOCK_B] bool or None: rows that it does not
    watch,  # see exchange.py
    weights,  # tuple of chunks, empty unless RESIDENT
    w_hh,
    unit,
    compute: tl.constexpr,
    H: tl.constexpr,
    DEPTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    PROTOCOL: tl.constexpr,
    RESIDENT: tl.constexpr,
    UNITS_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The product over the whole depth: [BLOCK_B, width], or [width, BLOCK_B] with UNITS_FIRST.

    DEPTH: H forward (another for a product with something else than h), 4H backward.
    """
    CHUNKS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = BLOCK_H if BACKWARD else 4 * BLOCK_H
    acc = zero_product(WIDTH, BLOCK_B, UNITS_FIRST, SPLIT_K, compute)
    if RESIDENT:
        for chunk in tl.static_range(CHUNKS):
            tile = collect_chunk(
                source, waiting, foreign, chunk, watch, H, DEPTH, UNITS_FIRST, SPLIT_K, BLOCK_H, BLOCK_K, PROTOCOL
            )
            acc = multiply(tile, weights[chunk], acc, UNITS_FIRST, PRECISION)
    else:
        for chunk in range(CHUNKS):
            k = depth_of(chunk, BLOCK_K, SPLIT_K)
            w = load_weights(w_hh, unit, k, H, DEPTH, BACKWARD, UNITS_FIRST, BLOCK_B, BLOCK_H)
            tile = collect_chunk(
                source, waiting, foreign, chunk, watch, H, DEPTH, UNITS_FIRST, SPLIT_K, BLOCK_H, BLOCK_K, PROTOCOL
            )
            acc = multiply(tile, w, acc, UNITS_FIRST, PRECISION)
    if SPLIT_K > 1:
        acc = sum_slices(acc, SPLIT_K)
    return acc
