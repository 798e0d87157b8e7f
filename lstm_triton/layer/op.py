"""One LSTM layer as a pair of PyTorch operators, both directions and all members of an ensemble at once.

`torch.ops.lstm_triton.layer` and `torch.ops.lstm_triton.layer_backward` are opaque to compilers, have
fake kernels and rules for vmap, and are linked by a registered autograd formula. They run the Triton
kernels: on a GPU, or on CPU tensors in Triton's interpreter. Nothing here decides *whether* to use them,
but an exported or compiled program may find itself on a device without them: it then runs in plain PyTorch.

Shapes, with [S] = [T, B], or [B, T] with batch_first, and D sets of weights: the directions of the layer
(of each member of an ensemble in turn):
x [S, I], or [S, E, I] with inputs of their own for E members; w_ih [D, 4H, I]; w_hh [D, 4H, H]; bias
[D, 4H] or None; h_0, c_0, reset_h, reset_c [D, B, H] or None (zeros); lengths [B] integer or None; reset
[S] bool or None; the weights of the cell's variants, each or None: peephole [D, 3, H] and, all or none of
them, gain_ih and gain_hh [D, 4H] and norm_c [D, 2, H]; seed [D] int64 of their masks, or None (the same
for both directions)
-> out [S, D * H], h_n, c_n [D, B, H], and three tensors for `keep`. c_0 may have any floating type. The
meaning of lengths and reset is that of `reference/layer.py`, that of the variants that of `reference/cell.py`.
bidirectional: every second set of weights runs in reverse.

keep: what the last three outputs hold for the backward pass.
    "all": activated gates [T * B, D, 4H] and cells [T * B, D, H], both differentiable;
    "cells": nothing and cells [T * B, D, H]: the gates are computed again, by GEMMs over the sequence;
    "chunk:K": h and c (the latter in fp32) entering each window of K steps, [windows, D, B, H];
    "nothing": empty tensors; there is no backward pass.
    The third is empty, but with layer normalisation has its moments [T * B, D, 4] for "all" and "cells".

batch_invariant: the same configs and the same order of sums for every batch; c_n then comes in fp32 for
16-bit types, so that a sequence can be cut anywhere.
precision: "ieee", "tf32" or "tf32x3" for float32 data (ignored otherwise), "" to follow
`torch.backends.cudnn` as nn.LSTM does. plan: "" for the planner's choice, or "forward config|backward
config" in the notation of `Config.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.alarm import raised
from ..kernels.config import compute_dtype
from ..kernels.launch import LaunchRefused
from ..kernels.matmul import matmul
from ..planning.memory import Memory
from ..planning.precision import matmul_precision, resolve_precision
from ..planning.route import Unusable, warn_once_of_the_loop, without_waiting
from ..planning.transforms import grads_are_batched, without_autocast
from . import backward as backward_pass
from . import first_use, windows
from . import forward as forward_pass
from .choice import refusal
from .fallback import gradients_by_pytorch, gradients_in_an_operator, gradients_with_a_graph, layer_without_kernels
from .records import DIFFERENTIABLE, Choices, Cotangents, Inputs, Kept, Options, Results, read, schema_of

Result = TypeVar("Result")


def compute_layer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of `Inputs` and `Choices`: out, h_n, c_n and what `keep` says; see the module's docstring."""
    v, choices = read(arguments, Inputs, Choices)
    options = choices.options()
    if _runs_without_kernels(v, options):
        return layer_without_kernels(v, options)  # type: ignore[return-value]
    return layer_by_kernels(v, options)


def _runs_without_kernels(v: Inputs, options: Options) -> bool:
    """Whether a program that has been exported or compiled for any device is on one without kernels."""
    reason = refusal(v, options)
    if reason and (options.batch_invariant or options.plans):
        raise RuntimeError(f"lstm_triton: {reason}")
    return bool(reason)


def layer_by_kernels(
    v: Inputs, options: Options, memory: Memory | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator gives, where it has been decided that the kernels run: empty tensors for what is not kept."""
    found, nothing = by_kernels(v, options, memory), v.x.new_empty(0)
    return *found[:3], *(nothing.clone() if tensor is None else tensor for tensor in found[3:])  # type: ignore[return-value]


def by_kernels(v: Inputs, options: Options, memory: Memory | None = None) -> Results:
    """A layer by the kernels: out, h_n, c_n and what `keep` says.

    Casts are done. Where the device refuses a launch whose programs wait for each other, the pass is computed anew
    without such; what CUDA says of a wait in vain is said in words. memory: of calls with these options and tensors of
    these kinds, which are settled by the first of them.
    """
    return _on_kernels(v, memory, lambda memory: _keeping(v, options, memory))


def _on_kernels(v: Inputs, memory: Memory | None, run: Callable[[Memory], Result]) -> Result:
    try:
        with without_autocast(v.x.device.type):
            try:
                return run(memory if memory is not None and memory.stands else Memory())
            except LaunchRefused as refused:
                without_waiting(v.x.device, refused)
            return run(Memory())
    except RuntimeError as error:
        if said := raised():
            raise RuntimeError(said) from error
        raise


def _keeping(v: Inputs, options: Options, memory: Memory) -> Results:
    (kind, size), c_dtype = options.keep, options.c_dtype(v.x)
    if size:
        return Results(*windows.forward(v, options, size, True, c_dtype), None)
    if kind == "nothing":
        size = windows.size_without_gradient(v.x, v.w_hh, options.batch_first)
        if size < options.layout(v.x).seq_len:
            out, h_n, c_n, _, _ = windows.forward(v, options, size, False, c_dtype)
            return Results(out, h_n, c_n, None, None, None)
    save = kind != "nothing"
    known = memory.get("forward")
    if known is None:
        settled = first_use.ensure_forward(v, options, save, c_dtype)
        known = forward_pass.pass_of("forward", v, options)
        if settled:
            memory["forward"] = known
    with matmul_precision(v.x.dtype, options.precision):
        found = forward_pass.forward(v, options, save, c_dtype, known)
    return found if kind == "all" else found._replace(gates=None)


layer = torch.library.custom_op(
    "lstm_triton::layer",
    compute_layer,
    mutates_args=(),
    schema=f"({', '.join(schema_of(Inputs) + schema_of(Choices))}) -> ({', '.join(['Tensor'] * 6)})",
)


@layer.register_fake
def _(*arguments):
    v, choices = read(arguments, Inputs, Choices)
    options, x = choices.options(), v.x
    (sets, gate_size, hidden_size), (first, second) = v.w_hh.shape, x.shape[:2]
    layout, (kind, size) = options.layout(x), options.keep
    state = (sets, layout.batch, hidden_size)
    out, h_n = x.new_empty((first, second, sets * hidden_size)), x.new_empty(state)
    c_n = x.new_empty(state, dtype=options.c_dtype(x))
    if size:
        border = (windows.count(layout.seq_len, size), *state)
        at_h, at_c = x.new_empty(border), x.new_empty(border, dtype=compute_dtype(x.dtype))
        return out, h_n, c_n, at_h, at_c, x.new_empty(0)
    rows = (first * second, sets)
    gates = x.new_empty((*rows, gate_size) if kind == "all" else 0)
    stats = x.new_empty(0)
    if v.gain_hh is not None and kind != "nothing":
        stats = x.new_empty((*rows, 4), dtype=compute_dtype(x.dtype))
    return out, h_n, c_n, gates, x.new_empty(0 if kind == "nothing" else (*rows, hidden_size)), stats


def compute_layer_backward(*arguments: Any, memory: Memory | None = None) -> list[Tensor]:
    """Of `Cotangents`, `Inputs`, `Kept`, `Choices` and which are wanted of `records.DIFFERENTIABLE`: these gradients,
    in that order and in the types of their inputs. memory: see `by_kernels`."""
    given, v, kept, choices, wanted = read(arguments, Cotangents, Inputs, Kept, Choices)
    options, asked = choices.options(), dict(zip(DIFFERENTIABLE, wanted))
    if memory is None and _runs_without_kernels(v, options):
        return gradients_in_an_operator(given, v, options, wanted)

    def run(memory: Memory) -> dict[str, Tensor]:
        if options.keep.size:
            return windows.backward(v, options, kept.gates, kept.cells, given, asked)
        call = "backward", *(None if tensor is None else tensor.dtype for tensor in given), *wanted
        known = memory.get(call)
        if known is None:
            settled = first_use.ensure_backward(v, options, given, asked)
            known = backward_pass.pass_of("backward", v, options)
            if settled:
                memory[call] = known
        with matmul_precision(v.x.dtype, options.precision):
            again = options.keep.kind == "cells"
            gates = backward_pass.recomputed_gates(v, options, kept.out, kept.cells) if again else kept.gates
            return backward_pass.backward(v, options, kept._replace(gates=gates), given, asked, known)

    found = _on_kernels(v, memory, run)
    return [found[name].to(getattr(v, name).dtype) for name in DIFFERENTIABLE if asked[name]]


_BACKWARD = (*schema_of(Cotangents, "d"), *schema_of(Inputs), *schema_of(Kept), *schema_of(Choices), "bool[] wanted")
layer_backward = torch.library.custom_op(
    "lstm_triton::layer_backward",
    compute_layer_backward,
    mutates_args=(),
    schema=f"({', '.join(_BACKWARD)}) -> Tensor[]",
)


@layer_backward.register_fake
def _(*arguments):
    _, v, _, _, wanted = read(arguments, Cotangents, Inputs, Kept, Choices)
    asked = (name for name, want in zip(DIFFERENTIABLE, wanted) if want)
    return [torch.empty_like(getattr(v, name), memory_format=torch.contiguous_format) for name in asked]


def setup_context(ctx, inputs, output) -> None:
    """What the backward pass of a layer needs."""
    out, _, _, gates, cells, stats = output
    v, choices = read(inputs, Inputs, Choices)
    ctx.set_materialize_grads(False)
    constant = {"all": (stats,), "cells": (gates, stats)}.get(choices.keep, (gates, cells, stats))
    ctx.mark_non_differentiable(*constant)
    ctx.save_for_backward(*v, *Kept(out, gates, cells, stats))
    ctx.choices = choices


def gradients(
    ctx,
    saved: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    needed: Sequence[bool],
    run: Callable[..., list[Tensor]],
) -> tuple[Tensor | None, ...]:
    """Those of all arguments of a layer, where they are needed.

    saved: ctx's tensors; run: `compute_layer_backward`, or its operator.
    """
    choices, (v, kept) = ctx.choices, read(saved, Inputs, Kept)
    if choices.keep == "nothing":
        raise RuntimeError('lstm_triton::layer was called with keep="nothing": there is nothing to go back through')
    by_name = dict(zip(Inputs._fields, needed))
    wanted = [by_name[name] for name in DIFFERENTIABLE]
    given = Cotangents(*cotangents[:-1])  # the moments of layer normalisation are constants
    if all(cotangent is None for cotangent in given):
        return (None,) * len(needed)
    if torch.is_grad_enabled():  # create_graph=True
        found = gradients_with_a_graph(given, v, choices.options(), wanted)
    elif grads_are_batched():
        warn_once_of_the_loop("is_grads_batched=True asks for many backward passes at once")
        found = gradients_by_pytorch(given, v, choices.options(), wanted)
    else:
        try:
            found = run(*given, *v, *kept, *choices, wanted)
        except Unusable as error:
            # Too late for another path of the whole call; and training goes on.
            if choices.plan or choices.options().keep.size:
                raise
            warn_once_of_the_loop(f"no config of a backward pass is left: {error}")
            found = gradients_by_pytorch(given, v, choices.options(), wanted)
    grads = dict(zip((name for name, want in zip(DIFFERENTIABLE, wanted) if want), found))
    return (*(grads.get(name) for name in Inputs._fields), *(None,) * len(Choices._fields))


layer.register_autograd(
    lambda ctx, *cotangents: gradients(ctx, ctx.saved_tensors, cotangents, ctx.needs_input_grad, layer_backward),
    setup_context=setup_context,
)


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
