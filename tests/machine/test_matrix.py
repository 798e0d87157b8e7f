"""Matrix instructions against plain products, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import matrix, wgmma
from .arithmetic import bf16_to_f32, f32_to_bf16

pytestmark = pytest.mark.machine
RNG = np.random.default_rng(0)
LANE = np.arange(32)


@pytest.mark.parametrize(("shape", "kind"), [("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"), ("m16n8k8", "bf16"), ("m16n8k4", "tf32")])  # fmt: skip
def test_mma(shape: str, kind: str) -> None:
    """Registers filled by the formulas of the manual (9.7.14.5), lane by lane."""
    depth = int(shape.partition("k")[2])
    a, b, c = (RNG.standard_normal(size).astype(np.float32) for size in ((16, depth), (depth, 8), (16, 8)))
    if kind != "tf32":
        to_bits = f32_to_bf16 if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
        from_bits = bf16_to_f32 if kind == "bf16" else lambda x: x.view(np.float16).astype(np.float32)
        bits_a, bits_b = to_bits(a), to_bits(b)
        a, b = from_bits(bits_a), from_bits(bits_b)
    group, inner = LANE // 4, LANE % 4

    def pairs(bits: np.ndarray, places: list[tuple]) -> list[np.ndarray]:
        return [bits[one].astype(np.uint32) | bits[other].astype(np.uint32) << 16 for one, other in places]

    if kind == "tf32":
        noise = np.uint32(0x1FFF)  # which does not count
        bits_a, bits_b = (x.view(np.uint32) & ~noise | RNG.integers(0, 0x2000, x.shape, np.uint32) for x in (a, b))
        a, b = ((x & ~noise).view(np.float32) for x in (bits_a, bits_b))
        left = [bits_a[group + 8 * (i % 2), inner + 4 * (i // 2)] for i in range(depth // 2)]
        right = [bits_b[inner + 4 * i, group] for i in range(depth // 4)]
    else:
        left = pairs(bits_a, [((group + 8 * (i % 2), 2 * inner + 8 * (i // 2)), (group + 8 * (i % 2), 2 * inner + 1 + 8 * (i // 2))) for i in range(depth // 4)])  # fmt: skip
        right = pairs(bits_b, [((2 * inner + 8 * i, group), (2 * inner + 1 + 8 * i, group)) for i in range(depth // 8)])
    places = [(group + 8 * (i // 2), 2 * inner + i % 2) for i in range(4)]
    found = matrix.mma(left, right, [c[place] for place in places], shape, kind)
    want = (a.astype(np.float64) @ b + c).astype(np.float32)
    for register, place in zip(found, places):
        assert np.array_equal(register, want[place])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_back(transposed: bool) -> None:
    rows = RNG.integers(0, 2**32, (4, 8, 4), dtype=np.uint32)
    registers = matrix.from_rows(rows, transposed)
    halves = rows.view(np.uint16).reshape(4, 8, 8)
    for register, of_matrix in zip(registers, halves):
        first = of_matrix[2 * (LANE % 4), LANE // 4] if transposed else of_matrix[LANE // 4, 2 * (LANE % 4)]
        second = of_matrix[2 * (LANE % 4) + 1, LANE // 4] if transposed else of_matrix[LANE // 4, 2 * (LANE % 4) + 1]
        assert np.array_equal(register, first.astype(np.uint32) | second.astype(np.uint32) << 16)
    assert np.array_equal(matrix.to_rows(registers, transposed), rows)


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62


@pytest.mark.parametrize(("swizzle", "units"), [(0, 1), (3, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("k_major", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_descriptors_reach_every_element_once(swizzle: int, units: int, k_major: bool, size: int) -> None:
    """Of a matrix that fills its memory: a layout is a bijection, and neighbours lie side by side."""
    if size == 4 and not k_major:
        return  # the manual has no such operand (9.7.15.5.2)
    rows, depth = 64, 32 // size
    if k_major:
        # A swizzled row holds 16 * units bytes of k, of which one instruction takes 32.
        leading, stride = (128, 256) if units == 1 else (16, 128 * units)
        parts = max(1, units // 2)
        found = [
            wgmma.addresses(descriptor(1024 + 32 * part, leading, stride, swizzle), rows, size, True)
            for part in range(parts)
        ]
        places = np.stack(found)
        assert (np.diff(places[..., : 16 // size], axis=-1) == size).all()
    else:
        in_unit = 16 // size
        leading, stride = (128 * (rows // in_unit), 128) if units == 1 else (128 * units * depth // 8, 128 * units)
        places = wgmma.addresses(descriptor(1024, leading, stride, swizzle), rows, size, False)
        assert (np.diff(places.reshape(-1, in_unit, depth), axis=1) == size).all()
    flat = np.sort(places.ravel())
    assert np.array_equal(flat, 1024 + size * np.arange(flat.size))


def test_a_swizzle_is_what_the_hardware_documents() -> None:
    """128 bytes: the 16-byte unit of an address is changed by the row of eight that it lies in."""
    places = wgmma.addresses(descriptor(2048, 16, 1024, 1), 16, 2, True)
    for row in range(16):
        for k in range(0, 16, 8):
            unit = (k // 8) ^ (row % 8)
            assert places[row, k] == 2048 + row * 128 + unit * 16


def test_conversions_are_torchs() -> None:
    values = torch.cat(
        (torch.randn(4096) * 10.0 ** torch.randint(-42, 38, (4096,)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf]))
    )
    for make, dtype in ((f32_to_bf16, torch.bfloat16), (_f16, torch.float16)):
        assert np.array_equal(make(values.numpy()), values.to(dtype).view(torch.int16).numpy().view(np.uint16))


def _f16(x: np.ndarray) -> np.ndarray:
    from .arithmetic import f32_to_f16

    return f32_to_f16(x)
