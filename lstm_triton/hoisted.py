"""What the backward pass computes from dgates outside the recurrence, beyond plain GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor


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
    directions: int,
    batch_first: bool,
) -> Tensor:
    """The h_{t-1} that every step has read: [rows, D, H], in the order of out's rows."""
    by_time = out.unflatten(-1, (directions, out.shape[2] // directions))
    result = torch.empty_like(by_time)
    source, target = (by_time.transpose(0, 1), result.transpose(0, 1)) if batch_first else (by_time, result)
    marks = reset.t() if reset is not None and batch_first else reset
    seq_len = target.shape[0]
    for d in range(directions):
        start = 0.0 if h_0 is None else h_0[d]
        if d == 0:
            target[1:, :, d] = source[:-1, :, d]
            target[0, :, d] = start
        else:
            target[:-1, :, d] = source[1:, :, d]
            target[-1, :, d] = start
            if lengths is not None and h_0 is not None:
                time, length = _within(lengths, seq_len, out.device)
                at_end = (time == length - 1).unsqueeze(-1)
                target[:, :, d] = torch.where(at_end, h_0[d], target[:, :, d])
        if marks is not None:
            fresh = _restart_marks(marks, lengths, d == 1).unsqueeze(-1)
            zero = out.new_zeros(()) if reset_h is None else reset_h[d]
            target[:, :, d] = torch.where(fresh, zero, target[:, :, d])
    return result.flatten(0, 1)


def initial_gradient(
    dgates: Tensor, dh_n: Tensor | None, w_hh: Tensor, lengths: Tensor | None, marks: Tensor | None
) -> Tensor:
    """dh_0 [D, B, H] from dgates [T, B, D, 4H]: one small GEMM over each direction's first step."""
    _, batch, directions, _ = dgates.shape
    firsts = [dgates[0, :, 0]]
    if directions == 2:
        if lengths is None:
            firsts.append(dgates[-1, :, 1])
        else:
            last = (lengths.long() - 1).clamp(min=0)
            firsts.append(dgates[last, torch.arange(batch, device=last.device), 1])
    dh_0 = torch.stack(firsts) @ w_hh
    if marks is not None:
        dh_0[0].masked_fill_(marks[0].unsqueeze(-1), 0)
    if lengths is not None:
        # A row without steps hands its initial state through.
        through = torch.zeros_like(dh_0) if dh_n is None else dh_n
        dh_0 = torch.where((lengths == 0).unsqueeze(-1), through, dh_0)
    return dh_0


def reset_gradient(dgates: Tensor, w_hh: Tensor, lengths: Tensor | None, marks: Tensor | None) -> Tensor:
    """dreset_h [D, B, H] from dgates [T, B, D, 4H]: sum over a row's resets, then one small GEMM."""
    directions = dgates.shape[2]
    sums = []
    for d in range(directions):
        assert marks is not None
        fresh = _restart_marks(marks, lengths, d == 1).to(dgates.dtype)
        sums.append(torch.einsum("tb,tbg->bg", fresh, dgates[:, :, d]))
    return torch.stack(sums) @ w_hh
