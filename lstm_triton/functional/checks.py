"""What `functional.lstm` accepts: shapes, types and devices, with aten's types of error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.route import BACKENDS, PRECISIONS, check_choice
from ..variant import PLAIN, Variant

State = tuple[Tensor, Tensor]


_PLAIN_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Sizes(NamedTuple):
    """What the number and the shapes of the weights follow from. states: layers times directions."""

    states: int
    directions: int
    proj_size: int
    bias: bool
    variant: Variant

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights of one layer in one direction, in order."""
        plain = _PLAIN_NAMES[: 4 if self.bias else 2]
        if not self.proj_size and self.variant is PLAIN:
            return plain
        return tuple(self.expected(0, 0))

    def expected(self, inputs: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of these, in order."""
        gates, out_size = self.variant.gates * hidden_size, self.proj_size or hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, inputs), "weight_hh": (gates, out_size)}
        if self.bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, hidden_size)
        return shapes | self.variant.weights(hidden_size, self.bias)


def reset_state_of(
    pair: State | None, reset: Tensor | None, input: Tensor, sizes: tuple[int, int, int, int]
) -> State | None:
    """The checked reset state, a row of it for every row of the batch. sizes: L * D, B, P or H, H."""
    if pair is None:
        return None
    if reset is None:
        raise RuntimeError("reset_state says what a reset row starts from: it needs reset=")
    if len(pair) != 2:
        raise RuntimeError(f"reset_state has an h and a c, got {len(pair)} tensors")
    states, batch, *of_each = sizes
    rows = []
    for tensor, size in zip(pair, of_each):
        each, shared = (states, batch, size), (states, size)
        wrong = tuple(tensor.shape) not in (each, shared) or not tensor.is_floating_point()
        if wrong or tensor.device != input.device:
            raise RuntimeError(
                f"reset_state must be of size {shared} or {each}, of a floating type and on {input.device}; "
                f"got {tensor.dtype} of size {tuple(tensor.shape)} on {tensor.device}"
            )
        rows.append((tensor.unsqueeze(1).expand(each) if tensor.dim() == 2 else tensor).to(input.dtype))
    return rows[0], rows[1]


def check_call(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    sizes: Sizes,
    batch_first: bool,
) -> None:
    """Raise the RuntimeError that aten's LSTM raises, with what was expected and what came."""
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    states, proj_size, dtype, device = sizes.states, sizes.proj_size, input.dtype, input.device
    batch, seq_len = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    if seq_len == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hidden_size = _check_weights(weights, input.shape[2], sizes)
    for name, tensor, size in zip(("h_0", "c_0"), hx or (), (proj_size or hidden_size, hidden_size)):
        if tuple(tensor.shape) != (states, batch, size):
            raise RuntimeError(f"Expected {name} size {(states, batch, size)}, got {list(tensor.shape)}")
    for name, tensors in (("hidden", hx or ()), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {device} "
                    f"and {name} tensor at {tensor.device}"
                )
            if tensor.dtype != dtype and not (name == "hidden" and tensor.is_floating_point()):
                raise RuntimeError(
                    f"Input and {name} tensors are not the same dtype, found input tensor with {dtype} "
                    f"and {name} tensor with {tensor.dtype}"
                )


def check_marks(input: Tensor, batch_first: bool, lengths: Tensor | None, reset: Tensor | None) -> None:
    """The same for lengths and resets."""
    if lengths is not None:
        batch, seq_len = input.shape[:2] if batch_first else input.shape[1::-1]
        _check_lengths(lengths, batch, seq_len)
    if reset is not None:
        expected = tuple(input.shape[:2])
        if reset.dtype != torch.bool or tuple(reset.shape) != expected or reset.device != input.device:
            raise RuntimeError(
                f"reset must be a bool tensor of size {expected} on {input.device}, "
                f"got {reset.dtype} of size {tuple(reset.shape)} on {reset.device}"
            )


RECOMPUTE = ("none", "gates", "chunk:K")


def check_recompute(recompute: str) -> None:
    """Raise the ValueError of what is no recompute mode."""
    kind, _, size = str(recompute).partition(":")
    if recompute not in RECOMPUTE[:2] and not (kind == "chunk" and size.isdecimal() and int(size) > 0):
        raise ValueError(f"recompute should be one of {', '.join(map(repr, RECOMPUTE))}, K >= 1, got: {recompute!r}")


def check_states(return_states: Sequence[str], recompute: str) -> None:
    """Raise the ValueError of unknown states, and of states that `recompute` does not keep."""
    known = ("c", "layers", "gates")
    if isinstance(return_states, str) or any(name not in known for name in return_states):
        raise ValueError(f"return_states takes a sequence of {', '.join(map(repr, known))}, got: {return_states!r}")
    for name in return_states:
        if (name == "gates" and recompute != "none") or (name == "c" and recompute not in ("none", "gates")):
            raise ValueError(f"return_states={name!r} needs what recompute={recompute!r} does not keep")


def _check_weights(weights: Sequence[Tensor], input_size: int, sizes: Sizes) -> int:
    """H. The kernels index into weights by these shapes."""
    names, count = sizes.names, len(sizes.names)
    if sizes.states < 1 or len(weights) != sizes.states * count:
        raise RuntimeError(f"expected {sizes.states * count} weights of at least one layer, got {len(weights)}")
    hidden_size, inputs = weights[0].shape[0] // sizes.variant.gates, weights[0].shape[-1]
    if inputs != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {inputs}, got {input_size}")
    expected = sizes.expected(inputs, hidden_size)
    for index, tensor in enumerate(weights):
        if index == sizes.directions * count:
            expected = sizes.expected(sizes.directions * (sizes.proj_size or hidden_size), hidden_size)
        if tuple(tensor.shape) != expected[name := names[index % count]]:
            raise RuntimeError(f"Expected {name} of size {expected[name]}, got {tuple(tensor.shape)}")
    return hidden_size


def _check_lengths(lengths: Tensor, batch: int, seq_len: int) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if tuple(lengths.shape) != (batch,) or not integer:
        raise RuntimeError(
            f"lengths must be an integer tensor of size {(batch,)}, got {lengths.dtype} of size {tuple(lengths.shape)}"
        )
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(lengths):
        return  # nobody can look at the values; the operators clamp lengths to [0, T]
    outside = f"lengths must lie in [0, {seq_len}]"
    if lengths.device.type == "cpu":
        lengths = lengths.long()  # the unsigned types have no min
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq_len):
            raise RuntimeError(f"{outside}, got {lengths.tolist()}")
    else:
        # No host synchronisation: like a bad index, this surfaces as an assertion of the device.
        torch._assert_async(((lengths >= 0) & (lengths <= seq_len)).all(), outside)


def check_options(backend: str, precision: str | None, recompute: str = "none") -> None:
    """Raise the ValueError of an option of `LSTM` that is none of its choices."""
    check_choice("backend", backend, BACKENDS)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    check_recompute(recompute)


def of_type(hx: State | None, dtype: torch.dtype) -> State | None:
    """For PyTorch's own path, which wants a state of the input's type: any other floating one in it."""
    if isinstance(hx, tuple) and all(getattr(state, "dtype", None) == dtype for state in hx):
        return hx
    if not isinstance(hx, (tuple, list)) or not all(isinstance(t, Tensor) and t.is_floating_point() for t in hx):
        return hx  # it knows what to say
    return tuple(t.to(dtype) for t in hx)  # type: ignore[return-value]


def check_pair(hx: State) -> None:
    if isinstance(hx, Tensor):
        raise TypeError("hx should be a pair of tensors (h_0, c_0), got one tensor")
    if len(hx) > 2:  # with fewer, what reads the second raises what nn.LSTM raises
        raise RuntimeError(f"lstm expects two hidden states, got {len(hx)}")
