"""What a launch is told: how the recurrence is placed (Config), what its cell computes beyond the plain LSTM
(Cell) and how its rows lie (Layout)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

Text = TypeVar("Text", bound="_Encoded")

PLACEMENTS = ("local", "grid", "stepwise", "single")
PROTOCOLS = ("none", "flags", "mailbox")
PRECISIONS = ("ieee", "tf32", "tf32x3")
REGISTER_BYTES = 32 * 1024  # the most of resident weights that a program keeps in registers; see product.py


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the cell state and of every accumulator: fp32, or fp64 for fp64 data."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Encoded:
    """A dataclass of words and numbers as a one-line text: operators take it as a string."""

    def encode(self) -> str:
        """A text that `decode` reads back."""
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))  # type: ignore[arg-type]

    @classmethod
    def decode(cls: type[Text], text: str) -> Text:
        """Inverse of `encode`; ValueError names what is wrong with any other text."""
        words = dict(word.partition("=")[::2] for word in text.split())
        expected = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
        if words.keys() != expected.keys() or len(text.split()) != len(expected):
            raise ValueError(f"a {cls.__name__.lower()} has the fields {', '.join(expected)}; got {text!r}")
        truth = {"True": True, "False": False}.__getitem__
        readers: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": truth}
        values = {}
        for name, word in words.items():
            try:
                values[name] = readers[str(expected[name])](word)
            except (KeyError, ValueError):
                raise ValueError(f"{name} of a {cls.__name__.lower()} is a {expected[name]}, got {word!r}") from None
        return cls(**values)


@dataclass(frozen=True)
class Config(_Encoded):
    """One way to run one pass of the recurrence; every field but the last is part of the binary.

    placement: "local" (a program owns all units of its rows), "grid" (programs exchange a tile
        each step inside one launch), "stepwise" (one launch a step) or "single" (the one launch of a
        sequence of one step, its input's projection included; forward only).
    protocol: "flags" or "mailbox" for "grid", "none" otherwise; see exchange.py.
    resident: W_hh is read once per launch and stays on chip; else it is re-read every step.
    units_first: the weights are the first operand of the dot; see product.py.
    split_k: slices of the depth that warps work on side by side, 1 for none; see product.py. "local" has none
        forward, and backward one for every gate or part of one.
    block_b, block_h, block_k: rows, hidden units and dot depth of one program; powers of two, block_k at
        least 16, the others 8. "local" has block_h >= H and no block_k of its own: block_k == block_h.
    num_warps, num_stages: Triton's.
    max_batch_tiles: most batch tiles in one launch, so that all programs of a launch that waits
        are resident together; 0: no limit. A larger batch runs as several launches.
    """

    placement: str
    protocol: str
    resident: bool
    units_first: bool
    split_k: int
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    max_batch_tiles: int = 0

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {self.placement!r}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {PROTOCOLS}, got {self.protocol!r}")
        if (self.placement == "grid") != (self.protocol != "none"):
            raise ValueError(f"placement {self.placement!r} does not go with protocol {self.protocol!r}")
        for name, least in (("block_b", 8), ("block_h", 8), ("block_k", 16)):
            block = getattr(self, name)
            if block < least or block & (block - 1):
                raise ValueError(f"{name} must be a power of two and at least {least}, got {block}")
        depth = 4 * self.block_h if self.placement == "local" else self.block_k
        if self.placement == "local" and self.block_h < 16:
            raise ValueError(f"placement 'local' multiplies block_h x block_h: at least 16, got {self.block_h}")
        if self.split_k > 1 and depth < 16 * self.split_k:
            raise ValueError(
                "split_k needs slices of at least 16, of block_k, or where placement is 'local' of 4 block_h"
            )
        for name in ("split_k", "num_warps"):
            if (number := getattr(self, name)) not in (1, 2, 4, 8):
                raise ValueError(f"{name} must be 1, 2, 4 or 8, got {number}")
        for name, least in (("num_stages", 1), ("max_batch_tiles", 0)):
            if (number := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if self.protocol == "mailbox" and self.block_b * self.block_k < 32 * self.num_warps:
            raise ValueError("a mailbox's tile, block_b x block_k, needs an element for each thread of the program")
        if self.placement == "local" and (self.block_k != self.block_h or not self.resident):
            raise ValueError("placement 'local' keeps W_hh resident with block_k == block_h")


CHANCE_BITS = 24  # a probability is a whole number of 2^-24: what a mask's 24 random bits are compared with


@dataclass(frozen=True)
class Cell(_Encoded):
    """What the cell computes beyond the plain LSTM, but for what a given tensor says already (see
    `kernels.variants.Variants`).

    sampled: masks are drawn (training); else each is replaced by its mean.
    zoneout_h, zoneout_c: probability that a unit keeps its h, its c. recurrent_dropout: of dropping the new
        candidate g of a unit, at one step. variational_x, variational_h: of dropping an input of the layer, a unit
        of the h that its recurrent product reads, for a whole sequence. All in units of 2^-24, see `chance`.
    cell_clip, recurrent_grad_clip: bounds of |c|, and of the gradients of the pre-activations; 0 for none.
    coupled_gates: f = 1 - i.
    """

    sampled: bool = False
    zoneout_h: int = 0
    zoneout_c: int = 0
    recurrent_dropout: int = 0
    variational_x: int = 0
    variational_h: int = 0
    cell_clip: float = 0.0
    recurrent_grad_clip: float = 0.0
    coupled_gates: bool = False

    @property
    def draws(self) -> bool:
        """Whether a seed is needed."""
        masks = self.zoneout_h, self.zoneout_c, self.recurrent_dropout, self.variational_x, self.variational_h
        return self.sampled and any(masks)


PLAIN_CELL = Cell()


def chance(p: float) -> int:
    """The probability p in [0, 1) in units of 2^-24; never 1."""
    return min(round(p * 2**CHANCE_BITS), 2**CHANCE_BITS - 1)


@dataclass(frozen=True)
class Layout:
    """Sizes of a sequence batch and the order of its rows: row(t, b) = t * stride_t + b * stride_b."""

    batch: int
    seq_len: int
    batch_first: bool

    @property
    def rows(self) -> int:
        return self.batch * self.seq_len

    @property
    def stride_t(self) -> int:
        return 1 if self.batch_first else self.batch

    @property
    def stride_b(self) -> int:
        return self.seq_len if self.batch_first else 1
