"""What a layer is given and what it gives: the records that the operators, their rules and both passes share.

Shapes are those of `op.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import PLAIN_CELL, Cell, Layout, compute_dtype
from ..kernels.matmul import matmul
from ..planning.precision import resolve_precision

WEIGHTS = ("peephole", "gain_ih", "gain_hh", "norm_c")  # of the variants of the cell
DIFFERENTIABLE = ("x", "w_ih", "w_hh", "bias", "h_0", "c_0", "reset_h", "reset_c", *WEIGHTS)
OF_SETS = (*DIFFERENTIABLE[1:], "seed")  # their first axis counts the sets of weights
KEEPS = ("nothing", "all", "cells")


class Inputs(NamedTuple):
    """The tensors of one layer; see `op.py`."""

    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    peephole: Tensor | None
    gain_ih: Tensor | None
    gain_hh: Tensor | None
    norm_c: Tensor | None
    seed: Tensor | None


TENSORS = len(Inputs._fields)


class Results(NamedTuple):
    """Of a forward pass: out [S, D * H], h_n, c_n, gates (activated if kept, else spent or None), and what is kept."""

    out: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor | None
    cells: Tensor | None
    stats: Tensor | None


class Cotangents(NamedTuple):
    """Gradients of the operator's outputs; None is zero."""

    out: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    gates: Tensor | None = None
    cells: Tensor | None = None


class LayerResult(NamedTuple):
    """What one layer gives: out [S, D * H], h_n and c_n [D, B, H], and states that were kept, if any (see `op`)."""

    out: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor | None
    cells: Tensor | None


@dataclass(frozen=True)
class Options:
    """How a layer is computed.

    order: which sets of weights run in reverse, "forward", "reverse" or "both". time_begin: time of the first step,
    where this is a window of a longer sequence.
    """

    batch_first: bool
    order: str
    batch_invariant: bool
    precision: str
    plan: str
    cell: Cell
    time_begin: int = 0

    def layout(self, x: Tensor) -> Layout:
        batch, seq_len = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        return Layout(batch, seq_len, self.batch_first)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a [D, M, K] @ b [D, K, N], or both without D."""
        if not self.batch_invariant:
            return a @ b
        if a.dim() == 2:
            return matmul(a, b, None, self.precision)
        return torch.stack([matmul(one, other, None, self.precision) for one, other in zip(a, b)])


def window_size(keep: str) -> int:
    """K of "chunk:K", 0 for the others; ValueError for what is none of them."""
    kind, colon, size = keep.partition(":")
    if keep not in KEEPS and not (kind == "chunk" and colon and size.isdecimal() and int(size) > 0):
        raise ValueError(f"keep should be one of {', '.join(map(repr, KEEPS))} or 'chunk:K', got: {keep!r}")
    return int(size or 0)


def cell_of(text: str) -> Cell:
    return Cell.decode(text) if text else PLAIN_CELL


def options_of(
    batch_first: bool, bidirectional: bool, batch_invariant: bool, precision: str, plan: str, cell: str
) -> Options:
    order = "both" if bidirectional else "forward"
    return Options(batch_first, order, batch_invariant, resolve_precision(precision), plan, cell_of(cell))


def c_dtype_of(x: Tensor, batch_invariant: bool) -> torch.dtype:
    return compute_dtype(x.dtype) if batch_invariant else x.dtype
