"""The equations of the LSTM cell and its variants in plain PyTorch: what the kernels are held to.

The cell of Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), in PyTorch's gate order
i, f, g, o:

    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c_t = f * c_{t-1} + i * g;         h_t = o * tanh(c_t)

The variants (`CellWeights`), each of which changes this in one place, and which combine:

- peephole (Gers and Schmidhuber, 2000): a_i += w_ci * c_{t-1}, a_f += w_cf * c_{t-1}, a_o += w_co * c_t.
- coupled gates (Greff et al., 2017): f = 1 - i.
- layer normalisation (Ba et al., 2016, eq. 20-22): a_t = gain_ih * N(x_t W_ih^T) + gain_hh * N(h_{t-1} W_hh^T) + bias
  and h_t = o * tanh(gain_c * N(c_t) + bias_c), with N(z) = (z - mean(z)) / sqrt(var(z) + 1e-5) over all gates
  together (4H values; 3H with coupled gates), over H for c_t, var being the biased variance.
- cell clip (Sak et al., 2014): c_t is clamped to [-v, v] as soon as it is made.
- recurrent dropout (Semeniuta et al., 2016): c_t = f * c_{t-1} + i * d(g), a mask for every step.
- zoneout (Krueger et al., 2017): with the c_t and h_t made so far as candidates, h_t = h_{t-1} where the mask says so,
  and c_t = c_{t-1} by a mask of its own. tanh, the peephole to o and layer normalisation see the candidate c_t.
- variational dropout (Gal and Ghahramani, 2016): x_t and the h_{t-1} of the recurrent product lose the same elements
  at every step of a sequence.
- gradient clip (Graves, 2013): the gradient of every a_t is clamped to [-v, v].

Dropout is inverted (what stays is divided by 1 - p) and off in evaluation; zoneout in evaluation takes the mean
p * h_{t-1} + (1 - p) * h_t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.config import CHANCE_BITS, PLAIN_CELL, Cell
from . import masks


class CellWeights(NamedTuple):
    """The options of the cell and the weights of its variants; see the module's docstring.

    cell: options. peephole [D, 3, H], to i, f and o. gain_ih, gain_hh [D, 4H] and norm_c [D, 2, H] (gain and bias of
    c), all or none. seed [D] int64, of the masks, if cell.draws; the same for both directions.
    """

    cell: Cell = PLAIN_CELL
    peephole: Tensor | None = None
    gain_ih: Tensor | None = None
    gain_hh: Tensor | None = None
    norm_c: Tensor | None = None
    seed: Tensor | None = None

    def part(self, own: slice) -> CellWeights:
        """Of some of the sets of weights."""
        return CellWeights(self.cell, *(None if tensor is None else tensor[own] for tensor in self[1:]))


PLAIN = CellWeights()


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped; what autograd makes of that a second time is no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.clone()  # the derivative of an identity: there is nothing to clip going forward


def clip_gradient(x: Tensor, bound: float) -> Tensor:
    """x, its gradient clamped to [-bound, bound]; 0 for no bound."""
    return _ClipGradient.apply(x, bound) if bound and torch.is_grad_enabled() else x


def norm_gates(z: Tensor, gain: Tensor, coupled: bool) -> Tensor:
    """gain * N(z) of z [..., 4H], whose forget gate counts and is normalised only if it is not coupled."""
    if not coupled:
        return F.layer_norm(z, z.shape[-1:]) * gain
    i, f, g, o = z.chunk(4, -1)
    gates = torch.cat((i, g, o), -1)
    i, g, o = F.layer_norm(gates, gates.shape[-1:]).chunk(3, -1)
    return torch.cat((i, torch.zeros_like(f), g, o), -1) * gain


def zoneout(new: Tensor, old: Tensor, threshold: int, bits: Tensor | None) -> Tensor:
    """The old state where the bits say so, or without bits the mean of that."""
    if not threshold:
        return new
    if bits is not None:
        return torch.where(masks.happens(bits, threshold), old, new)
    keep = threshold / 2**CHANCE_BITS
    return keep * old + (1 - keep) * new


def cell_forward(
    a: Tensor,
    c_prev: Tensor,
    h_prev: Tensor | None = None,
    variants: CellWeights = PLAIN,
    bits: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations a [..., 4, H], c_{t-1} (and, for zoneout, h_{t-1}) -> activated gates [..., 4, H], c_t, h_t.

    bits: random words for zoneout of h, of c and for recurrent dropout, if there are any; see `masks.step_bits`.
    """
    cell, clip = variants.cell, variants.cell.recurrent_grad_clip
    bits_h, bits_c, bits_g = bits or (None, None, None)
    peephole = None if variants.peephole is None else variants.peephole.transpose(0, 1).unsqueeze(-2)
    i, f, g, o = a.unbind(-2)
    if peephole is not None:
        i, f = i + peephole[0] * c_prev, f + peephole[1] * c_prev
    i, g = clip_gradient(i, clip).sigmoid(), clip_gradient(g, clip).tanh()
    f = 1 - i if cell.coupled_gates else clip_gradient(f, clip).sigmoid()
    kept_g = g
    if cell.recurrent_dropout and bits_g is not None:
        kept_g = g * masks.dropout_scale(bits_g, cell.recurrent_dropout, g.dtype)
    c = f * c_prev + i * kept_g
    if cell.cell_clip:
        c = c.clamp(-cell.cell_clip, cell.cell_clip)
    if peephole is not None:
        o = o + peephole[2] * c
    o, seen = clip_gradient(o, clip).sigmoid(), c
    if variants.norm_c is not None:
        gain, bias = variants.norm_c.transpose(0, 1).unsqueeze(-2)
        seen = F.layer_norm(c, c.shape[-1:]) * gain + bias
    h = o * seen.tanh()
    if h_prev is not None:
        h = zoneout(h, h_prev, cell.zoneout_h, bits_h)
    return torch.stack((i, f, g, o), dim=-2), zoneout(c, c_prev, cell.zoneout_c, bits_c), h


def cell_backward(gates: Tensor, c: Tensor, c_prev: Tensor, dh: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
    """The plain cell's gradients of h_t, c_t -> those of the pre-activations [..., 4, H] and of c_{t-1}."""
    i, f, g, o = gates.unbind(-2)
    tanh_c = c.tanh()
    dc = dc + dh * o * (1 - tanh_c**2)
    da = (dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g**2), dh * tanh_c * o * (1 - o))
    return torch.stack(da, dim=-2), dc * f
