"""`LSTMCell`, a drop-in replacement of `torch.nn.LSTMCell`: one step, with masks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import functional
from ..functional.checks import State, check_options, of_type
from ..planning.route import by_torch_alone, compute_dtype, kernel_refusal
from ..planning.transforms import aten_can, traced_by_fx
from ..variant import Variant


class LSTMCell(nn.LSTMCell):
    """One LSTM step with the constructor, parameters and results of `torch.nn.LSTMCell`.

    Args: those of `torch.nn.LSTMCell`, and keyword-only backend and precision as for `LSTM`.
    """

    def __init__(self, *args: Any, backend: str = "auto", precision: str | None = None, **kwargs: Any) -> None:
        check_options(backend, precision)
        of_lstm = sorted(
            kwargs.keys() & ({field.name for field in fields(Variant)} | {"forget_bias", "learn_initial_state"})
        )
        if of_lstm:
            raise TypeError(
                f"LSTMCell computes the plain cell: {', '.join(of_lstm)} go with LSTM, which takes one step too"
            )
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.precision = precision

    def refusal(self, input: Tensor) -> str:
        """Why a call on a tensor like `input` takes PyTorch's path; "" if it takes the kernels."""
        dtype = compute_dtype(input.device.type, self.weight_ih.dtype)
        return kernel_refusal(
            self.backend, input.device.type, input.device.index, dtype, self.precision or "", self.hidden_size, 1
        )

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        active: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: State | None = None,
    ) -> State:
        """One step: input [B, input_size] or [input_size], hx = (h, c) each [B, H] or [H] -> (h', c').

        Args:
            hx: zeros if None; of any floating types.
            active: bool [B]: a row that is not keeps its state, as if the step had not been (batched input only).
            reset: bool [B]: before the step the state of a marked row becomes zero, or that of reset_state
                (batched input only). A row that is not active keeps even a state that is marked.
            reset_state: h and c, each [H] for all rows or [B, H].
        """
        if type(input) is fx.Proxy:
            return traced_by_fx(self, input, hx, active=active, reset=reset, reset_state=reset_state)
        plain = active is None and reset is None and reset_state is None
        alone = plain and by_torch_alone(self.backend, input.device)
        refusal = "" if alone else self.refusal(input)
        if plain and (alone or refusal) and aten_can():
            return super().forward(input, hx if hx is None else of_type(hx, input.dtype))
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        self._check_sizes(input, hx)
        for index, value in enumerate(hx or ()):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead")
        batched = input.dim() == 2
        if not batched and not plain:
            raise ValueError("active= and reset= go with batched 2-D input, got 1-D input")
        for name, mask in (("active", active), ("reset", reset)):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(f"{name} should be a bool tensor, got {type(mask).__name__}")
        if reset_state is not None and len(reset_state) != 2:
            raise RuntimeError(f"reset_state has an h and a c, got {len(reset_state)} tensors")
        if active is not None and (active.dtype != torch.bool or active.shape != input.shape[:1]):
            raise RuntimeError(
                f"active must be a bool tensor of size {(input.shape[0],)}, "
                f"got {active.dtype} of size {tuple(active.shape)}"
            )
        state = None
        if hx is not None:
            state = (hx[0], hx[1]) if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
            state = (state[0].unsqueeze(0), state[1].unsqueeze(0))
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        _, h, c = functional.lstm(
            input.unsqueeze(0) if batched else input.unsqueeze(0).unsqueeze(0),
            state,
            weights,
            bias=self.bias,
            lengths=None if active is None else active.long(),
            reset=None if reset is None else reset.unsqueeze(0),
            reset_state=None if reset_state is None else (reset_state[0].unsqueeze(0), reset_state[1].unsqueeze(0)),
            backend=self.backend,
            precision=self.precision or "",
        )
        # Not views for autograd, which could not be detached in place (`_unsafe_view` is what aten's matmul returns).
        size = h.shape[1:] if batched else h.shape[2:]
        return torch.ops.aten._unsafe_view(h, size), torch.ops.aten._unsafe_view(c, size)

    def _check_sizes(self, input: Tensor, hx: State | None) -> None:
        """Raise what aten's lstm_cell raises."""
        if hx is not None:
            if not isinstance(hx, (tuple, list)):
                raise TypeError(f"lstm_cell(): hx must be a tuple of Tensors, not {type(hx).__name__}")
            if len(hx) != 2:
                raise RuntimeError(f"lstm_cell expects two hidden states, got {len(hx)}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        for index, value in enumerate(hx or ()):
            if input.dim() == 2 and value.dim() == 2 and value.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {value.shape[0]}"
                )
            if value.shape[-1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {value.shape[-1]}, expected {self.hidden_size}"
                )
