"""The LSTM as a function of explicit weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops, reference
from .routing import (
    BACKENDS,
    PRECISIONS,
    autocast_is_on,
    check_choice,
    kernel_refusal,
    warn_once_of_the_loop,
)

State = tuple[Tensor, Tensor]


def lstm(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
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
        hx: h_0 and c_0, each [num_layers * D, B, H]; None for zeros.
        weights: per layer and direction weight_ih [4H, I], weight_hh [4H, H] and, with bias,
            bias_ih [4H], bias_hh [4H]; gate order i, f, g, o, as in `nn.LSTM._flat_weights`.
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
    _check(input, hx, weights, num_layers * directions, directions, bias, batch_first, lengths, reset)
    reset_state = _reset_state(reset_state, reset, input, num_layers * directions, weights[1].shape[1], batch_first)
    hidden_size = weights[1].shape[1]
    refusal = kernel_refusal(
        backend,
        input.device.type,
        input.device.index,
        str(input.dtype).removeprefix("torch."),
        precision,
        hidden_size,
        directions,
        0,
    )
    if refusal and plan:
        raise RuntimeError(f"a plan was given, and the kernels do not run: {refusal}")
    if refusal and lengths is None and reset is None:
        if hx is None:
            zero = input.new_zeros((num_layers * directions, input.shape[0 if batch_first else 1], hidden_size))
            hx = (zero, zero)
        return torch._VF.lstm(input, hx, list(weights), bias, num_layers, dropout, training, bidirectional, batch_first)
    if refusal and input.is_cuda:
        warn_once_of_the_loop(refusal)
    if lengths is not None:
        lengths = lengths.to(input.device)  # once, for all layers and both passes
        # Whatever stands in the padding, NaN included, must not reach a product.
        input = input.masked_fill(_padding(lengths, input, batch_first).unsqueeze(-1), 0)
    h_n, c_n = [], []
    for index in range(num_layers):
        w_ih, w_hh, biases = _layer_weights(weights, index, directions, bias)
        state, fresh = (_states_of(pair, index * directions, directions) for pair in (hx, reset_state))
        if refusal:
            input, h, c, _ = reference.layer_forward(
                input,
                w_ih,
                w_hh,
                biases,
                state,
                batch_first=batch_first,
                lengths=lengths,
                reset=reset,
                reset_state=fresh,
            )
        else:
            input, h, c = _kernel_layer(
                input, w_ih, w_hh, biases, state, lengths, reset, fresh, batch_first, precision, plan
            )
        h_n.append(h)
        c_n.append(c)
        if dropout and training and index < num_layers - 1:
            input = F.dropout(input, dropout)
    if num_layers == 1:
        return input, h_n[0], c_n[0]
    return input, torch.cat(h_n), torch.cat(c_n)


def _states_of(pair: State | None, first: int, count: int) -> State | None:
    return None if pair is None else (pair[0][first : first + count], pair[1][first : first + count])


def _reset_state(
    pair: State | None, reset: Tensor | None, input: Tensor, states: int, hidden_size: int, batch_first: bool
) -> State | None:
    """The checked pair, a row of it for every row of the batch."""
    if pair is None:
        return None
    if reset is None:
        raise RuntimeError("reset_state says what a reset row starts from: it needs reset=")
    if len(pair) != 2:
        raise RuntimeError(f"reset_state has an h and a c, got {len(pair)} tensors")
    batch = input.shape[0 if batch_first else 1]
    each, shared = (states, batch, hidden_size), (states, hidden_size)
    for tensor in pair:
        if tuple(tensor.shape) not in (each, shared) or (tensor.dtype, tensor.device) != (input.dtype, input.device):
            raise RuntimeError(
                f"reset_state must be two tensors of size {shared} or {each}, {input.dtype} on {input.device}; "
                f"got {tensor.dtype} of size {tuple(tensor.shape)} on {tensor.device}"
            )
    h, c = (tensor.unsqueeze(1).expand(each) if tensor.dim() == 2 else tensor for tensor in pair)
    return h, c


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
    weights: Sequence[Tensor], layer: int, directions: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w_ih [D, 4H, I], w_hh [D, 4H, H] and the sum of the biases [D, 4H] of one layer."""
    count = 4 if bias else 2
    start = layer * directions * count
    parts = [weights[start + d * count : start + (d + 1) * count] for d in range(directions)]

    def stack(tensors: list[Tensor]) -> Tensor:
        return tensors[0].unsqueeze(0) if directions == 1 else torch.stack(tensors)

    w_ih, w_hh = stack([part[0] for part in parts]), stack([part[1] for part in parts])
    return w_ih, w_hh, stack([part[2] + part[3] for part in parts]) if bias else None


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


def _check(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    states: int,
    directions: int,
    bias: bool,
    batch_first: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Raise the RuntimeError that aten's LSTM raises, with what was expected and what came."""
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    if states < 1 or len(weights) != states * (4 if bias else 2):
        raise RuntimeError(f"expected {states * (4 if bias else 2)} weights of at least one layer, got {len(weights)}")
    batch, seq_len = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    if seq_len == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hidden_size = weights[1].shape[-1]
    if weights[0].shape[-1] != input.shape[2]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weights[0].shape[-1]}, got {input.shape[2]}"
        )
    _check_weights(weights, hidden_size, directions, bias)
    for name, tensor in zip(("h_0", "c_0"), hx or ()):
        if tuple(tensor.shape) != (states, batch, hidden_size):
            raise RuntimeError(f"Expected {name} size {(states, batch, hidden_size)}, got {list(tensor.shape)}")
    for name, tensors in (("hidden", hx or ()), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {name} tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {name} tensors are not the same dtype, found input tensor with {input.dtype} "
                    f"and {name} tensor with {tensor.dtype}"
                )
    if lengths is not None:
        _check_lengths(lengths, batch, seq_len)
    if reset is not None:
        expected = tuple(input.shape[:2])
        if reset.dtype != torch.bool or tuple(reset.shape) != expected or reset.device != input.device:
            raise RuntimeError(
                f"reset must be a bool tensor of size {expected} on {input.device}, "
                f"got {reset.dtype} of size {tuple(reset.shape)} on {reset.device}"
            )


def _check_weights(weights: Sequence[Tensor], hidden_size: int, directions: int, bias: bool) -> None:
    """The kernels index into weights by these shapes."""
    gates, count = 4 * hidden_size, 4 if bias else 2
    for index in range(0, len(weights), count):
        inputs = weights[0].shape[-1] if index < directions * count else directions * hidden_size
        expected = [(gates, inputs), (gates, hidden_size), (gates,), (gates,)]
        for name, tensor, shape in zip(
            ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights[index:], expected[:count]
        ):
            if tuple(tensor.shape) != shape:
                raise RuntimeError(f"Expected {name} of size {shape}, got {tuple(tensor.shape)}")


def _check_lengths(lengths: Tensor, batch: int, seq_len: int) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if tuple(lengths.shape) != (batch,) or not integer:
        raise RuntimeError(
            f"lengths must be an integer tensor of size {(batch,)}, got {lengths.dtype} of size {tuple(lengths.shape)}"
        )
    if torch.compiler.is_compiling():
        return  # the operators clamp lengths to [0, T]
    outside = f"lengths must lie in [0, {seq_len}]"
    if lengths.device.type == "cpu":
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq_len):
            raise RuntimeError(f"{outside}, got {lengths.tolist()}")
    else:
        # No host synchronisation: like a bad index, this surfaces as an assertion of the device.
        torch._assert_async(((lengths >= 0) & (lengths <= seq_len)).all(), outside)
