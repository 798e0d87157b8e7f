"""The weights of one layer out of a call's list of all: a tensor of each kind for all directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Sizes


class LayerWeights(NamedTuple):
    """Of one layer, as `layer.op` takes them, and w_hr [D, P, H]; biases are the sum of both."""

    w_ih: Tensor
    w_hh: Tensor
    biases: Tensor | None
    w_hr: Tensor | None
    peephole: Tensor | None
    gain_ih: Tensor | None
    gain_hh: Tensor | None
    norm_c: Tensor | None


def layer_weights(weights: Sequence[Tensor], of_layer: slice, sizes: Sizes) -> LayerWeights:
    """The weights of the sets `of_layer`, in one tensor for all directions."""
    count, variant = sizes.weights_per_state, sizes.variant
    hidden_size = weights[0].shape[0] // variant.gates
    names = list(sizes.expected(0, hidden_size))
    sets = [dict(zip(names, weights[at * count : (at + 1) * count])) for at in range(of_layer.start, of_layer.stop)]

    def stack(make: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        tensors = [make(own) for own in sets]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    def of_gates(name: str) -> Tensor:
        return stack(lambda own: variant.four_gates(own[name]))

    norm, nothing = variant.layer_norm, torch.zeros_like
    return LayerWeights(
        of_gates("weight_ih"),
        of_gates("weight_hh"),
        stack(lambda own: variant.four_gates(own["bias_ih"] + own["bias_hh"])) if sizes.bias else None,
        stack(lambda own: own["weight_hr"]) if sizes.proj_size else None,
        stack(lambda own: variant.three_peepholes(own["weight_ch"])) if variant.peephole else None,
        of_gates("gain_ih") if norm else None,
        of_gates("gain_hh") if norm else None,
        stack(lambda own: torch.stack((own["gain_c"], own.get("bias_c", nothing(own["gain_c"]))))) if norm else None,
    )
