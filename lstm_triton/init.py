"""Initial weights: functions over a module, `LSTM` and `LSTMCell` of ours or of PyTorch, in place.

    lstm = init.xavier_orthogonal_(LSTM(64, 512))

The two biases of a gate only count as a sum: what a function gives a gate goes into bias_ih, and bias_hh is 0.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .modules.lstm import LSTM

Module = TypeVar("Module", bound=nn.Module)


def default_(module: Module) -> Module:
    """PyTorch's: every parameter uniform in +-1 / sqrt(hidden_size)."""
    _weights(module)
    module.reset_parameters()  # type: ignore[operator]
    return module


def xavier_orthogonal_(module: Module, forget_bias: float = 1.0) -> Module:
    """Xavier-uniform input weights (Glorot and Bengio, 2010) and orthogonal recurrent ones (Saxe et al., 2014).

    Gate by gate. Biases are 0 but the forget gate's (Gers et al., 2000; 1 after Jozefowicz et al., 2015).

    The projection weight_hr is Xavier-uniform; with projections a gate's weight_hh is no square, and has orthogonal
    columns. A module without bias has no forget bias: give 0. Coupled gates (f = 1 - i) have none of their own.
    Peephole weights and the learned initial state are 0, gains 1.
    """
    weights, coupled = _weights(module), "f" not in _gates(module)
    _check_bias(module, forget_bias != 0 and not coupled, f"forget_bias={forget_bias}")
    with torch.no_grad():
        for name, tensor in weights:
            if name.startswith("weight_hr"):
                nn.init.xavier_uniform_(tensor)
            elif name.startswith("weight_ih"):
                for gate in tensor.chunk(len(_gates(module))):
                    nn.init.xavier_uniform_(gate)
            elif name.startswith("weight_hh"):
                for gate in tensor.chunk(len(_gates(module))):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.constant_(tensor, 1 if name.startswith("gain_") else 0)
                if name.startswith("bias_ih") and not coupled:
                    _of_gate(module, tensor, "f").fill_(forget_bias)
    return module


def chrono_(module: Module, max_time: int) -> Module:
    """Biases for dependencies of up to max_time >= 2 steps (Tallec and Ollivier, 2018): a unit's forget bias is log(u),
    its input bias -log(u), u uniform in [1, max_time - 1], so that it forgets over about u steps; the rest is 0.
    With coupled gates the input bias says both.

    Weights are left as they are.
    """
    weights = _weights(module)
    _check_bias(module, True, "chrono initialisation")
    if max_time < 2:
        raise ValueError(f"max_time should be at least 2 steps, got: {max_time}")
    with torch.no_grad():
        for name, tensor in weights:
            if name.startswith("bias"):
                nn.init.zeros_(tensor)
            if name.startswith("bias_ih"):
                forget = torch.empty_like(_of_gate(module, tensor, "i")).uniform_(1, max_time - 1).log_()
                _of_gate(module, tensor, "i").copy_(-forget)
                if "f" in _gates(module):
                    _of_gate(module, tensor, "f").copy_(forget)
    return module


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    if not isinstance(module, (nn.RNNBase, nn.LSTMCell)) or getattr(module, "mode", "LSTM") != "LSTM":
        raise TypeError(f"module should be an LSTM or LSTMCell, got {type(module).__name__}")
    if nn.utils.parametrize.is_parametrized(module):
        raise ValueError("the module is parametrized: initialise first, parametrize afterwards")
    return list(module.named_parameters(recurse=False))


def _check_bias(module: nn.Module, needed: bool, what: str) -> None:
    if needed and not module.bias:
        raise ValueError(f"{what} needs biases; the module has bias=False")


def _gates(module: nn.Module) -> str:
    """The gates that a module's weights have rows for, in order."""
    return "igo" if isinstance(module, LSTM) and module.variant.coupled_gates else "ifgo"


def _of_gate(module: nn.Module, bias: Tensor, gate: str) -> Tensor:
    """The view of one gate's part of a bias."""
    gates = _gates(module)
    return bias.chunk(len(gates))[gates.index(gate)]
