"""The LSTM as a function of explicit weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .projection import projected_layer
from .routing import (
    BACKENDS,
    PRECISIONS,
    autocast_is_on,
    check_choice,
    kernel_refusal,
    warn_once_of_the_loop,
)
from .validation import State, check_call, reset_state_of, weights_per_state


def lstm(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    proj_size: int = 0,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: State | None = None,
    backend: str = "auto",
    precision: str = "",
    plan: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stacked LSTM over a batch of sequences.

    Args:
        input: [T, B, input_size], or [B, T, input_size] with batch_first.
        hx: h_0 and c_0, [num_layers * D, B, H]; None for zeros.
        weights: per layer and direction weight_ih [4H, I], weight_hh [4H, H] and, with bias,
            bias_ih [4H], bias_hh [4H]; gate order i, f, g, o, as in `nn.LSTM._flat_weights`. With
            proj_size = P, weight_hh is [4H, P] and weight_hr [P, H] comes last.
        proj_size: size of the projected h, 0 for none; H below is then P wherever h is meant.
        dropout: probability of dropping an output of every layer but the last, if `training`.
        lengths: [B] integers in [0, T], any order, on any device. A row stops at its length:
            outputs beyond it are 0, h_n and c_n are its last real ones, the reverse direction
            starts at its true end, and no gradient reaches the padding.
        reset: bool [T, B] (or [B, T]): before step t the state of a marked row becomes zero; with
            two directions the row is cut there into independent sequences.
        reset_state: h and c that a marked row takes in place of zeros, each [num_layers * D, H] for
            all rows (learnable: gradients sum over rows and resets) or [num_layers * D, B, H].
        backend: "auto", "triton" or "torch"; "triton" raises where the kernels cannot run. "auto"
            takes the kernels wherever they run: that nn.LSTM has been measured to be faster counts
            for the module only, whose weights can lie as cuDNN wants them.
        precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; "" follows
            `torch.backends.cudnn`, as nn.LSTM does.
        plan: configs to use in place of the planner's; see `ops`.

    Returns:
        output [T, B, D * H] (or [B, T, D * H]), h_n and c_n [num_layers * D, B, H].

    Raises:
        RuntimeError: shapes that do not fit together, T = 0, tensors on different devices or of
            different types, or a path that cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    if precision:
        check_choice("precision", precision, PRECISIONS)
    directions = 2 if bidirectional else 1
    input, hx, reset_state, weights = _autocast(input, hx, reset_state, weights)
    states, hidden_size = num_layers * directions, weights[0].shape[0] // 4
    check_call(input, hx, weights, states, directions, proj_size, bias, batch_first, lengths, reset)
    batch, out_size = input.shape[0 if batch_first else 1], proj_size or hidden_size
    reset_state = reset_state_of(reset_state, reset, input, (states, batch, out_size, hidden_size))
    device, dtype = input.device, str(input.dtype).removeprefix("torch.")
    refusal = kernel_refusal(backend, device.type, device.index, dtype, precision, hidden_size, directions)
    if refusal and plan:
        raise RuntimeError(f"a plan was given, and the kernels do not run: {refusal}")
    if refusal and lengths is None and reset is None:
        if hx is None:
            hx = input.new_zeros((states, batch, out_size)), input.new_zeros((states, batch, hidden_size))
        return torch._VF.lstm(input, hx, list(weights), bias, num_layers, dropout, training, bidirectional, batch_first)
    if refusal and input.is_cuda:
        warn_once_of_the_loop(refusal)
    if lengths is not None:
        lengths = lengths.to(input.device)  # once, for all layers and both passes
        # Whatever stands in the padding, NaN included, must not reach a product.
        input = input.masked_fill(_padding(lengths, input, batch_first).unsqueeze(-1), 0)

    def run(x, w_ih, w_hh, biases, state, fresh):
        if refusal:
            marks = {"lengths": lengths, "reset": reset, "reset_state": fresh}
            return reference.layer_forward(x, w_ih, w_hh, biases, state, batch_first=batch_first, **marks)[:3]
        return _kernel_layer(x, w_ih, w_hh, biases, state, lengths, reset, fresh, batch_first, precision, plan)

    h_n, c_n = [], []
    for index in range(num_layers):
        w_ih, w_hh, biases, w_hr = _layer_weights(weights, index, directions, bias, proj_size)
        state, fresh = (_states_of(pair, index * directions, directions) for pair in (hx, reset_state))
        if w_hr is None:
            input, h, c = run(input, w_ih, w_hh, biases, state, fresh)
        else:
            given = (input, w_ih, w_hh, w_hr, biases, state, fresh)
            input, h, c = projected_layer(run, *given, lengths, reset, batch_first)
        h_n.append(h)
        c_n.append(c)
        if dropout and training and index < num_layers - 1:
            input = F.dropout(input, dropout)
    if num_layers == 1:
        return input, h_n[0], c_n[0]
    return input, torch.cat(h_n), torch.cat(c_n)


def _states_of(pair: State | None, first: int, count: int) -> State | None:
    return None if pair is None else (pair[0][first : first + count], pair[1][first : first + count])


def _kernel_layer(x, w_ih, w_hh, bias, state, lengths, reset, reset_state, batch_first, precision, plan):
    """One layer by the kernels; the backward pass's input is kept only if there can be one."""
    h_0, c_0 = state if state is not None else (None, None)
    reset_h, reset_c = reset_state if reset_state is not None else (None, None)
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, w_ih, w_hh, bias, h_0, c_0, reset_h, reset_c)
    )
    out, h_n, c_n, _, _ = ops.layer(
        x, w_ih, w_hh, bias, h_0, c_0, lengths, reset, reset_h, reset_c, batch_first, precision, save, plan
    )
    return out, h_n, c_n


def _layer_weights(
    weights: Sequence[Tensor], layer: int, directions: int, bias: bool, proj_size: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """w_ih [D, 4H, I], w_hh [D, 4H, H or P], the sum of the biases [D, 4H] and w_hr [D, P, H] of one layer."""
    count = weights_per_state(bias, proj_size)
    start = layer * directions * count
    parts = [weights[start + d * count : start + (d + 1) * count] for d in range(directions)]

    def stack(tensors: list[Tensor]) -> Tensor:
        return tensors[0].unsqueeze(0) if directions == 1 else torch.stack(tensors)

    w_ih, w_hh = stack([part[0] for part in parts]), stack([part[1] for part in parts])
    biases = stack([part[2] + part[3] for part in parts]) if bias else None
    return w_ih, w_hh, biases, stack([part[-1] for part in parts]) if proj_size else None


def _autocast(
    input: Tensor, hx: State | None, reset_state: State | None, weights: Sequence[Tensor]
) -> tuple[Tensor, State | None, State | None, Sequence[Tensor]]:
    """Under autocast everything is computed in its type, as nn.LSTM does on a GPU."""
    kind = input.device.type
    if input.dtype == torch.float64 or not autocast_is_on(kind):
        return input, hx, reset_state, weights
    dtype = torch.get_autocast_dtype(kind)
    state, fresh = (None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)) for pair in (hx, reset_state))
    return input.to(dtype), state, fresh, [weight.to(dtype) for weight in weights]


def _padding(lengths: Tensor, input: Tensor, batch_first: bool) -> Tensor:
    """bool [T, B] or [B, T]: steps beyond a row's length."""
    time = torch.arange(input.shape[1 if batch_first else 0], device=input.device)
    return time >= lengths.unsqueeze(1) if batch_first else time.unsqueeze(1) >= lengths
