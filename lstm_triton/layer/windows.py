"""A layer computed window by window over time, so that only one window's gates exist at once.

Forward: each window hands h and c (in the compute type) to the next; with `borders` they are kept.
Backward: each window is computed again from its border and then gone back through, so that a
gradient costs the memory of one window and of the borders (Chen et al., 2016, "Training deep nets
with sublinear memory cost", with one level). The two directions go through the windows in opposite
order, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.config import compute_dtype
from ..planning.precision import matmul_precision
from . import backward as backward_pass
from . import first_use
from . import forward as forward_pass
from .records import DIFFERENTIABLE, OF_SETS, Cotangents, Inputs, Kept, Options
from .sequence import ways

GATE_BYTES = 64 << 20  # of a window of a forward pass that keeps nothing


def size_without_gradient(x: Tensor, w_hh: Tensor, batch_first: bool) -> int:
    """Steps of a window in a forward pass that keeps nothing; T if all gates are no larger than GATE_BYTES."""
    batch, seq_len = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    a_step = batch * w_hh.shape[0] * w_hh.shape[1] * x.element_size()
    return min(seq_len, max(16, GATE_BYTES // max(a_step, 1)))


def count(seq_len: int, size: int) -> int:
    return -(-seq_len // size)


def _windows(seq_len: int, size: int, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """(index, start, end) in the order of computation."""
    indices = range(count(seq_len, size))
    for index in reversed(indices) if reverse else indices:
        yield index, index * size, min(seq_len, (index + 1) * size)


def _restrict(v: Inputs, options: Options, start: int, end: int, which: slice) -> Inputs:
    """The sets `which` of a layer on the steps [start, end); h_0 and c_0 are still to be given."""
    time = 1 if options.batch_first else 0
    changed: dict[str, Any] = {
        name: None if tensor is None else tensor[which] for name, tensor in v._asdict().items() if name in OF_SETS
    }
    lengths = None if v.lengths is None else (v.lengths.to(v.x.device, torch.int64) - start).clamp(0, end - start)
    reset = None if v.reset is None else v.reset.narrow(time, start, end - start)
    x = v.x.narrow(time, start, end - start)
    changed |= {"x": x, "lengths": lengths, "reset": reset, "h_0": None, "c_0": None}
    return v._replace(**changed)


def _entering(v: Inputs, options: Options, end: int, which: slice, reverse: bool) -> Tensor | None:
    """[1, B, 1] bool: rows whose state is reset between a window that ends at `end` and the later one.

    In reverse a mark at `end` belongs to the step before it; forward the window sees its own marks.
    """
    seq_len = options.layout(v.x).seq_len
    if v.reset is None or not reverse or end == seq_len:
        return None
    mark = v.reset.select(1 if options.batch_first else 0, end)
    if v.lengths is not None:
        mark = mark & (end < v.lengths.to(v.x.device, torch.int64))
    return mark.view(1, -1, 1)


def forward(
    v: Inputs, options: Options, size: int, borders: bool, c_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """out, h_n, c_n, and with `borders` the states that enter each window: h and c [windows, D, B, H]."""
    layout, (sets, _, hidden) = options.layout(v.x), v.w_hh.shape
    compute, time = compute_dtype(v.x.dtype), 1 if options.batch_first else 0
    out = v.x.new_empty((*v.x.shape[:2], sets, hidden))
    h_n = v.x.new_empty((sets, layout.batch, hidden))
    c_n = torch.empty_like(h_n, dtype=c_dtype)
    at_h = at_c = None
    if borders:
        at_h = v.x.new_empty((count(layout.seq_len, size), *h_n.shape))
        at_c = torch.empty_like(at_h, dtype=compute)
    for which, reverse in ways(options.order):
        order = "reverse" if reverse else "forward"
        h = torch.zeros_like(h_n[which]) if v.h_0 is None else v.h_0[which]
        c = torch.zeros_like(h, dtype=compute) if v.c_0 is None else v.c_0[which].to(compute)
        for index, start, end in _windows(layout.seq_len, size, reverse):
            window = _restrict(v, options, start, end, which)
            fresh = _entering(v, options, end, which, reverse)
            if fresh is not None:
                h = torch.where(fresh, 0.0 if window.reset_h is None else window.reset_h, h)
                c = torch.where(fresh, 0.0 if window.reset_c is None else window.reset_c.to(compute), c)
            if at_h is not None and at_c is not None:
                at_h[index, which], at_c[index, which] = h, c
            one_way = replace(options, order=order, time_begin=start)
            window = window._replace(h_0=h, c_0=c)
            first_use.ensure_forward(window, one_way, False, compute)
            with matmul_precision(v.x.dtype, options.precision):
                part, h, c, *_ = forward_pass.forward(window, one_way, False, compute)
            out.narrow(time, start, end - start)[:, :, which] = part.unflatten(-1, (-1, hidden))
        h_n[which], c_n[which] = h, c
    return torch.ops.aten._unsafe_view(out, [*v.x.shape[:2], sets * hidden]), h_n, c_n, at_h, at_c


def backward(
    v: Inputs, options: Options, at_h: Tensor, at_c: Tensor, given: Cotangents, wanted: Mapping[str, bool]
) -> dict[str, Tensor]:
    """As `backward.backward`, from the borders that `forward` kept."""
    seq_len, size, (sets, _, hidden) = options.layout(v.x).seq_len, options.keep.size, v.w_hh.shape
    time, compute = 1 if options.batch_first else 0, compute_dtype(v.x.dtype)
    # Sums over windows are kept in the compute type; every x is in one window, of each direction.
    sums = {
        name: torch.zeros_like(tensor, dtype=tensor.dtype if name == "x" else compute)
        for name, tensor in v._asdict().items()
        if name in DIFFERENTIABLE and wanted[name] and tensor is not None
    }
    for which, reverse in ways(options.order):
        order = "reverse" if reverse else "forward"
        dh = None if given.h_n is None else given.h_n[which]
        dc = None if given.c_n is None else given.c_n[which]
        for index, start, end in reversed(list(_windows(seq_len, size, reverse))):
            window = _restrict(v, options, start, end, which)._replace(h_0=at_h[index, which], c_0=at_c[index, which])
            one_way = replace(options, order=order, time_begin=start)
            first_use.ensure_forward(window, one_way, True)
            with matmul_precision(v.x.dtype, options.precision):
                out, _, _, gates, cells, stats = forward_pass.forward(window, one_way, True)
            assert gates is not None
            assert cells is not None
            dout = given.out
            if dout is not None:
                dout = dout.unflatten(-1, (sets, hidden)).narrow(time, start, end - start)[:, :, which].flatten(2)
            asked = {**wanted, "h_0": True, "c_0": True}
            cotangents = Cotangents(dout, dh, dc)
            first_use.ensure_backward(window, one_way, cotangents, asked)
            with matmul_precision(v.x.dtype, options.precision):
                parts = backward_pass.backward(window, one_way, Kept(out, gates, cells, stats), cotangents, asked)
            dh, dc = parts.pop("h_0"), parts.pop("c_0")
            assert dh is not None
            assert dc is not None
            fresh = _entering(v, options, end, which, reverse)
            if fresh is not None:
                for name, grad in (("reset_h", dh), ("reset_c", dc)):
                    if name in sums:
                        sums[name][which] += torch.where(fresh, grad, 0)
                dh, dc = torch.where(fresh, 0, dh), torch.where(fresh, 0, dc)
            del out, gates, cells, stats  # before the next window has its own
            for name, part in parts.items():
                total = sums[name].narrow(time, start, end - start) if name == "x" else sums[name][which]
                total += part
        for name, of_start in (("h_0", dh), ("c_0", dc)):
            if name in sums and of_start is not None:
                sums[name][which] = of_start
    return sums
