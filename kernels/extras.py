"""What a launch gets for the variants of the cell: their tensors, and kernel arguments that are None without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from .config import PLAIN_CELL, Cell, Config, Layout
from .launch import compute_dtype

# Never part of a binary: see tiles.py.
RUNTIME_EXTRAS = ["time_begin", "zoneout_h", "zoneout_c", "recurrent_dropout"]


@dataclass(frozen=True)
class Extras:
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

    def arguments(self) -> dict[str, Any]:
        """What both kernels take."""
        cell = self.cell
        per_step = cell.sampled and (cell.zoneout_h or cell.zoneout_c or cell.recurrent_dropout)
        return {
            "peephole": self.peephole,
            "gain_hh": self.gain_hh,
            "norm_c": self.norm_c,
            "seed": self.seed if per_step else None,
            "h_mask": self.h_mask,
            "time_begin": self.time_begin,
            "zoneout_h": cell.zoneout_h or None,
            "zoneout_c": cell.zoneout_c or None,
            "recurrent_dropout": (cell.recurrent_dropout or None) if cell.sampled else None,
            "cell_clip": cell.cell_clip or None,
            "COUPLED": cell.coupled,
            "SAMPLED": bool(per_step),
        }

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

    def gradients(self, dgates: torch.Tensor, state: torch.Tensor, reset: bool) -> dict[str, torch.Tensor | None]:
        """New buffers for the last five of `Gradients`; those of sums are zeroed: `stepwise` adds launch by launch.

        state [D, B, H]: like a state, in the compute type. reset: with a given reset state.
        """
        zoneout, norm = self.cell.zoneout_h > 0, self.gain_hh is not None
        return {
            "dproduct": torch.empty_like(dgates) if norm else None,
            "dh_0": torch.zeros_like(state) if zoneout else None,
            "dh_reset": torch.zeros_like(state) if zoneout and reset else None,
            "dpeephole": state.new_zeros((3, *state.shape)) if self.peephole is not None else None,
            "dnorm_c": state.new_zeros((2, *state.shape)) if norm else None,
        }

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


PLAIN = Extras()
