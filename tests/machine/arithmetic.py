"""What single instructions compute, on NumPy vectors of 32 lanes. `translate.py` says which instruction calls what.

Numbers in parentheses are sections of the PTX ISA manual, version 9.1.
"""

from __future__ import annotations

import numpy as np

LANES = np.arange(32)
CANONICAL_NAN = np.uint32(0x7FFFFFFF)

# How far approximate instructions are off (9.7.3) before they are rounded to fp32, which takes another half of a unit in
# the last place: in such units, and relative to the exact value.
ERRORS = {
    "ex2": (1.5, 0.0),  # 2 units in all (9.7.3.21)
    "rcp": (0.5, 0.0),  # 1 (9.7.3.13)
    "div.full": (1.5, 0.0),  # 2 (9.7.3.8)
    "div.approx": (1.5, 0.0),  # 2 (9.7.3.8)
    "sqrt": (0.0, 2.0**-24),  # relative 2^-23 (9.7.3.15)
    "rsqrt": (0.0, 2.0**-23),  # relative 2^-22.9 (9.7.3.16)
    "tanh": (0.0, 2.0**-11 - 2.0**-24),  # relative 2^-11 (9.7.3.22)
}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32, rounded once (9.7.3.6): exact in fp64 but for the sum's rounding there, which changes one
    result in 2^29 by one unit in the last place."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp64: through the longer type of this processor."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def flushed(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal fp32 become zeros of their sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def _disturbed(exact: np.ndarray, x: np.ndarray, name: str, seed: int) -> np.ndarray:
    """fp64 results, each off by a share of the bound that depends on the operand's bits and the seed alone."""
    units, relative = ERRORS[name]
    with np.errstate(over="ignore"):
        bits = x.view(np.uint32) * np.uint32(2654435761) + np.uint32(seed)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(2246822519)
    share = (bits ^ (bits >> np.uint32(13))).astype(np.float64) * 2.0**-31 - 1.0
    bound = units * np.spacing(np.abs(exact.astype(np.float32))) if units else relative * np.abs(exact)
    return np.where(np.isfinite(bound), exact + bound * share, exact).astype(np.float32)


def ex2(x: np.ndarray, seed: int) -> np.ndarray:
    x = flushed(x)
    return np.where(x == 0, np.float32(1), flushed(_disturbed(np.exp2(x.astype(np.float64)), x, "ex2", seed)))


def rcp(x: np.ndarray, seed: int) -> np.ndarray:
    x = flushed(x)
    return flushed(_disturbed(1.0 / x.astype(np.float64), x, "rcp", seed))


def sqrt(x: np.ndarray, seed: int) -> np.ndarray:
    x = flushed(x)
    return _disturbed(np.sqrt(x.astype(np.float64)), x, "sqrt", seed)


def rsqrt(x: np.ndarray, seed: int) -> np.ndarray:
    x = flushed(x)
    return flushed(_disturbed(1.0 / np.sqrt(x.astype(np.float64)), x, "rsqrt", seed))


def divide(a: np.ndarray, b: np.ndarray, kind: str, seed: int) -> np.ndarray:
    return _disturbed(a.astype(np.float64) / b, a * b, kind, seed)


def tanh(x: np.ndarray, seed: int) -> np.ndarray:
    return _disturbed(np.tanh(x.astype(np.float64)), x, "tanh", seed)


# Conversions (9.7.9.21)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; any NaN becomes the canonical one. -> uint16"""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_to_f16(x: np.ndarray) -> np.ndarray:
    """-> uint16"""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def packed(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two uint16 -> uint32; cvt.rn.bf16x2.f32 d, a, b puts a into the high half."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def to_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: to the nearest, ties away from zero. -> uint32, low 13 bits 0"""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), CANONICAL_NAN & np.uint32(0xFFFFE000), rounded)


def cut_to_tf32(bits: np.ndarray) -> np.ndarray:
    """An operand of a tf32 matrix instruction: its low 13 bits do not count (9.7.15.5.2). uint32 -> fp32"""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def float_to_int(x: np.ndarray, kind: type, rounding: str) -> np.ndarray:
    """Clamped; NaN is 0 for 32-bit results."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(np.float64))
    limits = np.iinfo(kind)
    clamped = np.clip(np.where(np.isnan(rounded), 0.0, rounded), float(limits.min), float(limits.max))
    return clamped.astype(kind)


# Integers (9.7.1, 9.7.8)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi of 16- or 32-bit integers, signed or unsigned as the operands are."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(f"u{a.itemsize}")


def extracted(a: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """bfe (9.7.1.19) of signed or unsigned 32-bit integers."""
    begin, count = (begin & np.uint32(255)).astype(np.int64), (count & np.uint32(255)).astype(np.int64)
    wide = a.astype(np.int64) >> np.minimum(begin, 63)
    mask = (np.int64(1) << np.minimum(count, 32)) - 1
    found = wide & mask
    if a.dtype.kind == "i":
        last = np.minimum(begin + count - 1, 31)
        sign = (a.astype(np.int64) >> last) & 1
        found = np.where((count > 0) & (sign == 1), found | ~mask, found)
    return found.astype(np.uint64).astype(np.uint32)


def inserted(a: np.ndarray, onto: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """bfi.b32 (9.7.1.20)."""
    begin, count = (begin & np.uint32(255)).astype(np.uint64), (count & np.uint32(255)).astype(np.uint64)
    mask = ((np.uint64(1) << np.minimum(count, np.uint64(32))) - np.uint64(1)) << np.minimum(begin, np.uint64(63))
    shifted = a.astype(np.uint64) << np.minimum(begin, np.uint64(63))
    return ((onto.astype(np.uint64) & ~mask) | (shifted & mask)).astype(np.uint32)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32 in its general mode (9.7.9.7)."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(32, np.uint32)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        found = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(found & np.uint64(128), np.uint64(255), np.uint64(0))
        chosen = np.where(nibble & np.uint32(8), sign, found).astype(np.uint32)
        result |= chosen << np.uint32(8 * byte)
    return result


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3.b32 (9.7.8.6)."""
    result, entries = np.zeros(32, np.uint32), int(table[0])
    for index in range(8):
        if entries >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray, direction: str, mode: str) -> np.ndarray:
    """shf.l, shf.r (9.7.8.7)."""
    amount = np.minimum(by, np.uint32(32)) if mode == "clamp" else by & np.uint32(31)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    if direction == "r":
        return (both >> amount.astype(np.uint64)).astype(np.uint32)
    return ((both << amount.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def halves(x: np.ndarray) -> np.ndarray:
    """Registers of two bf16 -> fp32 [32, 2], low half first."""
    return bf16_to_f32(x.view(np.uint16)).reshape(-1, 2)


# Between lanes (9.7.9.6)


def shuffled(x: np.ndarray, by: np.ndarray, clamp: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """shfl.sync -> values and whether each came from another lane within its segment."""
    bound, segment, by = clamp & np.uint32(31), (clamp >> np.uint32(8)) & np.uint32(31), by & np.uint32(31)
    lane = LANES.astype(np.uint32)
    last, first = (lane & segment) | (bound & ~segment), lane & segment
    if mode == "up":
        source = lane.astype(np.int64) - by
        inside = source >= last
    else:
        source = {"down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode].astype(np.int64)
        inside = source <= last
    return x[np.where(inside, source, LANES)], inside
