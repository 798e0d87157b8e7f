"""A matrix product whose rows do not know of each other: the same row gives the same bits in any company.

A library's GEMM chooses its kernel, and with it the order of its sums, by the number of rows. This
one has one tile for all: for `batch_invariant`, where that matters more than speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device_of
from .product import nearest

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 32


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    a,  # [rows, depth]
    b,  # [depth, width], any strides
    bias,  # [width] or None
    out,  # [rows, width]
    rows,
    depth,
    width,
    b_stride_k,
    b_stride_n,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], compute)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            a + row[:, None] * depth + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0
        )
        right = tl.load(
            b + k.to(tl.int64)[:, None] * b_stride_k + column[None, :] * b_stride_n,
            mask=(k < depth)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        left, right = nearest(left, PRECISION), nearest(right, PRECISION)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=compute)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < width, other=0.0).to(compute)[None, :]
    tl.store(
        out + row[:, None] * width + column[None, :],
        acc.to(dtype),
        mask=(row < rows)[:, None] & (column < width)[None, :],
    )


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, precision: str = "ieee") -> torch.Tensor:
    """a [rows, depth] @ b [depth, width] + bias [width] -> [rows, width], accumulated in fp32 (fp64 for fp64)."""
    a = a.contiguous()
    if a.data_ptr() % 16:
        a = a.clone()  # an unaligned pointer would be another binary, with another order of sums
    out = a.new_empty((a.shape[0], b.shape[1]))
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(out.shape[0], BLOCK_M), triton.cdiv(out.shape[1], BLOCK_N))
    with on_device_of(a):
        matmul_kernel[grid](
            a,
            b,
            bias,
            out,
            out.shape[0],
            a.shape[1],
            out.shape[1],
            b.stride(0),
            b.stride(1),
            PRECISION=precision if a.dtype == torch.float32 else "ieee",
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
        )
    return out
