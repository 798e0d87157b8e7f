"""The forward pass of a layer: GEMMs over the whole sequence around the kernels' recurrence.

This file has what both passes need, too; `backward.py` has the other one. Shapes are those of `op.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.config import PLAIN_CELL, Layout
from ..kernels.forward import lstm_forward
from ..kernels.masks import sequence_mask
from ..kernels.matmul import matmul
from ..kernels.variants import PLAIN, Variants
from ..reference.cell import norm_gates
from ..reference.masks import INPUT, RECURRENT
from .choice import Pass, fits_one_launch, pass_of
from .records import Inputs, Options, Results


def ready(tensor: Tensor | None) -> Tensor | None:
    """Contiguous and 16-byte aligned: Triton compiles a kernel anew for a pointer that is not."""
    return None if tensor is None else aligned(tensor)


def aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pair(h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if (h is None) != (c is None):
        raise RuntimeError("an initial or reset state has an h and a c: give both or none")
    return None if h is None or c is None else (aligned(h), aligned(c))


def marks_of(v: Inputs, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """lengths [B] int32 and reset [rows], as the kernels read them."""
    if v.lengths is None and v.reset is None:
        return None, None
    # Clamped: a length beyond T would lead the kernels out of their buffers.
    lengths = None if v.lengths is None else v.lengths.to(v.x.device, torch.int32).clamp(0, layout.seq_len)
    return lengths, ready(None if v.reset is None else v.reset.reshape(-1))


def variants_of(v: Inputs, options: Options) -> Variants:
    """What the kernels get for the variants of the cell."""
    cell, h_mask = options.cell, None
    if cell == PLAIN_CELL and v.peephole is None and v.gain_hh is None and not options.time_begin:
        return PLAIN
    if cell.sampled and cell.variational_h:
        batch, hidden_size = options.layout(v.x).batch, v.w_hh.shape[2]
        assert v.seed is not None
        h_mask = sequence_mask(v.seed, batch, hidden_size, RECURRENT, cell.variational_h, v.x.dtype, options.order)
    return Variants(
        cell, ready(v.peephole), ready(v.gain_hh), ready(v.norm_c), ready(v.seed), h_mask, options.time_begin
    )  # fmt: skip


def input_mask(v: Inputs, options: Options) -> Tensor | None:
    """Broadcasts over x: one mask per row, and per member of an ensemble where x has members; None without one."""
    cell = options.cell
    if not (cell.sampled and cell.variational_x):
        return None
    assert v.seed is not None
    batch, members = options.layout(v.x).batch, v.x.shape[2] if v.x.dim() == 4 else 1
    of_members = v.seed[:: v.seed.shape[0] // members]
    mask = sequence_mask(of_members, batch, v.x.shape[-1], INPUT, cell.variational_x, v.x.dtype)  # [E, B, I]
    mask = mask.transpose(0, 1) if v.x.dim() == 4 else mask[0]
    return mask.unsqueeze(1 if options.batch_first else 0)


def _masked_input(v: Inputs, options: Options) -> Tensor:
    mask = input_mask(v, options)
    return v.x if mask is None else v.x * mask


def projected_input(v: Inputs, options: Options) -> Tensor:
    """x W_ih^T + bias for every set of weights, normalised in between where that is asked for: [rows, D, 4H]."""
    if v.gain_ih is None:
        return projected(_masked_input(v, options), v.w_ih, v.bias, options)
    flat = projected(_masked_input(v, options), v.w_ih, None, options)
    flat = norm_gates(flat, v.gain_ih, options.cell.coupled_gates)
    return flat if v.bias is None else flat.add_(v.bias)


def projected(x: Tensor, w_ih: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    rows, (sets, gate_size, input_size) = options.layout(x).rows, w_ih.shape
    if x.dim() == 4:  # a set of inputs for each member of an ensemble
        members = x.shape[2]
        result = x.new_empty((rows, members, sets // members * gate_size))
        by_member = x.reshape(rows, members, input_size).transpose(0, 1)
        weights = w_ih.reshape(members, sets // members * gate_size, input_size).transpose(1, 2)
        if options.batch_invariant:
            result.copy_(options.multiply(by_member, weights).transpose(0, 1))
        else:
            torch.bmm(by_member, weights, out=result.transpose(0, 1))
        if bias is not None:
            result += bias.reshape(members, -1)
        return result.view(rows, sets, gate_size)
    x, weights = x.reshape(rows, input_size), w_ih.contiguous().flatten(0, 1).t()
    if options.batch_invariant:
        flat = matmul(x, weights, None if bias is None else bias.flatten().contiguous(), options.precision)
    else:
        flat = x @ weights if bias is None else torch.addmm(bias.flatten(), x, weights)
    return flat.view(rows, sets, gate_size)


def forward(
    v: Inputs, options: Options, save: bool, c_dtype: torch.dtype | None = None, known: Pass | None = None
) -> Results:
    """The layer; cells and stats are kept only to `save`. known: how a call like this one has been run."""
    layout = options.layout(v.x)
    config, launch = known or pass_of("forward", v, options)
    gates = projection = None
    if config.placement != "single" or not fits_one_launch(v, options, layout):
        gates = projected_input(v, options)
    else:
        rows = _masked_input(v, options).view(layout.batch, v.x.shape[2])
        projection = aligned(rows), aligned(v.w_ih), ready(v.bias)
        if save:
            gates = v.x.new_empty((layout.batch, *v.w_hh.shape[:2]))
    lengths, reset = marks_of(v, layout)
    out, h_n, c_n, cells, stats = lstm_forward(
        gates,
        aligned(v.w_hh),
        _pair(v.h_0, v.c_0),
        layout,
        config,
        options.precision,
        save,
        lengths=lengths,
        reset=reset,
        reset_state=_pair(v.reset_h, v.reset_c),
        order=options.order,
        c_dtype=c_dtype,
        projection=projection,
        variants=variants_of(v, options),
        launch=launch,
    )
    # Not a view for autograd: one could not be changed in place (`_unsafe_view` is what aten's matmul returns).
    out = torch.ops.aten._unsafe_view(out, [*v.x.shape[:2], out.shape[1] * out.shape[2]])
    return Results(out, h_n, c_n, gates, cells, stats)
