"""Matrix instructions of a warp: mma.sync, ldmatrix, stmatrix (PTX ISA 9.7.14.5).

A fragment says which element of a matrix each register of each lane holds. The tables below turn registers
[registers, 32] into matrices by one indexing, and back. Sums are made in fp64 and rounded to fp32 once an
instruction: the manual asks for at least fp32 and leaves the order open (9.7.14.5.14).
"""

from __future__ import annotations

import numpy as np

from .arithmetic import bf16_to_f32, cut_to_tf32

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _places(rows: list[np.ndarray], columns: list[np.ndarray], width: int) -> np.ndarray:
    """For every matrix element, row by row, its index among elements [elements of a lane, 32]."""
    flat = np.concatenate([row * width + column for row, column in zip(rows, columns)])
    places = np.empty(flat.size, np.int64)
    places[flat] = np.arange(flat.size)
    return places


def _a_16(depth: int) -> np.ndarray:
    """A of m16n8k8, m16n8k16 with 16-bit elements."""
    elements = range(depth // 2)
    rows = [_GROUP + 8 * (i // 2 % 2) for i in elements]
    return _places(rows, [2 * _IN_GROUP + i % 2 + 8 * (i // 4) for i in elements], depth)


def _b_16(depth: int) -> np.ndarray:
    elements = range(depth // 4)
    return _places([2 * _IN_GROUP + i % 2 + 8 * (i // 2) for i in elements], [_GROUP for _ in elements], 8)


def _a_32(depth: int) -> np.ndarray:
    """A of m16n8k4, m16n8k8 with tf32."""
    elements = range(depth // 2)
    return _places([_GROUP + 8 * (i % 2) for i in elements], [_IN_GROUP + 4 * (i // 2) for i in elements], depth)


def _b_32(depth: int) -> np.ndarray:
    elements = range(depth // 4)
    return _places([_IN_GROUP + 4 * i for i in elements], [_GROUP for _ in elements], 8)


def accumulator(width: int) -> np.ndarray:
    """C and D with 16 rows and `width` columns: [elements of a lane, 32] -> matrix. A warp's part of wgmma's, too."""
    elements = range(width // 2)
    rows = [_GROUP + 8 * (i // 2 % 2) for i in elements]
    return _places(rows, [2 * _IN_GROUP + i % 2 + 8 * (i // 4) for i in elements], width)


SHAPES = {  # (shape, bits of an element) -> places of A and B, depth
    ("m16n8k16", 16): (_a_16(16), _b_16(16), 16),
    ("m16n8k8", 16): (_a_16(8), _b_16(8), 8),
    ("m16n8k8", 32): (_a_32(8), _b_32(8), 8),
    ("m16n8k4", 32): (_a_32(4), _b_32(4), 4),
}
_C = accumulator(8)
_C_BACK = np.argsort(_C)


def values_of(registers: np.ndarray, kind: str) -> np.ndarray:
    """Registers [n, 32] uint32 -> elements [n or 2n, 32] fp64, as the multipliers take them."""
    if kind == "tf32":
        return cut_to_tf32(registers).astype(np.float64)
    pairs = registers.view(np.uint16).reshape(registers.shape[0], 32, 2)
    return floats(np.ascontiguousarray(pairs.transpose(0, 2, 1)).reshape(-1, 32), kind)


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements' bits, uint16 or uint32 -> fp64."""
    if kind == "tf32":
        return cut_to_tf32(bits).astype(np.float64)
    return (bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def mma(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], shape: str, kind: str) -> list[np.ndarray]:
    """a, b: registers uint32; c: four registers fp32 -> four registers fp32."""
    places_a, places_b, depth = SHAPES[shape, 32 if kind == "tf32" else 16]
    left = values_of(np.array(a), kind).ravel()[places_a].reshape(16, depth)
    right = values_of(np.array(b), kind).ravel()[places_b].reshape(depth, 8)
    total = np.array(c).ravel()[_C].astype(np.float64) + (left @ right).ravel()
    return list(total.astype(np.float32)[_C_BACK].reshape(4, 32))


def from_rows(rows: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """ldmatrix: rows [matrices, 8 rows, 4 words] uint32 -> a register for every matrix."""
    if transposed:
        halves = rows.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        rows = np.ascontiguousarray(halves).view(np.uint32)
    return list(rows.reshape(-1, 32))


def to_rows(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """stmatrix: the inverse."""
    rows = np.array(registers).reshape(-1, 8, 4)
    if transposed:
        halves = rows.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        rows = np.ascontiguousarray(halves).view(np.uint32)
    return rows
