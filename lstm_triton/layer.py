"""What the operators of `ops.py` do: GEMMs over the whole sequence around the kernels' recurrences.

Shapes are those of `ops.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import planner
from .hoisted import initial_gradient, previous_hidden, reset_gradient
from .kernels.backward import lstm_backward
from .kernels.config import Config, Layout
from .kernels.forward import lstm_forward
from .kernels.matmul import matmul
from .planner import NoPlan, plan_single
from .precision import matmul_precision
from .problem import PASSES, SMALLEST_BATCH, Problem
from .routing import kernel_device, plan_for
from .settings import AUTOTUNE

DIFFERENTIABLE = ("x", "w_ih", "w_hh", "bias", "h_0", "c_0", "reset_h", "reset_c")
OF_SETS = DIFFERENTIABLE[1:]  # their first axis counts the sets of weights


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


class Cotangents(NamedTuple):
    """Gradients of the operator's outputs; None is zero."""

    out: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    gates: Tensor | None = None
    cells: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """How a layer is computed. order: which sets of weights run in reverse, "forward", "reverse" or "both"."""

    batch_first: bool
    order: str
    batch_invariant: bool
    precision: str
    plan: str

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


def _single_config(v: Inputs, options: Options, layout: Layout) -> Config | None:
    """The config of a sequence of one step in one launch; None if it is to be computed as any other."""
    if layout.seq_len != 1 or v.x.dim() == 4 or options.batch_invariant:
        return None
    if v.x.shape[2] == 0 or v.w_ih[0].numel() >= 2**31:
        return None  # nothing to multiply, or more than 32-bit offsets inside W_ih
    if options.plan:
        config = Config.decode(options.plan.split("|")[0])
        return config if config.placement == "single" else None
    device = kernel_device(v.w_hh.device)
    if isinstance(device, NoPlan):
        return None
    dtype, (sets, _, hidden_size) = str(v.w_hh.dtype).removeprefix("torch."), v.w_hh.shape
    return plan_single(Problem("forward", hidden_size, layout.batch, sets, dtype, options.precision), device)


def refusal(v: Inputs, options: Options) -> str:
    """Why no kernel runs this layer, whatever its sizes; "" if one may."""
    if options.plan:
        return ""
    device = kernel_device(v.x.device)
    dtype = str(v.w_hh.dtype).removeprefix("torch.")
    none = device if isinstance(device, NoPlan) else planner.refusal(device, dtype, options.precision)
    return "" if none is None else none.reason


def choose_config(which: str, options: Options, w_hh: Tensor, batch: int) -> Config:
    """The config of one pass: from the `plan` argument, else from the planner."""
    sets, _, hidden_size = w_hh.shape
    if options.plan:
        texts = options.plan.split("|")
        if len(texts) != len(PASSES):
            raise ValueError(f"a plan is two configs with a | between them, got {options.plan!r}")
        config = Config.decode(texts[PASSES.index(which)])
        if config.placement == "local" and config.block_h < hidden_size:
            raise ValueError(f"placement 'local' needs block_h >= H = {hidden_size}, got {config.block_h}")
        return config
    dtype = str(w_hh.dtype).removeprefix("torch.")
    device = kernel_device(w_hh.device)
    if isinstance(device, NoPlan):
        raise RuntimeError(f"lstm_triton: {device.reason}")
    # One config for all batches: its tiles say in which order a row's sums are made.
    batch = SMALLEST_BATCH if options.batch_invariant else batch
    problem = Problem(which, hidden_size, batch, sets, dtype, options.precision)
    if w_hh.is_cuda and AUTOTUNE.read() == "on":
        from .tuning import first_call

        first_call.tune(problem, device, w_hh.device)
    chosen = plan_for(problem, device)
    if isinstance(chosen, NoPlan):
        raise RuntimeError(f"lstm_triton: {chosen.reason}")
    return chosen.config


def ready(tensor: Tensor | None) -> Tensor | None:
    """Contiguous and 16-byte aligned: Triton compiles a kernel anew for a pointer that is not."""
    return None if tensor is None else _aligned(tensor)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pair(h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if (h is None) != (c is None):
        raise RuntimeError("an initial or reset state has an h and a c: give both or none")
    return None if h is None or c is None else (_aligned(h), _aligned(c))


def _marks(v: Inputs, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """lengths [B] int32 and reset [rows], as the kernels read them."""
    # Clamped: a length beyond T would lead the kernels out of their buffers.
    lengths = None if v.lengths is None else v.lengths.to(v.x.device, torch.int32).clamp(0, layout.seq_len)
    return lengths, ready(None if v.reset is None else v.reset.reshape(-1))


def projected_input(v: Inputs, options: Options) -> Tensor:
    """x W_ih^T + bias for every set of weights: [rows, D, 4H]."""
    rows, (sets, gate_size, input_size) = options.layout(v.x).rows, v.w_ih.shape
    with matmul_precision(v.x, options.precision):
        if v.x.dim() == 4:  # a set of inputs for each member of an ensemble
            members = v.x.shape[2]
            result = v.x.new_empty((rows, members, sets // members * gate_size))
            by_member = v.x.reshape(rows, members, input_size).transpose(0, 1)
            weights = v.w_ih.reshape(members, sets // members * gate_size, input_size).transpose(1, 2)
            if options.batch_invariant:
                result.copy_(options.multiply(by_member, weights).transpose(0, 1))
            else:
                torch.bmm(by_member, weights, out=result.transpose(0, 1))
            if v.bias is not None:
                result += v.bias.reshape(members, -1)
            return result.view(rows, sets, gate_size)
        x, weights = v.x.reshape(rows, input_size), v.w_ih.contiguous().flatten(0, 1).t()
        if options.batch_invariant:
            flat = matmul(x, weights, None if v.bias is None else v.bias.flatten().contiguous(), options.precision)
        else:
            flat = x @ weights if v.bias is None else torch.addmm(v.bias.flatten(), x, weights)
    return flat.view(rows, sets, gate_size)


def forward(
    v: Inputs, options: Options, save: bool, c_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """out [S, D * H], h_n, c_n, gates (activated if `save`, else spent or None) and cells (None unless `save`)."""
    layout = options.layout(v.x)
    config = _single_config(v, options, layout)
    gates = projection = None
    if config is None:
        config = choose_config("forward", options, v.w_hh, layout.batch)
        gates = projected_input(v, options)
    else:
        projection = _aligned(v.x.view(layout.batch, v.x.shape[2])), _aligned(v.w_ih), ready(v.bias)
        if save:
            gates = v.x.new_empty((layout.batch, *v.w_hh.shape[:2]))
    lengths, reset = _marks(v, layout)
    out, h_n, c_n, cells = lstm_forward(
        gates,
        _aligned(v.w_hh),
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
    )
    # Not a view for autograd: one could not be changed in place (`_unsafe_view` is what aten's matmul returns).
    out = torch.ops.aten._unsafe_view(out, [*v.x.shape[:2], out.shape[1] * out.shape[2]])
    return out, h_n, c_n, gates, cells


def recomputed_gates(v: Inputs, options: Options, out: Tensor) -> Tensor:
    """The activated gates [rows, D, 4H] that the forward pass did not keep: two GEMMs over the whole sequence."""
    gates = projected_input(v, options)
    lengths, _ = _marks(v, options.layout(v.x))
    sets = v.w_hh.shape[0]
    h_prev = previous_hidden(out, v.h_0, lengths, v.reset, v.reset_h, sets, options.order, options.batch_first)
    with matmul_precision(v.x, options.precision):
        for index in range(sets):
            if options.batch_invariant:
                gates[:, index] += options.multiply(h_prev[:, index], v.w_hh[index].t())
            else:
                gates[:, index].addmm_(h_prev[:, index], v.w_hh[index].t())
    i_f, g, o = gates.unflatten(-1, (4, -1)).split((2, 1, 1), dim=2)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return gates


def backward(
    v: Inputs,
    options: Options,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    given: Cotangents,
    wanted: Mapping[str, bool],
) -> dict[str, Tensor]:
    """The wanted gradients, by the names of `DIFFERENTIABLE`; those of c_0 and reset_c in fp32."""
    layout, sets = options.layout(v.x), v.w_hh.shape[0]
    config = choose_config("backward", options, v.w_hh, layout.batch)
    lengths, reset = _marks(v, layout)
    dgates, dc_0, dreset_c = lstm_backward(
        ready(given.out),
        ready(given.h_n),
        ready(given.c_n),
        gates,
        cells,
        _aligned(v.w_hh),
        ready(v.c_0),
        layout,
        config,
        options.precision,
        lengths,
        reset,
        ready(v.reset_c),
        options.order,
        ready(given.cells),
        ready(given.gates),
    )
    grads: dict[str, Tensor] = {}
    members = v.x.shape[2] if v.x.dim() == 4 else 1
    own_gates = v.w_ih.shape[0] // members * v.w_ih.shape[1]  # 4H of each of a member's sets
    by_member = dgates.view(layout.rows, members, own_gates).transpose(0, 1)
    with matmul_precision(v.x, options.precision):
        if wanted["x"]:
            weights = v.w_ih.reshape(members, own_gates, v.w_ih.shape[2])
            if members == 1:
                dx = options.multiply(by_member[0], weights[0])
            else:
                dx = options.multiply(by_member, weights).transpose(0, 1)
            grads["x"] = dx.reshape(v.x.shape)
        if wanted["w_ih"]:
            x = v.x.reshape(layout.rows, members, v.x.shape[-1]).transpose(0, 1)
            grads["w_ih"] = (by_member.transpose(1, 2) @ x).view(v.w_ih.shape)
        if wanted["w_hh"]:
            marks = (lengths, v.reset, v.reset_h)
            h_prev = previous_hidden(out, v.h_0, *marks, sets, options.order, options.batch_first)
            grads["w_hh"] = dgates.permute(1, 2, 0) @ h_prev.permute(1, 0, 2)
        if wanted["bias"]:
            grads["bias"] = dgates.sum(0)
        by_time = dgates.unflatten(0, v.x.shape[:2])
        by_time = by_time.transpose(0, 1) if options.batch_first else by_time
        by_row = v.reset.t() if v.reset is not None and options.batch_first else v.reset
        rest = (options.order, options.multiply)
        if wanted["h_0"]:
            grads["h_0"] = initial_gradient(by_time, given.h_n, v.w_hh, lengths, by_row, *rest)
        if wanted["c_0"]:
            grads["c_0"] = dc_0
        if wanted["reset_h"]:
            assert by_row is not None
            grads["reset_h"] = reset_gradient(by_time, v.w_hh, lengths, by_row, *rest)
        if wanted["reset_c"]:
            assert dreset_c is not None
            grads["reset_c"] = dreset_c
    return grads
