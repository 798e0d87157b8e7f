"""Triton's two bugs of perf/NOTES.md, in a dozen lines each: the machine sees what the static rule says."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from engines import Engine

from lstm_triton.kernels.listing import misread_operands

pytestmark = pytest.mark.machine


@triton.jit
def narrow_kernel(a, b, mark, out):  # [16, 8], [16, 16], [16], [16, 16]
    i = tl.arange(0, 16)
    half = tl.load(a + i[:, None] * 8 + tl.arange(0, 8)[None, :])
    left = tl.reshape(tl.join(half, half), (16, 16))
    left = tl.where(tl.load(mark + i)[:, None] != 0, 0.0, left)
    right = tl.load(b + i[:, None] * 16 + i[None, :])
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(left, right))


@triton.jit
def transposed_kernel(w, h, out, N: tl.constexpr):  # [128, N], [128, 16], [N, 16]
    k, n, m = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 16)
    left = tl.trans(tl.load(w + k[:, None] * N + n[None, :]))
    right = tl.load(h + k[:, None] * 16 + m[None, :])
    tl.store(out + n[:, None] * 16 + m[None, :], tl.dot(left, right))


def is_right(found: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((found.double() - want).abs().max() <= 1e-3 * want.abs().max())


@pytest.mark.every_target
@pytest.mark.parametrize("mark", [torch.uint8, torch.int32], ids=str)
def test_an_operand_behind_a_narrow_load(engine: Engine, mark: torch.dtype) -> None:
    a, b, marks = torch.randn(16, 8).half(), torch.randn(16, 16).half(), torch.arange(16).remainder(3).eq(1).to(mark)
    out = torch.empty(16, 16)
    with engine():
        binary = narrow_kernel[(1,)](a, b, marks, out, num_warps=1)
    left = torch.stack((a, a), -1).reshape(16, 16).double() * (marks == 0).double()[:, None]
    assert is_right(out, left @ b.double()) == (misread_operands(binary.asm["ttgir"]) == 0)
    assert mark == torch.uint8 or is_right(out, left @ b.double())


@pytest.mark.every_target
@pytest.mark.parametrize("width", [256, 512])
def test_an_operand_transposed_in_shared_memory(engine: Engine, width: int) -> None:
    w, h, out = torch.randn(128, width).half(), torch.randn(128, 16).half(), torch.empty(width, 16)
    with engine():
        binary = transposed_kernel[(1,)](w, h, out, width, num_warps=8)
    want = w.double().T @ h.double()
    assert is_right(out, want) == (misread_operands(binary.asm["ttgir"]) == 0)
    assert is_right(out, want) or (width == 512 and engine.name == "sm_90")
