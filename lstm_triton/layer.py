"""What the operators of `ops.py` do: GEMMs over the whole sequence around the kernels' recurrences.

This file has what both passes need and the forward one, `adjoint.py` the backward one.

Shapes are those of `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import planner
from .device import on_gpu
from .equations import norm_gates
from .kernels.config import PLAIN_CELL, Cell, Config, Layout
from .kernels.forward import lstm_forward
from .kernels.masks import sequence_mask
from .kernels.matmul import matmul
from .kernels.variants import Variants
from .philox import INPUT, RECURRENT
from .planner import NoPlan, Plan, plan_single
from .problem import INVARIANT_BATCH, PASSES, Problem
from .routing import Unusable, kernel_device, plan_for, wrong_configs
from .settings import AUTOTUNE

WEIGHTS = ("peephole", "gain_ih", "gain_hh", "norm_c")  # of the variants of the cell
DIFFERENTIABLE = ("x", "w_ih", "w_hh", "bias", "h_0", "c_0", "reset_h", "reset_c", *WEIGHTS)
GIVEN = "the call"  # where a plan came from that an argument gave
OF_SETS = (*DIFFERENTIABLE[1:], "seed")  # their first axis counts the sets of weights


class Inputs(NamedTuple):
    """The tensors of one layer; see `ops.py`."""

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


def _fits_one_launch(v: Inputs, options: Options, layout: Layout) -> bool:
    if layout.seq_len != 1 or v.x.dim() == 4 or options.batch_invariant or v.gain_ih is not None:
        return False
    return v.x.shape[2] > 0 and v.w_ih[0].numel() < 2**31  # something to multiply, by 32-bit offsets inside W_ih


def _single_plan(v: Inputs, options: Options, layout: Layout) -> Plan | None:
    """The plan of a sequence of one step in one launch; None if it is to be computed as any other."""
    if not _fits_one_launch(v, options, layout):
        return None
    if options.plan:
        config = Config.decode(options.plan.split("|")[0])
        return Plan(config, GIVEN) if config.placement == "single" else None
    device = kernel_device(v.w_hh.device)
    if isinstance(device, NoPlan):
        return None
    problem = problem_of("forward", v, options, layout.batch)
    chosen = plan_single(problem, device)
    return None if chosen is None or chosen in wrong_configs(problem, device) else Plan(chosen, "heuristic")


def problem_of(which: str, v: Inputs, options: Options, batch: int) -> Problem:
    """What a plan is asked for."""
    dtype, (sets, _, hidden_size) = str(v.w_hh.dtype).removeprefix("torch."), v.w_hh.shape
    # One config for all batches: its tiles say in which order a row's sums are made.
    batch = INVARIANT_BATCH if options.batch_invariant else batch
    return Problem(which, hidden_size, batch, sets, dtype, options.precision, kind_of(v, options.cell))


def refusal(v: Inputs, options: Options) -> str:
    """Why no kernel runs this layer, whatever its sizes; "" if one may."""
    if options.plan:
        return ""
    device = kernel_device(v.x.device)
    dtype = str(v.w_hh.dtype).removeprefix("torch.")
    none = device if isinstance(device, NoPlan) else planner.refusal(device, dtype, options.precision)
    return "" if none is None else none.reason


def kind_of(v: Inputs, cell: Cell) -> str:
    """One of `problem.KINDS`."""
    plain = cell == PLAIN_CELL and v.peephole is None
    if v.gain_hh is not None:
        return "norm" if plain else "norm+"
    return "plain" if plain else "variant"


def choose_plan(which: str, v: Inputs, options: Options) -> Plan:
    """The plan of one pass: from the `plan` argument, else from the planner; Unusable without one."""
    layout, hidden_size = options.layout(v.x), v.w_hh.shape[2]
    if which == "forward" and (single := _single_plan(v, options, layout)) is not None:
        return single
    if options.plan:
        texts = options.plan.split("|")
        if len(texts) != len(PASSES):
            raise ValueError(f"a plan is two configs with a | between them, got {options.plan!r}")
        config = Config.decode(texts[PASSES.index(which)])
        if config.placement == "local" and config.block_h < hidden_size:
            raise ValueError(f"placement 'local' needs block_h >= H = {hidden_size}, got {config.block_h}")
        return Plan(config, GIVEN)
    device = kernel_device(v.w_hh.device)
    if isinstance(device, NoPlan):
        raise Unusable(f"lstm_triton: {device.reason}")
    problem = problem_of(which, v, options, layout.batch)
    if on_gpu(v.w_hh.device) and AUTOTUNE.read() == "on":
        from .tuning import first_call

        first_call.tune(problem, device, v.w_hh.device)
    chosen = plan_for(problem, device)
    if isinstance(chosen, NoPlan):
        raise Unusable(f"lstm_triton: {chosen.reason}")
    return chosen


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
    # Clamped: a length beyond T would lead the kernels out of their buffers.
    lengths = None if v.lengths is None else v.lengths.to(v.x.device, torch.int32).clamp(0, layout.seq_len)
    return lengths, ready(None if v.reset is None else v.reset.reshape(-1))


def variants_of(v: Inputs, options: Options) -> Variants:
    """What the kernels get for the variants of the cell."""
    cell, h_mask = options.cell, None
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
    flat = norm_gates(flat, v.gain_ih, options.cell.coupled)
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


def forward(v: Inputs, options: Options, save: bool, c_dtype: torch.dtype | None = None) -> Results:
    """The layer; cells and stats are kept only to `save`."""
    layout = options.layout(v.x)
    config = choose_plan("forward", v, options).config
    gates = projection = None
    if config.placement != "single" or not _fits_one_launch(v, options, layout):
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
        lengths,
        reset,
        _pair(v.reset_h, v.reset_c),
        options.order,
        c_dtype,
        projection,
        variants_of(v, options),
    )
    # Not a view for autograd: one could not be changed in place (`_unsafe_view` is what aten's matmul returns).
    out = torch.ops.aten._unsafe_view(out, [*v.x.shape[:2], out.shape[1] * out.shape[2]])
    return Results(out, h_n, c_n, gates, cells, stats)
