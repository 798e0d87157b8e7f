"""The masks of `kernels/masks.py` in plain PyTorch: Philox4x32-10 (Salmon et al., 2011) on int64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.config import CHANCE_BITS

STEP, RECURRENT, INPUT, REVERSE = 0, 1, 2, 4  # kinds of masks and the direction, as `kernels.masks` numbers them
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64, for 64-bit seeds and four counters of 32 bits; all broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 wraps, which leaves all 64 bits of a product of two words as they should be.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((second >> 32) & _WORD) ^ c1 ^ k0, ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def happens(bits: Tensor, threshold: int) -> Tensor:
    """bool: with the probability threshold / 2^24."""
    return (bits >> (32 - CHANCE_BITS)) < threshold


def dropout_scale(bits: Tensor, threshold: int, dtype: torch.dtype) -> Tensor:
    """0 with the probability threshold / 2^24, else what keeps the mean at 1."""
    one = 2**CHANCE_BITS
    return (~happens(bits, threshold)).to(dtype) * (one / (one - threshold))


def sequence_mask(seed: Tensor, batch: int, size: int, kind: int, threshold: int, dtype: torch.dtype) -> Tensor:
    """The dropout mask of whole sequences: [D, batch, size] for seeds [D], the second of them of the reverse direction.

    kind: RECURRENT or INPUT.
    """
    unit = torch.arange(size, device=seed.device)
    b = torch.arange(batch, device=seed.device).unsqueeze(-1)
    bits, *_ = philox(seed.view(-1, 1, 1), (unit, b, torch.zeros_like(b), kind + _reverse(seed)))
    return dropout_scale(bits, threshold, dtype)


def step_bits(seed: Tensor, time: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The words that decide zoneout of h, zoneout of c and recurrent dropout: [T, D, B, size] for time [T, D, B]."""
    unit, b = torch.arange(size, device=seed.device), torch.arange(time.shape[2], device=seed.device).unsqueeze(-1)
    time = time.unsqueeze(-1)
    bits_h, bits_c, bits_g, _ = philox(seed.view(-1, 1, 1), (unit, b, time, STEP + _reverse(seed)))
    return bits_h, bits_c, bits_g


def _reverse(seed: Tensor) -> Tensor:
    """[D, 1, 1]: what the kind of the second direction has on top."""
    return REVERSE * torch.arange(seed.shape[0], device=seed.device).view(-1, 1, 1)
