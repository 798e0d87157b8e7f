"""One LSTM layer as a pair of PyTorch operators, both directions at once.

`torch.ops.lstm_triton.layer` and `torch.ops.lstm_triton.layer_backward` are opaque to compilers,
have fake kernels, and are linked by a registered autograd formula. They run the Triton kernels:
on a GPU, or on CPU tensors in Triton's interpreter. Nothing here decides *whether* to use them.

Shapes, with [S] = [T, B], or [B, T] with batch_first:
x [S, I]; w_ih [D, 4H, I]; w_hh [D, 4H, H]; bias [D, 4H] or None; h_0, c_0, reset_h, reset_c
[D, B, H] or None (zeros); lengths [B] integer or None; reset [S] bool or None -> out [S, D * H],
h_n, c_n [D, B, H], and what the backward pass reads: gates [T * B, D, 4H], cells [T * B, D, H],
empty unless `save`. The meaning of lengths and reset is `reference.py`'s.

precision: "ieee", "tf32" or "tf32x3" for float32 data (ignored otherwise), "" to follow
`torch.backends.cudnn` as nn.LSTM does. plan: "" for the
planner's choice, or "forward config|backward config" in the notation of `Config.encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .hoisted import initial_gradient, previous_hidden, reset_gradient
from .kernels.backward import lstm_backward
from .kernels.config import Config, Layout
from .kernels.forward import lstm_forward
from .planner import NoPlan
from .precision import matmul_precision, resolve_precision
from .problem import PASSES, Problem
from .routing import kernel_device, plan_for, warn_once_of_the_loop
from .settings import AUTOTUNE


def choose_config(which: str, override: str, w_hh: Tensor, batch: int, precision: str) -> Config:
    """The config of one pass: from the `plan` argument, else from the planner."""
    directions, _, hidden_size = w_hh.shape
    if override:
        texts = override.split("|")
        if len(texts) != len(PASSES):
            raise ValueError(f"a plan is two configs with a | between them, got {override!r}")
        config = Config.decode(texts[PASSES.index(which)])
        if config.placement == "local" and config.block_h < hidden_size:
            raise ValueError(f"placement 'local' needs block_h >= H = {hidden_size}, got {config.block_h}")
        return config
    dtype = str(w_hh.dtype).removeprefix("torch.")
    device = kernel_device(w_hh.device)
    if isinstance(device, NoPlan):
        raise RuntimeError(f"lstm_triton: {device.reason}")
    problem = Problem(which, hidden_size, batch, directions, dtype, precision)
    if w_hh.is_cuda and AUTOTUNE.read() == "on":
        from .tuning import first_call

        first_call.tune(problem, device, w_hh.device)
    chosen = plan_for(problem, device)
    if isinstance(chosen, NoPlan):
        raise RuntimeError(f"lstm_triton: {chosen.reason}")
    return chosen.config


def layout_of(x: Tensor, batch_first: bool) -> Layout:
    seq_len, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    return Layout(batch, seq_len, batch_first)


def _ready(tensor: Tensor | None) -> Tensor | None:
    """Contiguous and 16-byte aligned: Triton compiles a kernel anew for a pointer that is not."""
    return None if tensor is None else _aligned(tensor)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pair(h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if (h is None) != (c is None):
        raise RuntimeError("an initial or reset state has an h and a c: give both or none")
    return None if h is None or c is None else (_aligned(h), _aligned(c))


def _row_lengths(lengths: Tensor | None, layout: Layout, device: torch.device) -> Tensor | None:
    # Clamped: a length beyond T would lead the kernels out of their buffers.
    return None if lengths is None else lengths.to(device, torch.int32).clamp(0, layout.seq_len)


def _rows(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.reshape(-1).contiguous()


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
    precision: str,
    save: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, h_n, c_n, gates, cells of one layer; see the module's docstring."""
    layout, precision = layout_of(x, batch_first), resolve_precision(precision)
    config = choose_config("forward", plan, w_hh, layout.batch, precision)
    rows, weights = x.reshape(layout.rows, x.shape[2]), w_ih.flatten(0, 1).t()
    with matmul_precision(x, precision):
        gates = rows @ weights if bias is None else torch.addmm(bias.flatten(), rows, weights)
    gates = gates.view(layout.rows, *w_hh.shape[:2])
    out, h_n, c_n, cells = lstm_forward(
        gates,
        _aligned(w_hh),
        _pair(h_0, c_0),
        layout,
        config,
        precision,
        save,
        _row_lengths(lengths, layout, x.device),
        _rows(reset),
        _pair(reset_h, reset_c),
    )
    if cells is None:
        gates, cells = x.new_empty(0), x.new_empty(0)
    return out.flatten(1).unflatten(0, x.shape[:2]), h_n, c_n, gates, cells


@layer.register_fake
def _(x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c, batch_first, precision, save, plan):
    (directions, gate_size, hidden_size), (first, second, _) = w_hh.shape, x.shape
    batch = first if batch_first else second
    out = x.new_empty((first, second, directions * hidden_size))
    h_n = x.new_empty((directions, batch, hidden_size))
    if not save:
        return out, h_n, torch.empty_like(h_n), x.new_empty(0), x.new_empty(0)
    gates = x.new_empty((first * second, directions, gate_size))
    return out, h_n, torch.empty_like(h_n), gates, x.new_empty((first * second, directions, hidden_size))


@torch.library.custom_op("lstm_triton::layer_backward", mutates_args=())
def layer_backward(
    dout: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_first: bool,
    precision: str,
    plan: str,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of dx, dw_ih, dw_hh, dbias, dh_0, dc_0, dreset_h, dreset_c, in this order."""
    want_x, want_w_ih, want_w_hh, want_bias, want_h_0, want_c_0, want_reset_h, want_reset_c = wanted
    layout, directions, precision = layout_of(x, batch_first), w_hh.shape[0], resolve_precision(precision)
    config = choose_config("backward", plan, w_hh, layout.batch, precision)
    lengths, rows_reset = _row_lengths(lengths, layout, x.device), _rows(reset)
    dgates, dc_0, dreset_c = lstm_backward(
        _ready(dout),
        _ready(dh_n),
        _ready(dc_n),
        gates,
        cells,
        _aligned(w_hh),
        _ready(c_0),
        layout,
        config,
        precision,
        lengths,
        rows_reset,
        _ready(reset_c),
    )
    grads: list[Tensor] = []
    flat = dgates.flatten(1)  # [rows, D * 4H]
    with matmul_precision(x, precision):
        if want_x:
            grads.append((flat @ w_ih.flatten(0, 1)).view(x.shape))
        if want_w_ih:
            grads.append((flat.t() @ x.reshape(layout.rows, x.shape[2])).view(w_ih.shape))
        if want_w_hh:
            h_prev = previous_hidden(out, h_0, lengths, reset, reset_h, directions, batch_first)
            grads.append(dgates.permute(1, 2, 0) @ h_prev.permute(1, 0, 2))
        if want_bias:
            grads.append(dgates.sum(0))
        by_time = dgates.unflatten(0, x.shape[:2])
        by_time = by_time.transpose(0, 1) if batch_first else by_time
        marks = reset.t() if reset is not None and batch_first else reset
        if want_h_0:
            grads.append(initial_gradient(by_time, dh_n, w_hh, lengths, marks))
        if want_c_0:
            grads.append(dc_0)
        if want_reset_h:
            grads.append(reset_gradient(by_time, w_hh, lengths, marks))
        if want_reset_c:
            assert dreset_c is not None
            grads.append(dreset_c)
    return grads


@layer_backward.register_fake
def _(dout, dh_n, dc_n, x, w_ih, w_hh, *rest):
    batch_first, wanted = rest[-4], rest[-1]
    batch = x.shape[0] if batch_first else x.shape[1]
    directions, gate_size, hidden_size = w_hh.shape
    state = (directions, batch, hidden_size)
    shapes = (x.shape, w_ih.shape, w_hh.shape, (directions, gate_size), state, state, state, state)
    return [x.new_empty(shape) for shape, want in zip(shapes, wanted) if want]


def _setup_context(ctx, inputs, output) -> None:
    x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c, batch_first, precision, save, plan = inputs
    out, _, _, gates, cells = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells)
    ctx.save_for_backward(x, w_ih, w_hh, bias, out, gates, cells, h_0, c_0, lengths, reset, reset_h, reset_c)
    ctx.options = (batch_first, precision, plan)
    ctx.saved_for_use = save


def _backward(ctx, dout, dh_n, dc_n, dgates, dcells):
    if not ctx.saved_for_use:
        raise RuntimeError("lstm_triton::layer was called with save=False: there is nothing to go back through")
    # One flag for each of the inputs x, w_ih, w_hh, bias, h_0, c_0 and reset_h, reset_c.
    wanted = [*ctx.needs_input_grad[:6], *ctx.needs_input_grad[8:10]]
    if dout is None and dh_n is None and dc_n is None:
        return (None,) * 14
    x, w_ih, w_hh, bias, *rest = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        _, _, _, h_0, c_0, lengths, reset, reset_h, reset_c = rest
        inputs = [x, w_ih, w_hh, bias, h_0, c_0, reset_h, reset_c]
        found = _with_a_graph([dout, dh_n, dc_n], inputs, lengths, reset, ctx.options[0], wanted)
    else:
        found = layer_backward(dout, dh_n, dc_n, x, w_ih, w_hh, *rest, *ctx.options, wanted)
    grads = iter(found)
    of_inputs = [next(grads) if want else None for want in wanted]
    return (*of_inputs[:6], None, None, *of_inputs[6:], None, None, None, None)


def _with_a_graph(
    cotangents: list[Tensor | None],
    inputs: list[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of `inputs` as functions that autograd can differentiate again: step by step."""
    x, w_ih, w_hh, bias, h_0, c_0, reset_h, reset_c = inputs
    assert x is not None
    assert w_ih is not None
    assert w_hh is not None
    if x.is_cuda:
        warn_once_of_the_loop("create_graph=True asks for derivatives of derivatives")
    results = reference.layer_forward(
        x,
        w_ih,
        w_hh,
        bias,
        None if h_0 is None or c_0 is None else (h_0, c_0),
        batch_first=batch_first,
        lengths=lengths,
        reset=reset,
        reset_state=None if reset_h is None or reset_c is None else (reset_h, reset_c),
    )[:3]
    pairs = [(result, given) for result, given in zip(results, cotangents) if given is not None]
    targets = [tensor for tensor, want in zip(inputs, wanted) if want and tensor is not None]
    given = [result for result, _ in pairs], targets, [cotangent for _, cotangent in pairs]
    return list(torch.autograd.grad(*given, create_graph=True, materialize_grads=True))


layer.register_autograd(_backward, setup_context=_setup_context)
