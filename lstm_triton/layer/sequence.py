"""What the backward pass computes from dgates outside the recurrence, beyond plain GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]


def ways(order: str) -> list[tuple[slice, bool]]:
    """The sets of weights that run forward and those that run in reverse: (which of D, reversed?)."""
    if order == "both":
        return [(slice(0, None, 2), False), (slice(1, None, 2), True)]
    return [(slice(None), order == "reverse")]


def _within(lengths: Tensor | None, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """time [T, 1] and length [B] or [1]: `time < length` says which steps are real."""
    time = torch.arange(seq_len, device=device).unsqueeze(1)
    return time, torch.full((1,), seq_len, device=device) if lengths is None else lengths


def _restart_marks(marks: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """[T, B] bool, by time index: the state entering this step is the reset state."""
    time, length = _within(lengths, marks.shape[0], marks.device)
    if not reverse:
        return marks & (time < length)
    # A mark separates t - 1 from t, so in reverse it is step t - 1 that starts afresh.
    later = torch.cat((marks[1:], torch.zeros_like(marks[:1])))
    return later & (time + 1 < length)


def previous_hidden(
    out: Tensor,
    h_0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    sets: int,
    order: str,
    batch_first: bool,
) -> Tensor:
    """The h_{t-1} that every step has read: [rows, D, H], in the order of out's rows."""
    by_time = out.unflatten(-1, (sets, out.shape[2] // sets))
    result = torch.empty_like(by_time)
    source, target = (by_time.transpose(0, 1), result.transpose(0, 1)) if batch_first else (by_time, result)
    marks = reset.t() if reset is not None and batch_first else reset
    for which, reverse in ways(order):
        start = None if h_0 is None else h_0[which].transpose(0, 1)  # [B, sets, H]
        if not reverse:
            target[1:, :, which] = source[:-1, :, which]
            target[0, :, which] = 0.0 if start is None else start
        else:
            target[:-1, :, which] = source[1:, :, which]
            target[-1, :, which] = 0.0 if start is None else start
            if lengths is not None and start is not None:
                time, length = _within(lengths, target.shape[0], out.device)
                at_end = (time == length - 1)[..., None, None]
                target[:, :, which] = torch.where(at_end, start, target[:, :, which])
        if marks is not None:
            fresh = _restart_marks(marks, lengths, reverse)[..., None, None]
            instead = out.new_zeros(()) if reset_h is None else reset_h[which].transpose(0, 1)
            target[:, :, which] = torch.where(fresh, instead, target[:, :, which])
    return result.flatten(0, 1)


def first_steps(dgates: Tensor, lengths: Tensor | None, marks: Tensor | None, order: str) -> Tensor:
    """dgates [T, B, D, 4H] at the step that each row begins with, 0 where that starts afresh: [D, B, 4H]."""
    _, batch, sets, gate_size = dgates.shape
    first = dgates.new_empty((sets, batch, gate_size))
    for which, reverse in ways(order):
        if reverse and lengths is not None:
            last = (lengths.long() - 1).clamp(min=0)
            found = dgates[last, torch.arange(batch, device=last.device)][:, which]
        else:
            found = dgates[-1 if reverse else 0, :, which]
        if marks is not None and not reverse:
            found = found.masked_fill(marks[0][:, None, None], 0)
        first[which] = found.transpose(0, 1)
    return first


def recurrent_weight_gradient(
    dgates: Tensor, out: Tensor, h_0: Tensor | None, lengths: Tensor | None, order: str
) -> Tensor:
    """dW_hh [D, 4H, H] from dgates [T, B, D, 4H] and out [T, B, D, H], without resets.

    h_{t-1} is `out` a step earlier, so nothing is copied: one GEMM for each set over the rows that have an earlier
    step, on top of the initial states' share. (Beyond a row's length both are 0.)
    """
    sets, hidden_size = out.shape[2:]
    if sets == 1 and h_0 is None:
        d, h = (dgates[:-1], out[1:]) if order == "reverse" else (dgates[1:], out[:-1])
        return (d.flatten(0, 2).t() @ h.flatten(0, 2)).unsqueeze(0)
    if h_0 is None:
        result = dgates.new_empty((sets, 4 * hidden_size, hidden_size))
    else:
        result = first_steps(dgates, lengths, None, order).transpose(1, 2) @ h_0
    for which, reverse in ways(order):
        d, h = (dgates[:-1], out[1:]) if reverse else (dgates[1:], out[:-1])
        d, h = d[:, :, which].flatten(0, 1), h[:, :, which].flatten(0, 1)
        result[which].baddbmm_(d.permute(1, 2, 0), h.permute(1, 0, 2), beta=0 if h_0 is None else 1)
    return result


def initial_gradient(
    dgates: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    marks: Tensor | None,
    order: str,
    multiply: Multiply = torch.matmul,
) -> Tensor:
    """What reaches h_0 [D, B, H] from dgates [T, B, D, 4H]: one small GEMM over each set's first step."""
    return multiply(first_steps(dgates, lengths, marks, order), w_hh)


def unstarted(dh_0: Tensor, dh_n: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The same, where a row without steps hands its initial state through."""
    if lengths is None:
        return dh_0
    through = torch.zeros_like(dh_0) if dh_n is None else dh_n
    return torch.where((lengths == 0).unsqueeze(-1), through, dh_0)


def reset_gradient(
    dgates: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    marks: Tensor,
    order: str,
    multiply: Multiply = torch.matmul,
) -> Tensor:
    """dreset_h [D, B, H] from dgates [T, B, D, 4H]: sum over a row's resets, then one small GEMM."""
    _, batch, sets, gate_size = dgates.shape
    sums = dgates.new_empty((sets, batch, gate_size))
    for which, reverse in ways(order):
        fresh = _restart_marks(marks, lengths, reverse).to(dgates.dtype)
        sums[which] = torch.einsum("tb,tbdg->dbg", fresh, dgates[:, :, which])
    return multiply(sums, w_hh)


def norm_gates_backward(d: Tensor, z: Tensor, gain: Tensor, coupled: bool) -> tuple[Tensor, Tensor]:
    """Gradient of `reference.cell.norm_gates(z, gain, coupled)` [rows, D, 4H] -> those of z and of the gain [D, 4H]."""
    if coupled:
        d, z, of_gates = _without_forget(d), _without_forget(z), _without_forget(gain)
    else:
        of_gates = gain
    size = [z.shape[-1]]
    _, mean, rstd = torch.native_layer_norm(z, size, None, None, 1e-5)
    dnormed = d * of_gates
    found = torch.ops.aten.native_layer_norm_backward(dnormed, z, size, mean, rstd, None, None, [True, False, False])[0]
    dgain = (d * ((z - mean) * rstd)).sum(0)
    return (_with_forget(found), _with_forget(dgain)) if coupled else (found, dgain)


def _without_forget(of_gates: Tensor) -> Tensor:
    """[..., 4H] -> i, g and o, [..., 3H]."""
    i, _, g, o = of_gates.chunk(4, -1)
    return torch.cat((i, g, o), -1)


def _with_forget(of_gates: Tensor) -> Tensor:
    """Inverse, with zeros for the forget gate."""
    i, g, o = of_gates.chunk(3, -1)
    return torch.cat((i, torch.zeros_like(i), g, o), -1)
