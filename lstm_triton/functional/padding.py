"""A plain layer by one with a few more units, which stay 0: where rows of H elements start on no 16 bytes.

A unit without weights and biases has i = f = o = 1/2 and g = 0, so from c = 0 on c and h are 0; and nothing reads it.
Gradients are those of the padding and the slicing, which autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..layer.records import STATES, Inputs, LayerResult


def padded_layer(
    run: Callable[[Inputs], LayerResult], v: Inputs, size: int, return_states: Sequence[str] = ()
) -> LayerResult:
    """`run` for the H units of v as for `size` units; shapes of the result are those without padding.

    return_states: which states of every step are wanted of it.
    """
    hidden_size, sets = v.w_hh.shape[2], v.w_hh.shape[0]
    more = size - hidden_size

    def of_gates(tensor: Tensor, columns: int = 0) -> Tensor:
        """[D, 4H, K] -> [D, 4 * size, K + columns]."""
        return F.pad(tensor.unflatten(1, (4, hidden_size)), (0, columns, 0, more)).flatten(1, 2)

    def of_units(state: Tensor | None) -> Tensor | None:
        return None if state is None else F.pad(state, (0, more))

    states: dict[str, Any] = {name: of_units(getattr(v, name)) for name in STATES}
    bias = None if v.bias is None else of_gates(v.bias.unsqueeze(2)).squeeze(2)
    found = run(v._replace(w_ih=of_gates(v.w_ih), w_hh=of_gates(v.w_hh, more), bias=bias, **states))

    def without(tensor: Tensor | None, *parts: int) -> Tensor | None:
        """[..., parts * size] -> [..., parts * H], in memory of its own."""
        if tensor is None:
            return None
        by_part = tensor.unflatten(-1, (*parts, size)) if parts else tensor
        own = by_part[..., :hidden_size].contiguous()
        return own.flatten(-1 - len(parts)) if parts else own

    out, h_n, c_n = (without(found.out, sets), without(found.h_n), without(found.c_n))
    assert out is not None
    assert h_n is not None
    assert c_n is not None
    gates = without(found.gates, 4) if "gates" in return_states else None
    cells = without(found.cells) if "c" in return_states else None
    return LayerResult(out, h_n, c_n, gates, cells)
