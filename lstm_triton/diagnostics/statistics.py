"""What the states and gates of a layer were like in one call, in a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

CLOSED, OPEN = 0.05, 0.95  # a sigmoid beyond these has less than a fifth of its largest slope


@dataclass
class Layer:
    """The last call of one layer, over all valid steps of all rows; D directions, H units, of which h has P.

    h, c: root mean square by step [T, D], in the order in which a direction goes, up to the longest row.
    saturation: share of saturated values by gate and unit [D, 4, H]. spread: standard deviation of each unit's h
    [D, P], NaN for fewer than 8 values.
    """

    h: Tensor
    c: Tensor
    saturation: Tensor
    spread: Tensor


def norm_of(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The Euclidean norm, of 16-bit types in float32: their own range is soon left."""
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.promote_types(tensor.dtype, torch.float32))


def time_first(tensor: Tensor, module: nn.Module) -> Tensor:
    """[T, B, ...] of a padded tensor, [T, 1, ...] of an unbatched one; `tensor` has the input's form."""
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.transpose(0, 1) if module.batch_first else tensor


@torch.no_grad()
def layer_of(h: Any, c: Any, gates: Any, module: nn.Module, lengths: Tensor | None) -> Layer | None:
    """Statistics of h [S, D * P], c [S, D * H] and gates [S, D, 4, H], in the form of the input; None without a row."""
    directions = 2 if module.bidirectional else 1
    if isinstance(c, PackedSequence):
        lengths = pad_packed_sequence(c)[1]
        h, c, gates = (pad_packed_sequence(packed)[0] for packed in (h, c, gates))
    else:
        if c.is_nested:
            lengths = c.offsets().diff()
        if not c.is_nested and c.dim() == 2:  # unbatched
            h, c, gates = (tensor.unsqueeze(1) for tensor in (h, c, gates))
        else:
            h, c, gates = (time_first(tensor, module) for tensor in (h, c, gates))
    if not c.shape[1]:
        return None
    steps = torch.arange(len(c), device=c.device).unsqueeze(1)
    ends = (torch.full_like(c[0, :, 0], len(c)) if lengths is None else lengths.to(c.device)).long()
    valid = steps < ends
    h, c = (tensor.unflatten(-1, (directions, -1)).float() for tensor in (h, c))
    slopes = gates.float().clone()
    slopes[..., 2, :] = (slopes[..., 2, :] + 1) / 2  # tanh as a sigmoid
    saturation = ((slopes < CLOSED) | (slopes > OPEN))[valid].float().mean(0)
    values = h[valid]
    spread = values.std(0, correction=0) if len(values) >= 8 else torch.full_like(h[0, 0], math.nan)
    longest = int(ends.max())
    by_step = []
    for states in (h, c):
        squares = states.square().mean(-1)  # [T, B, D]
        if directions == 2:
            order = torch.where(valid, ends - 1 - steps, steps)
            backwards = squares[..., 1].gather(0, order)
            squares = torch.stack((squares[..., 0], backwards), dim=-1)
        rows = valid.sum(1).clamp(min=1).unsqueeze(1)
        by_step.append(((squares * valid.unsqueeze(-1)).sum(1) / rows).sqrt()[:longest].cpu())
    return Layer(by_step[0], by_step[1], saturation.cpu(), spread.cpu()) if longest else None
