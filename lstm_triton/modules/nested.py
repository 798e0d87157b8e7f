"""Nested tensors of jagged layout, [B, any length, ...]: to padded ones with lengths, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padded_of(nested: Any) -> tuple[Tensor, Tensor]:
    """padded [B, T, I] with zeros beyond each row's length, T the largest, and lengths [B]."""
    if nested.layout != torch.jagged:
        raise ValueError(f"a nested tensor must have the layout torch.jagged, got {nested.layout}")
    if nested.dim() != 3 or nested._ragged_idx != 1:
        raise ValueError("a nested tensor must be [B, length, input_size], with lengths that differ")
    if nested.lengths() is not None:
        raise ValueError("a nested tensor with holes is not supported: give a contiguous one, or padded with lengths=")
    lengths = nested.offsets().diff()
    return nested.to_padded_tensor(0.0), lengths


def nested_like(padded: Tensor, nested: Any) -> Tensor:
    """The real steps of padded [B, T, ...], nested as `nested` is; no host synchronisation."""
    offsets, total = nested.offsets(), nested.values().shape[0]
    row = torch.repeat_interleave(offsets.diff(), output_size=total)
    time = torch.arange(total, device=offsets.device) - offsets[row]
    return torch.nested.nested_tensor_from_jagged(
        padded[row, time], offsets, min_seqlen=nested._maybe_min_seqlen, max_seqlen=nested._maybe_max_seqlen
    )
