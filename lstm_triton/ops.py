"""One LSTM layer as a pair of PyTorch operators, both directions and all members of an ensemble at once.

`torch.ops.lstm_triton.layer` and `torch.ops.lstm_triton.layer_backward` are opaque to compilers, have
fake kernels and rules for vmap, and are linked by a registered autograd formula. They run the Triton
kernels: on a GPU, or on CPU tensors in Triton's interpreter. Nothing here decides *whether* to use them,
but an exported program may find itself on a device without them: inference then runs in plain PyTorch.

Shapes, with [S] = [T, B], or [B, T] with batch_first, and D sets of weights: the directions of the layer
(of each member of an ensemble in turn):
x [S, I], or [S, E, I] with inputs of their own for E members; w_ih [D, 4H, I]; w_hh [D, 4H, H]; bias
[D, 4H] or None; h_0, c_0, reset_h, reset_c [D, B, H] or None (zeros); lengths [B] integer or None; reset
[S] bool or None -> out [S, D * H], h_n, c_n [D, B, H], and two tensors for `keep`. c_0 may have any
floating type. The meaning of lengths and reset is `reference.py`'s. bidirectional: every second set of
weights runs in reverse.

keep: what the last two outputs hold for the backward pass.
    "all": activated gates [T * B, D, 4H] and cells [T * B, D, H], both differentiable;
    "cells": nothing and cells [T * B, D, H]: the gates are computed again, by GEMMs over the sequence;
    "chunk:K": h and c (the latter in fp32) entering each window of K steps, [windows, D, B, H];
    "nothing": two empty tensors; there is no backward pass.

batch_invariant: the same configs and the same order of sums for every batch; c_n then comes in fp32 for
16-bit types, so that a sequence can be cut anywhere.
precision: "ieee", "tf32" or "tf32x3" for float32 data (ignored otherwise), "" to follow
`torch.backends.cudnn` as nn.LSTM does. plan: "" for the planner's choice, or "forward config|backward
config" in the notation of `Config.encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layer as layers
from . import reference, windows
from .kernels.launch import compute_dtype
from .kernels.matmul import matmul
from .layer import DIFFERENTIABLE, Cotangents, Inputs, Options
from .precision import resolve_precision
from .routing import warn_once_of_the_loop

KEEPS = ("nothing", "all", "cells")


def window_size(keep: str) -> int:
    """K of "chunk:K", 0 for the others; ValueError for what is none of them."""
    kind, colon, size = keep.partition(":")
    if keep not in KEEPS and not (kind == "chunk" and colon and size.isdecimal() and int(size) > 0):
        raise ValueError(f"keep should be one of {', '.join(map(repr, KEEPS))} or 'chunk:K', got: {keep!r}")
    return int(size or 0)


def _options(batch_first: bool, bidirectional: bool, batch_invariant: bool, precision: str, plan: str) -> Options:
    order = "both" if bidirectional else "forward"
    return Options(batch_first, order, batch_invariant, resolve_precision(precision), plan)


def _c_dtype(x: Tensor, batch_invariant: bool) -> torch.dtype:
    return compute_dtype(x.dtype) if batch_invariant else x.dtype


def without_kernels(
    v: Inputs, batch_first: bool, bidirectional: bool, training: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer by aten, or step by step where aten lacks something; as cuDNN has it, only `training` has a gradient."""
    directions = 2 if bidirectional else 1
    marked = v.lengths is not None or v.reset is not None
    if marked or v.x.dim() == 4 or v.w_ih.shape[0] != directions:
        found = reference.ensemble_forward(*v, batch_first=batch_first, bidirectional=bidirectional)
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()
    batch = v.x.shape[0] if batch_first else v.x.shape[1]
    zeros = v.x.new_zeros((directions, batch, v.w_hh.shape[2]))
    state = [zeros if tensor is None else tensor.to(v.x.dtype) for tensor in (v.h_0, v.c_0)]
    weights = []
    for index in range(directions):
        weights += [v.w_ih[index], v.w_hh[index]]
        if v.bias is not None:
            weights += [v.bias[index], torch.zeros_like(v.bias[index])]
    return torch._VF.lstm(v.x, state, weights, v.bias is not None, 1, 0.0, training, bidirectional, batch_first)


@torch.library.custom_op("lstm_triton::layer", mutates_args=())
def layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_first: bool,
    bidirectional: bool,
    keep: str,
    batch_invariant: bool,
    precision: str,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, h_n, c_n and what `keep` says; see the module's docstring."""
    v = Inputs(x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c)
    options = _options(batch_first, bidirectional, batch_invariant, precision, plan)
    c_dtype, nothing = _c_dtype(x, batch_invariant), x.new_empty(0)
    size = window_size(keep)
    reason = layers.refusal(v, options)
    if reason and (keep != "nothing" or batch_invariant or plan):
        raise RuntimeError(f"lstm_triton: {reason}")
    if reason:
        return (*without_kernels(v, batch_first, bidirectional), nothing, nothing.clone())
    if size:
        out, h_n, c_n, at_h, at_c = windows.forward(v, options, size, True, c_dtype)
        assert at_h is not None
        assert at_c is not None
        return out, h_n, c_n, at_h, at_c
    if keep == "nothing":
        size = windows.size_without_gradient(x, w_hh, batch_first)
        if size < options.layout(x).seq_len:
            out, h_n, c_n, _, _ = windows.forward(v, options, size, False, c_dtype)
            return out, h_n, c_n, nothing, nothing.clone()
    out, h_n, c_n, gates, cells = layers.forward(v, options, keep != "nothing", c_dtype)
    return (
        out,
        h_n,
        c_n,
        nothing if gates is None or keep != "all" else gates,
        nothing.clone() if cells is None else cells,
    )


@layer.register_fake
def _(
    x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c,
    batch_first, bidirectional, keep, batch_invariant, precision, plan,
):  # fmt: skip
    (sets, gate_size, hidden_size), (first, second) = w_hh.shape, x.shape[:2]
    batch, seq_len = (first, second) if batch_first else (second, first)
    state = (sets, batch, hidden_size)
    out, h_n = x.new_empty((first, second, sets * hidden_size)), x.new_empty(state)
    c_n = x.new_empty(state, dtype=_c_dtype(x, batch_invariant))
    size = window_size(keep)
    if size:
        border = (windows.count(seq_len, size), *state)
        return out, h_n, c_n, x.new_empty(border), x.new_empty(border, dtype=compute_dtype(x.dtype))
    gates = x.new_empty((first * second, sets, gate_size) if keep == "all" else 0)
    return out, h_n, c_n, gates, x.new_empty(0 if keep == "nothing" else (first * second, sets, hidden_size))


@torch.library.custom_op("lstm_triton::layer_backward", mutates_args=())
def layer_backward(
    dout: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dgates: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    out: Tensor,
    kept_1: Tensor,
    kept_2: Tensor,
    batch_first: bool,
    bidirectional: bool,
    keep: str,
    batch_invariant: bool,
    precision: str,
    plan: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of the gradients of `layer.DIFFERENTIABLE`, in that order and in the types of their inputs."""
    v = Inputs(x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c)
    options = _options(batch_first, bidirectional, batch_invariant, precision, plan)
    given, asked = Cotangents(dout, dh_n, dc_n, dgates, dcells), dict(zip(DIFFERENTIABLE, wanted))
    size = window_size(keep)
    if size:
        found = windows.backward(v, options, size, kept_1, kept_2, given, asked)
    else:
        gates = layers.recomputed_gates(v, options, out) if keep == "cells" else kept_1
        found = layers.backward(v, options, out, gates, kept_2, given, asked)
    return [found[name].to(getattr(v, name).dtype) for name in DIFFERENTIABLE if asked[name]]


@layer_backward.register_fake
def _(dout, dh_n, dc_n, dgates, dcells, x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c, *rest):
    inputs = (x, w_ih, w_hh, bias, h_0, c_0, reset_h, reset_c)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, want in zip(inputs, rest[-1]) if want]


def _setup_context(ctx, inputs, output) -> None:
    out, _, _, kept_1, kept_2 = output
    *tensors, batch_first, bidirectional, keep, batch_invariant, precision, plan = inputs
    ctx.set_materialize_grads(False)
    if keep == "cells":
        ctx.mark_non_differentiable(kept_1)  # nothing
    elif keep != "all":
        ctx.mark_non_differentiable(kept_1, kept_2)
    ctx.save_for_backward(*tensors, out, kept_1, kept_2)
    ctx.options = (batch_first, bidirectional, keep, batch_invariant, precision, plan)


def _backward(ctx, *cotangents):
    keep = ctx.options[2]
    if keep == "nothing":
        raise RuntimeError('lstm_triton::layer was called with keep="nothing": there is nothing to go back through')
    # One flag for each of the inputs x, w_ih, w_hh, bias, h_0, c_0 and reset_h, reset_c.
    wanted = [*ctx.needs_input_grad[:6], *ctx.needs_input_grad[8:10]]
    if all(cotangent is None for cotangent in cotangents):
        return (None,) * 16
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        found = _with_a_graph(list(cotangents), Inputs(*saved[:10]), ctx.options[0], ctx.options[1], wanted)
    else:
        found = layer_backward(*cotangents, *saved, *ctx.options, wanted)
    grads = iter(found)
    of_inputs = [next(grads) if want else None for want in wanted]
    return (*of_inputs[:6], None, None, *of_inputs[6:], *(None,) * 6)


def _with_a_graph(
    cotangents: list[Tensor | None], v: Inputs, batch_first: bool, bidirectional: bool, wanted: list[bool]
) -> list[Tensor]:
    """The wanted gradients as functions that autograd can differentiate again: step by step."""
    if v.x.is_cuda:
        warn_once_of_the_loop("create_graph=True asks for derivatives of derivatives")
    results = reference.ensemble_forward(*v, batch_first=batch_first, bidirectional=bidirectional)
    inputs = [getattr(v, name) for name in DIFFERENTIABLE]
    pairs = [(result, given) for result, given in zip(results, cotangents) if given is not None]
    targets = [tensor for tensor, want in zip(inputs, wanted) if want and tensor is not None]
    given = [result for result, _ in pairs], targets, [cotangent for _, cotangent in pairs]
    return list(torch.autograd.grad(*given, create_graph=True, materialize_grads=True))


layer.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("lstm_triton::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N]; a row's bits do not depend on the others."""
    rows = matmul(x.reshape(-1, x.shape[-1]), weight.t(), None, resolve_precision(precision))
    return rows.view(*x.shape[:-1], weight.shape[0])


@linear.register_fake
def _(x, weight, precision):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    dx = linear(grad, weight.t(), ctx.precision) if ctx.needs_input_grad[0] else None
    dweight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _linear_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.precision = inputs[2]


linear.register_autograd(_linear_backward, setup_context=_linear_context)


@linear.register_vmap
def _(info, in_dims, x, weight, precision):
    if in_dims[1] is None:
        return linear(x.movedim(in_dims[0], 0), weight, precision), 0
    members = [x if in_dims[0] is None else x.select(in_dims[0], index) for index in range(info.batch_size)]
    return torch.stack([linear(one, w, precision) for one, w in zip(members, weight.movedim(in_dims[1], 0))]), 0
