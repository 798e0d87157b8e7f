"""The backward pass of a layer: the kernels' recurrence, and GEMMs over the whole sequence around it.

Shapes are those of `op.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.activate import activate
from ..kernels.backward import lstm_backward
from ..kernels.variants import Gradients, Variants
from ..reference.cell import norm_gates
from .choice import Pass, pass_of
from .forward import aligned, input_mask, marks_of, projected, projected_input, ready, variants_of
from .records import Cotangents, Inputs, Kept, Options
from .sequence import (
    initial_gradient,
    norm_gates_backward,
    previous_hidden,
    recurrent_weight_gradient,
    reset_gradient,
    unstarted,
)


def _previous(v: Inputs, options: Options, states: Tensor, start: Tensor | None, fresh: Tensor | None) -> Tensor:
    """`previous_hidden` of h or c: states [S, D * H] -> [rows, D, H]."""
    lengths, _ = marks_of(v, options.layout(v.x))
    return previous_hidden(states, start, lengths, v.reset, fresh, v.w_hh.shape[0], options.order, options.batch_first)


def operand_of(v: Inputs, options: Options, variants: Variants, out: Tensor) -> Tensor:
    """The h_{t-1} that every step's recurrent product has read, masked: [rows, D, H]."""
    h_prev = _previous(v, options, out, v.h_0, v.reset_h)
    if variants.h_mask is None:
        return h_prev
    by_row = h_prev.view(*v.x.shape[:2], *h_prev.shape[1:])
    return (by_row * variants.h_mask.transpose(0, 1).unsqueeze(1 if options.batch_first else 0)).flatten(0, 1)


def product_of(v: Inputs, options: Options, operand: Tensor, onto: Tensor | None = None) -> Tensor:
    """h_{t-1} W_hh^T of all steps by one GEMM for each set of weights, added to `onto` if given: [rows, D, 4H]."""
    result = operand.new_empty((operand.shape[0], *v.w_hh.shape[:2])) if onto is None else onto
    for index in range(v.w_hh.shape[0]):
        weights = v.w_hh[index].t()
        if options.batch_invariant:
            found = options.multiply(operand[:, index], weights)
            result[:, index] = found if onto is None else result[:, index] + found
        elif onto is None:
            torch.mm(operand[:, index], weights, out=result[:, index])
        else:
            result[:, index].addmm_(operand[:, index], weights)
    return result


def recomputed_gates(v: Inputs, options: Options, out: Tensor, cells: Tensor) -> Tensor:
    """The activated gates [rows, D, 4H] that the forward pass did not keep: two GEMMs over the whole sequence."""
    gates, variants = projected_input(v, options), variants_of(v, options)
    operand = operand_of(v, options, variants, out)
    if v.gain_hh is None:
        product_of(v, options, operand, gates)
    else:
        gates += norm_gates(product_of(v, options, operand), v.gain_hh, options.cell.coupled_gates)
    c_prev, layout = None, options.layout(v.x)
    if v.peephole is not None:
        # Given even where it is 0: unlike out, cells are not 0 beyond a length, where the reverse direction begins.
        c_0 = cells.new_zeros((v.w_hh.shape[0], layout.batch, v.w_hh.shape[2])) if v.c_0 is None else v.c_0
        c_prev = _previous(v, options, cells.reshape(out.shape), c_0, v.reset_c)
    return activate(gates, c_prev, layout, options.order, variants)


def backward(
    v: Inputs,
    options: Options,
    kept: Kept,
    given: Cotangents,
    wanted: Mapping[str, bool],
    known: Pass | None = None,
) -> dict[str, Tensor]:
    """The wanted gradients by name, in types of our own: sums over steps may come in the compute type.

    known: how a call like this one has been run.
    """
    layout, (out, gates, cells, stats) = options.layout(v.x), kept
    config, launch = known or pass_of("backward", v, options)
    lengths, reset = marks_of(v, layout)
    variants, operand, product = variants_of(v, options), None, None
    # What the products have read is a view of `out`, or has to be put together.
    shifted = v.reset is None and v.gain_hh is None and variants.h_mask is None and not options.batch_first
    if (wanted["w_hh"] and not shifted) or v.gain_hh is not None:
        operand = operand_of(v, options, variants, out)
    if v.gain_hh is not None:
        assert operand is not None
        product = product_of(v, options, operand)
    found = lstm_backward(
        ready(given.out),
        ready(given.h_n),
        ready(given.c_n),
        aligned(gates),  # hooks on saved tensors may have put them anywhere
        aligned(cells),
        aligned(v.w_hh),
        ready(v.c_0),
        layout,
        config,
        options.precision,
        lengths=lengths,
        reset=reset,
        reset_c=ready(v.reset_c),
        order=options.order,
        dcells=ready(given.cells),
        dactivated=ready(given.gates),
        variants=variants,
        product=product,
        stats=None if v.gain_hh is None else ready(stats),  # the operator has an empty tensor: another signature
        launch=launch,
    )
    of_product = found.dgates if found.dproduct is None else found.dproduct
    grads = _weight_gradients(v, options, found, of_product, operand, product, stats, wanted)
    by_time = of_product.unflatten(0, v.x.shape[:2])
    by_time = by_time.transpose(0, 1) if options.batch_first else by_time
    by_row = v.reset.t() if v.reset is not None and options.batch_first else v.reset

    def onto_h(by_product: Tensor, by_zoneout: Tensor | None) -> Tensor:
        masked = by_product if variants.h_mask is None else by_product * variants.h_mask
        return masked if by_zoneout is None else masked + by_zoneout

    if wanted["w_hh"] and shifted:
        by_set = out.unflatten(-1, found.dgates.shape[1:2] + (-1,))
        grads["w_hh"] = recurrent_weight_gradient(by_time, by_set, v.h_0, lengths, options.order)
    if wanted["h_0"]:
        through = initial_gradient(by_time, v.w_hh, lengths, by_row, options.order, options.multiply)
        grads["h_0"] = unstarted(onto_h(through, found.dh_0), given.h_n, lengths)
    if wanted["c_0"]:
        grads["c_0"] = found.dc_0
    if wanted["reset_h"]:
        assert by_row is not None
        through = reset_gradient(by_time, v.w_hh, lengths, by_row, options.order, options.multiply)
        grads["reset_h"] = onto_h(through, found.dh_reset)
    if wanted["reset_c"]:
        assert found.dc_reset is not None
        grads["reset_c"] = found.dc_reset
    return grads


def _weight_gradients(
    v: Inputs,
    options: Options,
    found: Gradients,
    of_product: Tensor,
    operand: Tensor | None,
    product: Tensor | None,
    stats: Tensor | None,
    wanted: Mapping[str, bool],
) -> dict[str, Tensor]:
    """Those of x and of everything that has the same value at all steps."""
    grads: dict[str, Tensor] = {}
    rows, members = found.dgates.shape[0], v.x.shape[2] if v.x.dim() == 4 else 1
    own_gates = v.w_ih.shape[0] // members * v.w_ih.shape[1]  # 4H of each of a member's sets
    mask = input_mask(v, options)
    x = v.x if mask is None else v.x * mask
    dprojected = found.dgates
    if v.gain_ih is not None and (wanted["x"] or wanted["w_ih"] or wanted["gain_ih"]):
        flat = projected(x, v.w_ih, None, options)
        dprojected, dgain = norm_gates_backward(dprojected, flat, v.gain_ih, options.cell.coupled_gates)
        if wanted["gain_ih"]:
            grads["gain_ih"] = dgain
    if members == 1:
        by_row, weights, x = dprojected.view(rows, own_gates), v.w_ih.flatten(0, 1), x.reshape(rows, x.shape[-1])
    else:
        by_row = dprojected.view(rows, members, own_gates).transpose(0, 1)
        weights = v.w_ih.reshape(members, own_gates, v.w_ih.shape[2])
        x = x.reshape(rows, members, x.shape[-1]).transpose(0, 1)
    if wanted["x"]:
        dx = options.multiply(by_row, weights)
        dx = (dx if members == 1 else dx.transpose(0, 1)).reshape(v.x.shape)
        grads["x"] = dx if mask is None else dx * mask
    if wanted["w_ih"]:
        grads["w_ih"] = (by_row.mT @ x).view(v.w_ih.shape)
    if wanted["w_hh"] and operand is not None:
        grads["w_hh"] = of_product.permute(1, 2, 0) @ operand.permute(1, 0, 2)
    if wanted["bias"]:
        grads["bias"] = found.dgates.sum(0)
    if wanted["gain_hh"]:
        assert product is not None
        assert stats is not None
        normed = (product - stats[..., :1]) * stats[..., 1:2]
        grads["gain_hh"] = (found.dgates * normed).sum(0)
    for name, sums in (("peephole", found.dpeephole), ("norm_c", found.dnorm_c)):
        if wanted[name]:
            assert sums is not None
            grads[name] = sums.sum(2).transpose(0, 1)
    return grads
