"""How programs of one launch hand each other a tile per step: publish and collect.

The tile that crosses is a row block of a sequence buffer, mostly one that has to be written anyway
(`out` in the forward pass, `dgates` in the backward one); layer normalisation has programs `share`
sums too. An address is written once per launch, so nothing stale can be met and no buffer is reused.
`PROTOCOL` is one of

- "none": what is collected was complete before this launch began.
- "flags": a program stores its tile, then raises its own flag to the number of tiles it has
  published; consumers poll the flags of their batch tile only.
  Buffer: flags [D, batch tiles, hidden tiles] int32, zeroed by the launcher for every launch.
- "mailbox": the data is its own flag. The launcher fills the buffer with EMPTY, a bit pattern
  that no published value has; consumers re-read a tile until the pattern is gone.

Both spin, so a launch that uses one of them is cooperative. A program that has spun in vain ends the launch with
an error, see alarm.py.
"""

import triton
import triton.language as tl

from .alarm import GRACE, MARK, PATIENCE, STEP_BITS, TILE_BITS
from .cell import has_ptx
from .records import Gates, Part, Source

# The most threads of a program that waits. A smaller tile is loaded by several of them for each of its elements: by
# volatile loads at different times, while only one of the copies is tested and any of them may be used.
MOST_THREADS = tl.constexpr(256)
# All bits set: a NaN in every IEEE type, and the one value that `publishable` never returns.
EMPTY = tl.constexpr(-1)


@triton.jit
def publishable(x, dtype: tl.constexpr):
    """x in the type it is stored in; a NaN that would read as EMPTY becomes another NaN.

    Tested on the bits that are stored: no assumption on which NaN a cast produces.
    """
    WORD: tl.constexpr = tl.core.get_int_dtype(dtype.primitive_bitwidth, True)
    OTHER_NAN: tl.constexpr = 2 ** (dtype.primitive_bitwidth - 1) - 1
    bits = x.to(dtype).to(WORD, bitcast=True)
    return tl.where(bits == EMPTY, OTHER_NAN, bits).to(dtype, bitcast=True)


@triton.jit
def publishable_gates(gates, dtype: tl.constexpr):
    return Gates(
        publishable(gates.i, dtype),
        publishable(gates.f, dtype),
        publishable(gates.g, dtype),
        publishable(gates.o, dtype),
    )


@triton.jit
def publish(ptrs, x, mask, PROTOCOL: tl.constexpr):
    """Store what is `publishable`, for others who may be polling for it."""
    if PROTOCOL == "mailbox" and has_ptx():
        # In the memory model of PTX a plain store and a poll of it are a data race (8.7.1), and Triton has
        # no other store.
        SIZE: tl.constexpr = x.dtype.primitive_bitwidth
        word: tl.constexpr = tl.core.get_int_dtype(SIZE, True)
        kind: tl.constexpr = "h" if SIZE == 16 else "r"
        store: tl.constexpr = "@p st.relaxed.gpu.global.b16" if SIZE == 16 else "@p st.relaxed.gpu.global.b32"
        asm: tl.constexpr = "{.reg .pred p; setp.ne.b32 p, $3, 0; " + store + " [$1], $2; mov.u32 $0, 0;}"
        given = [ptrs, x.to(word, bitcast=True), mask.to(tl.int32)]
        tl.inline_asm_elementwise(asm, "=r,l," + kind + ",r", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(ptrs, x, mask=mask)


@triton.jit
def publish_gates(ptrs, gates, mask, H: tl.constexpr, PROTOCOL: tl.constexpr):
    publish(ptrs, gates.i, mask, PROTOCOL)
    publish(ptrs + H, gates.f, mask, PROTOCOL)
    publish(ptrs + 2 * H, gates.g, mask, PROTOCOL)
    publish(ptrs + 3 * H, gates.o, mask, PROTOCOL)


@triton.jit
def here(x):
    """The int32 x at this place only: what depends on it the compiler does not move out of a loop, into every step."""
    return tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def tell(ptr, word, then: tl.constexpr):
    """Every thread stores the int64 itself, as warps may come here alone, and goes on once the host can see it."""
    asm: tl.constexpr = "st.relaxed.sys.global.b64 [$1], $2; membar.sys; " + then + "mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l,l", [ptr, word], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def lose_patience(peers, polls, first, last):
    """Say for which hidden tiles this program waits; later, when all who wait have said so, stop the device."""
    if polls == PATIENCE:
        group = (here(tl.program_id(2)) * tl.num_programs(1) + tl.program_id(1)) % (1 << TILE_BITS)
        tiles = ((((group << TILE_BITS) | last).to(tl.int64)) << TILE_BITS) | first
        tell(peers.board + 1 + here(tl.program_id(0)), MARK | (tiles << STEP_BITS) | here(peers.step), "")
    if polls == PATIENCE + GRACE:
        tell(peers.board + here(0), MARK + here(0).to(tl.int64), "trap; ")


@triton.jit
def raise_flag(peers, tile, count, PROTOCOL: tl.constexpr):
    """Tell the others that this program (hidden tile `tile`) has published `count` times."""
    if PROTOCOL == "flags":
        # Every warp must have stored its part before one thread releases the flag; up to
        # Triton 3.8 nothing else puts a barrier between a store and a release atomic.
        tl.debug_barrier()
        tl.atomic_xchg(peers.flags + tile, count, sem="release", scope="gpu")


@triton.jit
def least_flag(flags, tile, count, TILES: tl.constexpr, ACQUIRE: tl.constexpr):
    """The smallest of the flags."""
    present = tile < TILES
    if ACQUIRE:
        return tl.min(tl.where(present, tl.atomic_add(flags + tile, 0, mask=present, sem="acquire"), count))
    else:
        return tl.min(tl.load(flags + tile, mask=present, other=count, volatile=True))


@triton.jit
def await_flags(peers, count, TILES: tl.constexpr, PROTOCOL: tl.constexpr):
    """Return once all TILES programs that share a row have published `count` times."""
    if PROTOCOL == "flags":
        tile = tl.arange(0, triton.next_power_of_2(TILES))
        # Polls are relaxed; an acquiring read of each flag then orders the loads that follow.
        for ACQUIRE in tl.static_range(2):
            polls = 0
            # The loop carries scalars: Triton 3.7 fails to compile one that carries a tensor of flags.
            least = least_flag(peers.flags, tile, count, TILES, ACQUIRE)
            while least < count:
                polls += 1
                if has_ptx() and polls >= PATIENCE:
                    seen = tl.load(peers.flags + tile, mask=tile < TILES, other=count, volatile=True)
                    late = tl.min(tl.where(seen < count, tile, TILES - 1))
                    lose_patience(peers, polls, late, late)
                least = least_flag(peers.flags, tile, count, TILES, ACQUIRE)
        tl.debug_barrier()


@triton.jit
def load_at(ptrs, mask, other, VOLATILE: tl.constexpr, CACHE: tl.constexpr):
    """tl.load with an optional mask: a masked load also clears its registers, in every step."""
    if mask is None:
        return tl.load(ptrs, cache_modifier=CACHE, volatile=VOLATILE)
    else:
        return tl.load(ptrs, mask=mask, other=other, cache_modifier=CACHE, volatile=VOLATILE)


@triton.jit
def fullest(bits, foreign):
    """The largest of the words, which is that of EMPTY if any is; those of `foreign` rows do not count.

    One maximum an element, which the compiler takes of two at a time: comparing each with EMPTY was most of a step.
    """
    words = bits.to(tl.core.get_int_dtype(bits.dtype.primitive_bitwidth, False), bitcast=True)
    if foreign is not None:
        words = tl.where(foreign, 0, words)
    return tl.max(words)


@triton.jit
def collect(source, depth, mask, part, peers, PROTOCOL: tl.constexpr):
    """Load a tile that other programs publish.

    depth: [.., 1, K], the indices of the tile in the rows of `source`; the tile has an element for every thread of the
    program, see MOST_THREADS. mask: None, or the elements to load; the others are 0.
    """
    ptrs = source.rows[:, None] + depth
    if PROTOCOL == "mailbox":
        dtype: tl.constexpr = ptrs.dtype.element_ty
        WORD: tl.constexpr = tl.core.get_int_dtype(dtype.primitive_bitwidth, True)
        FULL: tl.constexpr = 2**dtype.primitive_bitwidth - 1  # EMPTY without its sign
        words = ptrs.to(tl.pointer_type(WORD), bitcast=True)
        foreign = None if source.foreign is None else source.foreign[:, None]
        first, last = part.begin, tl.minimum(part.begin + depth.numel, part.DEPTH) - 1
        if depth.numel >= part.PERIOD:
            first, last = 0, part.PERIOD - 1
        bits = load_at(words, mask, 0, True, "")
        polls = 0
        while source.waiting & (fullest(bits, foreign) == FULL):
            polls += 1
            if has_ptx() and polls >= PATIENCE:
                lose_patience(peers, polls, first % part.PERIOD // part.EACH, last % part.PERIOD // part.EACH)
            bits = load_at(words, mask, 0, True, "")
        tile = bits.to(dtype, bitcast=True)
    elif PROTOCOL == "flags":
        # ".cg" reads L2, past an L1 line that may have been filled before the data was there.
        tile = load_at(ptrs, mask, 0.0, False, ".cg")
    else:
        tile = load_at(ptrs, mask, 0.0, False, "")
    return tile


@triton.jit
def share(first, second, sharing, tile, how: tl.constexpr):
    """Two numbers per row [BLOCK_B] of every program that shares it -> two [BLOCK_B, TILES or more] tiles.

    The tiles end in zeros: up to a power of two, and for every thread to have an element of its own.
    """
    pairs, count, peers = sharing.pairs, sharing.count, sharing.peers
    dtype: tl.constexpr = pairs.dtype.element_ty
    TILES_POW2: tl.constexpr = triton.next_power_of_2(how.TILES)
    FEWEST: tl.constexpr = MOST_THREADS // (2 * pairs.shape[0])
    PADDED: tl.constexpr = TILES_POW2 if TILES_POW2 > FEWEST else FEWEST
    own = pairs + 2 * tile.hidden_tile
    publish(own, publishable(first, dtype), tile.in_batch, how.PROTOCOL)
    publish(own + 1, publishable(second, dtype), tile.in_batch, how.PROTOCOL)
    raise_flag(peers, tile.hidden_tile, count, how.PROTOCOL)
    await_flags(peers, count, how.TILES, how.PROTOCOL)
    # Both numbers of all programs in one load: one loop that waits, not two.
    k = tl.arange(0, 2 * PADDED)
    mask = tile.in_batch[:, None] & (k < 2 * how.TILES)[None, :]
    part = Part(0, 2 * how.TILES, 2 * how.TILES, 2)
    both = collect(Source(pairs, True, None), k[None, :], mask, part, peers, how.PROTOCOL)
    return tl.split(tl.reshape(both, (both.shape[0], PADDED, 2)))
