"""The check that comes before every timing: a provider's results against fp64, next to nn.LSTM's own."""

from __future__ import annotations

import torch
from floor import precise
from shapes import Shape
from torch import Tensor, nn


class Truth:
    """The weights and the batch of a shape, what fp64 makes of them, and how far nn.LSTM is from it.

    The values are exact in the shape's type, so that all providers, under autocast too, see the same.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        dtype = getattr(torch, shape.torch_dtype)
        sizes = (shape.input_size, shape.hidden_size, shape.layers)
        self.base = nn.LSTM(*sizes, bidirectional=shape.directions == 2, device=device)
        with torch.no_grad():
            for parameter in self.base.parameters():
                parameter.copy_(parameter.to(dtype))
        self.x = torch.randn(shape.seq_len, shape.batch, shape.input_size, device=device).to(dtype)
        exact = nn.LSTM(*sizes, bidirectional=shape.directions == 2, device=device, dtype=torch.float64)
        exact.load_state_dict(self.base.state_dict())
        plain = nn.LSTM(*sizes, bidirectional=shape.directions == 2, device=device, dtype=dtype)
        plain.load_state_dict(self.base.state_dict())
        precise(shape.dtype)
        self.truth = self._results(lambda x: exact(x)[0], self.x.double())
        self.own = self._errors(self._results(lambda x: plain(x)[0], self.x))

    def complaint(self, module: nn.Module) -> str:
        """By how much a provider is further from fp64 than twice nn.LSTM; "" if it is not."""
        precise(self.shape.dtype)
        errors = self._errors(self._results(module, self.x))
        for name, error, own in zip(("output", "input gradient"), errors, self.own):
            if not error <= 2 * own:
                return f"wrong {name}: relative rms error {error:.1e}, nn.LSTM's is {own:.1e}"
        return ""

    def _results(self, call, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the gradient that has gone through every step back to the input."""
        x = x.detach().clone().requires_grad_()
        out = call(x)
        (gradient,) = torch.autograd.grad(out.square().sum() / 2, x)
        return out.detach(), gradient

    def _errors(self, results: tuple[Tensor, Tensor]) -> list[float]:
        return [
            float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
            for got, want in zip(results, self.truth)
        ]
