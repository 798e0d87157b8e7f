"""The specification: one LSTM layer in plain PyTorch, forward and a hand-written backward.

Any floating type, any device, every feature that the kernels carry, no speed. `cell.py` has the cell, and

    a_t = x_t W_ih^T + h_{t-1} W_hh^T + bias

Shapes: x [T, B, I] (or [B, T, I]), w_ih [D, 4H, I], w_hh [D, 4H, H], bias [D, 4H] or None, states
[D, B, H], out [T, B, D * H]. Direction 1 runs from each row's last step to its first.

lengths [B] (int): row b has lengths[b] steps; beyond them its state stands still, its outputs are
0 and nothing reaches its inputs. A row of length 0 returns its initial state.
reset [T, B] (bool): before step t the state of a marked row becomes zero, or the reset state. The
mark separates t - 1 from t, so direction 1 restarts before t - 1: a row is then a concatenation of
independent segments in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.config import Cell
from . import masks
from .cell import PLAIN, CellWeights, cell_backward, cell_forward, norm_gates

State = tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """The tensors of one layer, for all its sets of weights; shapes are those of `layer/op.py`."""

    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None = None
    h_0: Tensor | None = None
    c_0: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    peephole: Tensor | None = None
    gain_ih: Tensor | None = None
    gain_hh: Tensor | None = None
    norm_c: Tensor | None = None
    seed: Tensor | None = None


class Saved(NamedTuple):
    """What the backward pass reads: per step, in the order of computation, [T, D, B, ...]."""

    gates: Tensor  # [T, D, B, 4, H], activated
    cells: Tensor  # [T, D, B, H]
    time: Tensor  # [T, D, B]: the time index that each step handled

    def ordered(self, by_step: Tensor, batch_first: bool) -> Tensor:
        """[T, D, B, H] by step -> [S, D, H] in the order of the inputs."""
        # `time` maps steps to times one to one, per row and direction alike: it is its own inverse.
        found = by_step.gather(0, self.time.unsqueeze(-1).expand_as(by_step)).transpose(1, 2)
        return found.transpose(0, 1) if batch_first else found

    def by_time(self, batch_first: bool) -> tuple[Tensor, Tensor]:
        """gates [S, D, 4H] and cells [S, D, H] in the order of the inputs; the padding holds anything."""
        return self.ordered(self.gates.flatten(-2), batch_first), self.ordered(self.cells, batch_first)


class Gradients(NamedTuple):
    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor
    h_0: Tensor
    c_0: Tensor
    reset_h: Tensor
    reset_c: Tensor


def _schedule(
    seq_len: int, batch: int, directions: int, lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """time[s, d, b] handled at step s by direction d of row b, and active[s, b]."""
    step = torch.arange(seq_len, device=device).view(-1, 1, 1)
    length = (
        torch.full((batch,), seq_len, device=device)
        if lengths is None
        else lengths.to(device, torch.int64).clamp(0, seq_len)
    )
    active = step < length
    time = torch.where(active & (torch.arange(directions, device=device).view(1, -1, 1) == 1), length - 1 - step, step)
    return time, active.squeeze(1)


def _restarts(reset: Tensor | None, time: Tensor, active: Tensor) -> Tensor:
    """[T, D, B] bool: the state is replaced before this step."""
    if reset is None:
        return torch.zeros_like(time, dtype=torch.bool)
    seq_len, directions, batch = time.shape
    row = torch.arange(batch, device=time.device)
    forward = reset[time[:, 0], row] & active
    if directions == 1:
        return forward.unsqueeze(1)
    mark = reset[(time[:, 1] + 1).clamp(max=seq_len - 1), row] & active
    first = torch.arange(seq_len, device=time.device).unsqueeze(1) == 0
    return torch.stack((forward, mark & ~first), dim=1)


def _state(state: State | None, like: Tensor, directions: int, batch: int, hidden_size: int) -> State:
    if state is not None:
        return state
    # Two tensors: `scan` would take one that comes twice for the same state.
    return like.new_zeros((directions, batch, hidden_size)), like.new_zeros((directions, batch, hidden_size))


def _loop(step: Callable[..., Any], carry: list[Tensor], xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """carry, outs = step(carry, slice of xs) for every step; the last carry and all outs, stacked."""
    outs = []
    # Taken apart once: the backward pass of an index per step would be quadratic in T.
    for of_step in zip(*(tensor.unbind() for tensor in xs)):
        carry, out = step(carry, of_step)
        outs.append(out)
    return carry, [torch.stack(each) for each in zip(*outs)]


def layer_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: State | None = None,
    *,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: State | None = None,
    variants: CellWeights = PLAIN,
    loop: Callable[..., Any] = _loop,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """One layer -> out, h_n, c_n and what `layer_backward` reads. Differentiable by autograd too.

    loop: runs the steps, by default one after the other in Python; an exporter has its own.
    """
    if batch_first:
        x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
    (seq_len, batch, _), (directions, hidden_size) = x.shape, (w_hh.shape[0], w_hh.shape[2])
    time, active = _schedule(seq_len, batch, directions, lengths, x.device)
    fresh = _restarts(reset, time, active).unsqueeze(-1)
    reset_h, reset_c = _state(reset_state, x, directions, batch, hidden_size)
    row, way = torch.arange(batch, device=x.device), torch.arange(directions, device=x.device).unsqueeze(-1)
    if lengths is not None:
        x = x.masked_fill(~active.unsqueeze(-1), 0)  # active by step is active by time, in both directions
    cell, seed = variants.cell, variants.seed if variants.cell.sampled else None
    if cell.variational_x and seed is not None:
        x = x * masks.sequence_mask(seed[:1], batch, x.shape[-1], masks.INPUT, cell.variational_x, x.dtype)[0]
    projected = x @ w_ih.flatten(0, 1).t()
    if variants.gain_ih is not None:
        by_set = projected.unflatten(-1, (directions, -1))
        projected = norm_gates(by_set, variants.gain_ih, cell.coupled_gates).flatten(-2)
    if bias is not None:
        projected = projected + bias.flatten()
    by_step = projected.unflatten(-1, (directions, -1))[time, row, way]  # [T, D, B, 4H]
    h_mask = None
    if cell.variational_h and seed is not None:
        h_mask = masks.sequence_mask(seed, batch, hidden_size, masks.RECURRENT, cell.variational_h, x.dtype)
    per_step = cell.zoneout_h or cell.zoneout_c or cell.recurrent_dropout
    bits = list(masks.step_bits(seed, time, hidden_size)) if per_step and seed is not None else []

    def step(carry: Sequence[Tensor], of_step: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (h_prev, c_prev), (projected, new, live, *drawn) = carry, of_step
        if reset is not None:
            h_prev, c_prev = torch.where(new, reset_h, h_prev), torch.where(new, reset_c, c_prev)
        product = (h_prev if h_mask is None else h_prev * h_mask) @ w_hh.transpose(1, 2)
        if variants.gain_hh is not None:
            product = norm_gates(product, variants.gain_hh.unsqueeze(1), cell.coupled_gates)
        a = (projected + product).unflatten(-1, (4, hidden_size))
        gates, c_new, h_new = cell_forward(a, c_prev, h_prev, variants, tuple(drawn) or None)  # type: ignore[arg-type]
        if lengths is None:
            return [h_new, c_new], [h_new.clone(), gates, c_new.clone()]  # `scan` wants no tensor twice
        h, c = (torch.where(live, made, old) for made, old in zip((h_new, c_new), carry))
        return [h, c], [torch.where(live, h_new, 0), gates, c.clone()]

    start = [tensor.contiguous() for tensor in _state(state, x, directions, batch, hidden_size)]
    (h, c), (out, gates, cells) = loop(step, start, [by_step, fresh, active.unsqueeze(-1), *bits])
    saved = Saved(gates, cells, time)
    out = saved.ordered(out, batch_first).flatten(2)
    return out, h, c, saved


def ensemble_forward(
    v: Inputs, *, batch_first: bool, bidirectional: bool, cell: Cell, loop: Callable[..., Any] = _loop
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `layer.op` gives for keep="all": `layer_forward` for one member after another."""
    directions = 2 if bidirectional else 1
    variants = CellWeights(cell, v.peephole, v.gain_ih, v.gain_hh, v.norm_c, v.seed)
    members = []
    for index in range(v.w_ih.shape[0] // directions):
        own = slice(index * directions, (index + 1) * directions)
        own_x = v.x if v.x.dim() == 3 else v.x[:, :, index * v.x.shape[2] * directions // v.w_ih.shape[0]]
        pairs = [
            None if h is None or c is None else (h[own], c[own].to(v.x.dtype))
            for h, c in ((v.h_0, v.c_0), (v.reset_h, v.reset_c))
        ]
        out, h_n, c_n, saved = layer_forward(
            own_x,
            v.w_ih[own],
            v.w_hh[own],
            None if v.bias is None else v.bias[own],
            pairs[0],
            batch_first=batch_first,
            lengths=v.lengths,
            reset=v.reset,
            reset_state=pairs[1],
            variants=variants.part(own),
            loop=loop,
        )
        gates, cells = (tensor.flatten(0, 1) for tensor in saved.by_time(batch_first))
        members.append((out, h_n, c_n, gates, cells))
    outs, h_ns, c_ns, all_gates, all_cells = zip(*members)
    return torch.cat(outs, -1), torch.cat(h_ns), torch.cat(c_ns), torch.cat(all_gates, 1), torch.cat(all_cells, 1)


def layer_backward(
    dout: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    saved: Saved,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    out: Tensor,
    state: State | None = None,
    *,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: State | None = None,
) -> Gradients:
    """All gradients of one layer of the plain cell, in the order and with the hoisting that the kernels use."""
    if batch_first:
        x, out, dout = x.transpose(0, 1), out.transpose(0, 1), dout.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    (seq_len, batch, _), (directions, hidden_size) = x.shape, (w_hh.shape[0], w_hh.shape[2])
    time, active = _schedule(seq_len, batch, directions, lengths, x.device)
    fresh = _restarts(reset, time, active).unsqueeze(-1)
    reset_h, reset_c = _state(reset_state, x, directions, batch, hidden_size)
    h_0, c_0 = _state(state, x, directions, batch, hidden_size)
    row, way = torch.arange(batch, device=x.device), torch.arange(directions, device=x.device).unsqueeze(-1)
    out, dout = (v.unflatten(-1, (directions, hidden_size)) for v in (out, dout))
    zero = torch.zeros_like(h_0)
    dh, dc, dreset_h, dreset_c = dh_n, dc_n, zero, zero
    grads = Gradients(
        torch.zeros_like(x),
        torch.zeros_like(w_ih),
        torch.zeros_like(w_hh),
        w_hh.new_zeros(w_hh.shape[:2]),
        zero,
        zero,
        zero,
        zero,
    )
    for step in reversed(range(seq_len)):
        live, new = active[step].unsqueeze(-1), fresh[step]
        h_prev, c_prev = h_0, c_0
        if step > 0:
            h_prev, c_prev = out[time[step - 1], row, way], saved.cells[step - 1]
        h_prev, c_prev = torch.where(new, reset_h, h_prev), torch.where(new, reset_c, c_prev)
        da, dc_prev = cell_backward(saved.gates[step], saved.cells[step], c_prev, dh + dout[time[step], row, way], dc)
        da = torch.where(live, da.flatten(-2), 0)  # [D, B, 4H]
        x_t = x[time[step], row].masked_fill(~live, 0)
        grads.w_ih.add_(da.transpose(1, 2) @ x_t)
        grads.w_hh.add_(da.transpose(1, 2) @ h_prev)
        grads.bias.add_(da.sum(1))
        grads.x.index_put_((time[step], row.expand(directions, -1)), da @ w_ih, accumulate=True)
        dh_prev = da @ w_hh
        dreset_h = dreset_h + torch.where(new, dh_prev, 0)
        dreset_c = dreset_c + torch.where(new, dc_prev, 0)
        dh = torch.where(live, torch.where(new, 0, dh_prev), dh)
        dc = torch.where(live, torch.where(new, 0, dc_prev), dc)
    dx = grads.x.transpose(0, 1) if batch_first else grads.x
    return grads._replace(x=dx, h_0=dh, c_0=dc, reset_h=dreset_h, reset_c=dreset_c)
