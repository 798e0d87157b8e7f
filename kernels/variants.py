"""The variants of the cell as a launch is given them: their tensors, and the records that kernels read them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from .config import PLAIN_CELL, Cell, Config, Layout, compute_dtype
from .records import Masks, Scalars

NO_MASKS, NO_SCALARS = Masks(), Scalars()


class Features(NamedTuple):
    """Those of the fields of `How` that say which variants there are."""

    COUPLED: bool = False
    ZONEOUT_H: bool = False
    ZONEOUT_C: bool = False
    DROPOUT: bool = False
    SAMPLED: bool = False
    NORM: bool = False


NO_FEATURES = Features()


@dataclass(frozen=True)
class Variants:
    """The variants of one layer.

    peephole [D, 3, H]: diagonal weights of c to i, f (c_{t-1}) and o (c_t). gain_hh [D, 4, H] and norm_c [D, 2, H]
    (gain and bias), both or none: layer normalisation of h_{t-1} W_hh^T and of c_t. seed [D] int64: with cell.draws.
    h_mask [D, B, H]: on the h that the recurrent product reads. time_begin: time index of the first row.
    """

    cell: Cell = PLAIN_CELL
    peephole: torch.Tensor | None = None
    gain_hh: torch.Tensor | None = None
    norm_c: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    h_mask: torch.Tensor | None = None
    time_begin: int = 0

    @property
    def sampled(self) -> bool:
        """Whether masks of single steps are drawn."""
        cell = self.cell
        return cell.sampled and bool(cell.zoneout_h or cell.zoneout_c or cell.recurrent_dropout)

    @property
    def features(self) -> Features:
        """What of them is part of a binary."""
        cell = self.cell
        if cell is PLAIN_CELL:
            return NO_FEATURES._replace(NORM=True) if self.gain_hh is not None else NO_FEATURES
        dropout = cell.sampled and cell.recurrent_dropout > 0
        zoneout = cell.zoneout_h > 0, cell.zoneout_c > 0
        return Features(cell.coupled_gates, *zoneout, dropout, self.sampled, self.gain_hh is not None)

    def masks(self) -> Masks:
        """All but h_0, reset_h and sent, which only the forward pass has."""
        cell = self.cell
        if cell is PLAIN_CELL:
            return NO_MASKS

        def probability(threshold: int) -> float | None:
            return float(threshold) if threshold else None

        return Masks(
            seed=self.seed if self.sampled else None,
            zoneout_h=probability(cell.zoneout_h),
            zoneout_c=probability(cell.zoneout_c),
            recurrent_dropout=probability(cell.recurrent_dropout) if cell.sampled else None,
            h_mask=self.h_mask,
        )

    def scalars(self) -> Scalars:
        """None for none."""
        if self.cell is PLAIN_CELL:
            return NO_SCALARS
        return Scalars(self.cell.cell_clip or None, self.cell.recurrent_grad_clip or None)

    def check(self, config: Config, hidden_size: int) -> None:
        """Raise the ValueError of a config that cannot run these variants."""
        if self.gain_hh is not None and (
            config.placement == "single" or (config.placement == "stepwise" and config.block_h < hidden_size)
        ):
            raise ValueError(
                f"layer normalisation needs all units within a step, which placement {config.placement!r} "
                f"with block_h={config.block_h} does not have"
            )

    def masked(self, h: torch.Tensor | None) -> torch.Tensor | None:
        """An initial or reset h as the recurrent product reads it; None without a mask."""
        return None if h is None or self.h_mask is None else h * self.h_mask

    def pairs(self, layout: Layout, config: Config, hidden_size: int, like: torch.Tensor) -> torch.Tensor | None:
        """A new buffer [rows, D, 2, hidden tiles, 2] for what programs share."""
        if self.gain_hh is None:
            return None
        tiles = triton.cdiv(hidden_size, config.block_h)
        return like.new_empty((layout.rows, like.shape[0], 2, tiles, 2), dtype=compute_dtype(like.dtype))

    def stats(self, layout: Layout, like: torch.Tensor) -> torch.Tensor | None:
        """A new buffer [rows, D, 4] for the means and rstds of both normalisations."""
        if self.gain_hh is None:
            return None
        return like.new_empty((layout.rows, like.shape[0], 4), dtype=compute_dtype(like.dtype))


class Gradients(NamedTuple):
    """What the backward recurrence gives; see backward.py. None where there is no such variant."""

    dgates: torch.Tensor
    dc_0: torch.Tensor
    dc_reset: torch.Tensor | None
    dproduct: torch.Tensor | None
    dh_0: torch.Tensor | None
    dh_reset: torch.Tensor | None
    dpeephole: torch.Tensor | None
    dnorm_c: torch.Tensor | None


PLAIN = Variants()
