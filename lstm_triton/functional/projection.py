"""An LSTM layer with projected h (`proj_size`; Sak et al., 2014) by a recurrence that knows no projection.

    m_t = o_t * tanh(c_t),    h_t = W_hr m_t,    a_t = W_ih x_t + W_hh h_{t-1} + bias

W_hh h_{t-1} = (W_hh W_hr) m_{t-1}: the same recurrence over m, with the product as its recurrent weights. h of
all steps is then one GEMM. Only an h that no m stands behind, the initial or a reset state, has to come in another
way: as further inputs, zero at all other steps, with W_hh as their weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer.records import Inputs, LayerResult
from ..layer.sequence import previous_hidden


def projected_layer(
    run: Callable[[Inputs], LayerResult],
    v: Inputs,
    w_hr: Tensor,
    batch_first: bool,
    project: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> LayerResult:
    """`run` is a layer without projection, project(m [..., H], w_hr [P, H]) its h.

    w_hh [D, 4H, P], w_hr [D, P, H], h_0 and reset_h [D, B, P]; out [S, D * P], h_n [D, B, P], c_n [D, B, H].
    """
    directions, _, proj_size = v.w_hh.shape
    x, w_ih = v.x, v.w_ih
    if v.h_0 is not None or v.reset_h is not None:
        nothing = x.new_zeros((*x.shape[:2], directions * proj_size))
        # Mapped over by vmap if anything is that will be written into it.
        for tensor in (v.h_0, v.reset_h, v.lengths, v.reset):
            if tensor is not None:
                nothing = nothing + torch.zeros_like(tensor.reshape(-1)[:1], dtype=x.dtype).sum()
        order = "both" if directions == 2 else "forward"
        entering = previous_hidden(nothing, v.h_0, v.lengths, v.reset, v.reset_h, directions, order, batch_first)
        x = beside(x, entering.reshape(nothing.shape))
        # Each direction reads its own part of what enters.
        blocks = torch.block_diag(*v.w_hh.unbind()).unflatten(0, (directions, -1))  # [D, 4H, D * P]
        w_ih = beside(w_ih, blocks)
    # An m of zeros beside each c that is given.
    h_0, reset_h = (None if c is None else torch.zeros_like(c) for c in (v.c_0, v.reset_c))
    result = run(v._replace(x=x, w_ih=w_ih, w_hh=v.w_hh @ w_hr, h_0=h_0, reset_h=reset_h))
    h_n = torch.stack([project(m, w) for m, w in zip(result.h_n, w_hr)])
    if v.lengths is not None and v.h_0 is not None:
        h_n = torch.where((v.lengths == 0).unsqueeze(-1), v.h_0, h_n)  # a row without steps hands its state through
    by_direction = result.out.unflatten(-1, (directions, -1)).unbind(-2)
    out = torch.cat([project(m, w) for m, w in zip(by_direction, w_hr)], -1)
    return result._replace(out=out, h_n=h_n)


def beside(a: Tensor, b: Tensor) -> Tensor:
    """a and b along the last axis. Unlike those of torch.cat, gradients are no views of a wider tensor."""
    return F.pad(a, (0, b.shape[-1])) + F.pad(b, (a.shape[-1], 0))
