"""What is measured: one function per provider, all with the weights of one nn.LSTM.

A provider takes that LSTM (float32 on the device, its values exact in the shape's type) and the shape,
and returns a module: (x [T, B, I]) -> out [T, B, D * H]. `Unsupported` says why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import FlashRNN, TorchRL, Unsupported
from shapes import Shape
from torch import Tensor, nn

from lstm_triton import LSTM


class Wrapped(nn.Module):
    """An nn.LSTM or our LSTM: only the output; under autocast if asked."""

    def __init__(self, lstm: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.lstm = lstm
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self.lstm(x)[0]
        with torch.autocast(x.device.type, self.autocast):
            return self.lstm(x)[0]


def _copy(base: nn.LSTM, cls: type, dtype: torch.dtype, **options) -> nn.Module:
    sizes = (base.input_size, base.hidden_size, base.num_layers)
    weight = base.weight_ih_l0
    copy = cls(*sizes, bidirectional=base.bidirectional, device=weight.device, dtype=dtype, **options)
    copy.load_state_dict(base.state_dict())
    return copy


def _dtype(shape: Shape) -> torch.dtype:
    return getattr(torch, shape.torch_dtype)


def nn_lstm(base: nn.LSTM, shape: Shape) -> nn.Module:
    """torch.nn.LSTM: cuDNN on a GPU, its weights flattened; oneDNN or ATen on a CPU."""
    copy = _copy(base, nn.LSTM, _dtype(shape))
    copy.flatten_parameters()
    return Wrapped(copy)


def nn_lstm_autocast(base: nn.LSTM, shape: Shape) -> nn.Module:
    """torch.nn.LSTM with float32 weights under autocast."""
    return Wrapped(_copy(base, nn.LSTM, torch.float32), _autocast(shape))


def ours(base: nn.LSTM, shape: Shape) -> nn.Module:
    """lstm_triton.LSTM as users get it: backend="auto"."""
    return Wrapped(_copy(base, LSTM, _dtype(shape)))


def ours_kernels(base: nn.LSTM, shape: Shape) -> nn.Module:
    """lstm_triton.LSTM by its kernels, also where it would take nn.LSTM's path: backend="triton"."""
    _needs_cuda(base)
    return Wrapped(_copy(base, LSTM, _dtype(shape), backend="triton"))


def ours_autocast(base: nn.LSTM, shape: Shape) -> nn.Module:
    """lstm_triton.LSTM with float32 weights under autocast."""
    return Wrapped(_copy(base, LSTM, torch.float32), _autocast(shape))


def _autocast(shape: Shape) -> torch.dtype:
    if shape.torch_dtype == "float32":
        raise Unsupported("autocast is for 16-bit types")
    return _dtype(shape)


def _needs_cuda(base: nn.LSTM) -> None:
    if not base.weight_ih_l0.is_cuda:
        raise Unsupported("needs a CUDA device")


def separate_gates_step(x: Tensor, h: Tensor, c: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]):
    """A cell as tutorials write it: [h, x] concatenated, one matrix product per gate."""
    both = torch.cat((h, x), dim=1)
    i, f, g, o = (torch.addmm(bias, both, weight.t()) for weight, bias in zip(weights, biases))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def combined_gates_step(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor):
    """The same with the four products combined into one."""
    i, f, g, o = torch.addmm(bias, torch.cat((h, x), dim=1), weight.t()).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def hoisted_step(projected: Tensor, h: Tensor, c: Tensor, weight: Tensor):
    """The input's part computed before, for all steps at once, as haste's per-step loop does."""
    i, f, g, o = torch.addmm(projected, h, weight.t()).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class Loop(nn.Module):
    """One layer in a Python loop over time. kind: "separate", "combined" or "hoisted"."""

    STEPS: dict[str, Callable] = {  # noqa: RUF012
        "separate": separate_gates_step,
        "combined": combined_gates_step,
        "hoisted": hoisted_step,
    }

    def __init__(self, base: nn.LSTM, shape: Shape, kind: str, compiled: bool) -> None:
        super().__init__()
        if shape.layers > 1 or shape.directions > 1:
            raise Unsupported("one layer in one direction")
        parts = [getattr(base, f"{name}_l0").detach().to(_dtype(shape)) for name in ("weight_hh", "weight_ih")]
        bias = (base.bias_ih_l0 + base.bias_hh_l0).detach().to(_dtype(shape))
        self.kind, self.hidden_size = kind, shape.hidden_size
        self.step = self.STEPS[kind]
        if compiled:
            torch.compiler.reset()  # what it compiled for other shapes must not count against this one
            self.step = torch.compile(self.step, dynamic=False)
        if kind == "hoisted":
            self.w_hh, self.w_ih = (nn.Parameter(part.clone()) for part in parts)
            self.bias = nn.Parameter(bias)
        elif kind == "combined":
            self.weight, self.bias = nn.Parameter(torch.cat(parts, dim=1)), nn.Parameter(bias)
        else:
            self.weights = nn.ParameterList(part.clone() for part in torch.cat(parts, dim=1).chunk(4))
            self.biases = nn.ParameterList(part.clone() for part in bias.chunk(4))

    def forward(self, x: Tensor) -> Tensor:
        h, c = (x.new_zeros((x.shape[1], self.hidden_size)) for _ in range(2))
        if self.kind == "hoisted":
            x = torch.addmm(self.bias, x.flatten(0, 1), self.w_ih.t()).unflatten(0, x.shape[:2])
            weights: tuple = (self.w_hh,)
        elif self.kind == "combined":
            weights = (self.weight, self.bias)
        else:
            weights = (tuple(self.weights), tuple(self.biases))
        out = []
        for x_t in x.unbind():
            h, c = self.step(x_t, h, c, *weights)
            out.append(h)
        return torch.stack(out)


def separate_gates(base: nn.LSTM, shape: Shape) -> nn.Module:
    """The tutorial's loop with four products a step."""
    return Loop(base, shape, "separate", False)


def separate_gates_compiled(base: nn.LSTM, shape: Shape) -> nn.Module:
    """The same, its step by torch.compile."""
    return Loop(base, shape, "separate", True)


def combined_gates(base: nn.LSTM, shape: Shape) -> nn.Module:
    """The tutorial's loop with one product a step."""
    return Loop(base, shape, "combined", False)


def combined_gates_compiled(base: nn.LSTM, shape: Shape) -> nn.Module:
    """The same, its step by torch.compile."""
    return Loop(base, shape, "combined", True)


def per_step(base: nn.LSTM, shape: Shape) -> nn.Module:
    """A loop with the input product hoisted, as haste runs it: one product and the cell a step."""
    return Loop(base, shape, "hoisted", False)


PROVIDERS: dict[str, Callable[[nn.LSTM, Shape], nn.Module]] = {
    function.__name__: function
    for function in (
        nn_lstm,
        nn_lstm_autocast,
        ours,
        ours_kernels,
        ours_autocast,
        separate_gates,
        separate_gates_compiled,
        combined_gates,
        combined_gates_compiled,
        per_step,
    )
} | {"flashrnn": FlashRNN, "torchrl": TorchRL}
