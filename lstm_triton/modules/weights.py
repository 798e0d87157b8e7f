"""The parameters of `LSTM` that nn.LSTM does not have, and what all of them are at first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..variant import Variant, is_number


def check_start(forget_bias: Any, learn_initial_state: Any, coupled: bool, bias: bool) -> None:
    """Raise the error of a forget bias or a learned initial state that cannot be."""
    if not isinstance(learn_initial_state, bool):
        raise TypeError(f"learn_initial_state should be a bool, got: {learn_initial_state!r}")
    if forget_bias is None:
        return
    if not is_number(forget_bias):
        raise TypeError(f"forget_bias should be a number or None, got: {forget_bias!r}")
    if not math.isfinite(forget_bias):
        raise ValueError(f"forget_bias should be finite, got: {forget_bias!r}")
    if coupled or not bias:
        why = "coupled gates have no forget gate of their own" if coupled else "the module has bias=False"
        raise ValueError(f"forget_bias={forget_bias} is not possible: {why}")


def add_weights(module: nn.RNNBase, variant: Variant, learn_initial_state: bool) -> bool:
    """Register them, in order of layer and direction, those of gates as PyTorch initialises weights.

    Returns whether there are any; `module._init_flat_weights()` is then due.
    """
    hidden_size, like = module.hidden_size, module._flat_weights[0]
    assert isinstance(like, Tensor)
    bound = hidden_size**-0.5 if hidden_size > 0 else 0.0

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(nn.init.uniform_(like.new_empty(shape), -bound, bound))

    states = module.num_layers * (2 if module.bidirectional else 1)
    further = variant.weights(hidden_size, module.bias)
    for index, names in enumerate(module._all_weights):
        layer, reverse = divmod(index, states // module.num_layers)
        for name in names:
            if variant.coupled_gates and not name.startswith("weight_hr"):
                shape = getattr(module, name).shape
                setattr(module, name, parameter(variant.gates * hidden_size, *shape[1:]))
        for name, shape in further.items():
            names.append(f"{name}_l{layer}{'_reverse' if reverse else ''}")
            setattr(module, names[-1], parameter(*shape))
    module._flat_weights_names = [name for names in module._all_weights for name in names]
    if learn_initial_state:
        module.initial_h = parameter(states, module.proj_size or hidden_size)
        module.initial_c = parameter(states, hidden_size)
    return bool(further) or variant.coupled_gates


def fill_own(module: nn.RNNBase, forget_bias: float | None) -> None:
    """Gains 1; bias_c and the initial state 0; the two forget biases together as given, if they are."""
    with torch.no_grad():
        for name, tensor in module.named_parameters(recurse=False):
            if name.startswith("gain_"):
                tensor.fill_(1)
            elif name.startswith(("bias_c_", "initial_")):
                tensor.zero_()
            elif name.startswith(("bias_ih", "bias_hh")) and forget_bias is not None:
                tensor.chunk(4)[1].fill_(forget_bias if name.startswith("bias_ih") else 0)
