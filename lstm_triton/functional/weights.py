"""The weights of one layer out of a call's list of all: a tensor of each kind for all directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..variant import PLAIN
from .checks import Sizes


def layer_weights(weights: Sequence[Tensor], of_layer: slice, sizes: Sizes) -> tuple[dict[str, Any], Tensor | None]:
    """The weights of the sets `of_layer` by their names in `Inputs`, the bias the sum of both; and w_hr [D, P, H]."""
    names, variant = sizes.names, sizes.variant
    count = len(names)
    if sizes.directions == 1 and variant == PLAIN and not sizes.proj_size:
        w_ih, w_hh, *biases = weights[of_layer.start * count : of_layer.stop * count]
        bias = (biases[0] + biases[1]).unsqueeze(0) if biases else None
        return {"w_ih": w_ih.unsqueeze(0), "w_hh": w_hh.unsqueeze(0), "bias": bias}, None
    sets = [dict(zip(names, weights[at * count : (at + 1) * count])) for at in range(of_layer.start, of_layer.stop)]

    def stack(make: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        tensors = [make(own) for own in sets]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    def of_gates(name: str) -> Tensor:
        return stack(lambda own: variant.four_gates(own[name]))

    norm, nothing = variant.layer_norm, torch.zeros_like
    norms = stack(lambda own: torch.stack((own["gain_c"], own.get("bias_c", nothing(own["gain_c"]))))) if norm else None
    found = {
        "w_ih": of_gates("weight_ih"),
        "w_hh": of_gates("weight_hh"),
        "bias": stack(lambda own: variant.four_gates(own["bias_ih"] + own["bias_hh"])) if sizes.bias else None,
        "peephole": stack(lambda own: variant.three_peepholes(own["weight_ch"])) if variant.peephole else None,
        "gain_ih": of_gates("gain_ih") if norm else None,
        "gain_hh": of_gates("gain_hh") if norm else None,
        "norm_c": norms,
    }
    return found, stack(lambda own: own["weight_hr"]) if sizes.proj_size else None
