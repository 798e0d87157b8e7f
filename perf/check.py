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
        self.truth, norm = self._results(exact, self.x.double())
        self.norm = norm
        found, _ = self._results(plain, self.x)
        # Whether cuDNN rounds to TF32 is its own choice: where it may, one such rounding is no error.
        unit = 2**-11 if shape.dtype == "float32-tf32" else 0.0
        self.own = [max(error, unit) for error in self._errors(found)]
        exact_weights, plain_weights = (_weight_gradients(module) for module in (exact, plain))
        squares = sum(float((a.double() - b).square().sum()) for a, b in zip(plain_weights, exact_weights))
        self.own_norm = max(squares**0.5 / norm, unit)

    def complaint(self, module: nn.Module) -> str:
        """By how much a provider is further from fp64 than twice nn.LSTM; "" if it is not.

        By the rms of the output and of the input's gradient; and by the norm of all weights' gradients
        together, which is the same however a provider cuts its weights.
        """
        precise(self.shape.dtype)
        results, norm = self._results(module, self.x)
        for name, error, own in zip(("output", "input gradient"), self._errors(results), self.own):
            if not error <= 2 * own:
                return f"wrong {name}: relative rms error {error:.1e}, nn.LSTM's is {own:.1e}"
        error = abs(norm / self.norm - 1)
        if not error <= 2 * self.own_norm:
            return f"wrong weight gradients: their norm is off by {error:.1e}, nn.LSTM's error is {self.own_norm:.1e}"
        return ""

    def _results(self, module: nn.Module, x: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
        """The output, the gradient that has gone through every step back to the input, and the weights'."""
        x = x.detach().clone().requires_grad_()
        module.zero_grad(set_to_none=True)
        out = module(x)
        out = out[0] if isinstance(out, tuple) else out
        (out.square().sum() / 2).backward()
        norm = sum(float(gradient.double().square().sum()) for gradient in _weight_gradients(module)) ** 0.5
        assert x.grad is not None
        return (out.detach(), x.grad), norm

    def _errors(self, results: tuple[Tensor, Tensor]) -> list[float]:
        return [
            float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
            for got, want in zip(results, self.truth)
        ]


def _weight_gradients(module: nn.Module) -> list[Tensor]:
    """Of the matrices; a provider may have one bias or two."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return [torch.zeros_like(matrix) if matrix.grad is None else matrix.grad for matrix in matrices]
