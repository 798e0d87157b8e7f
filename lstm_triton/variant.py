"""The variants of the cell as a user asks for them: checked, with their weights and what the kernels make of them."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .kernels.config import PLAIN_CELL, Cell, chance

PEEPHOLES = "ifo"


@dataclass(frozen=True)
class Variant:
    """What an LSTM computes beyond the plain cell; `reference/cell.py` has the formulas, with their sources.

    Args:
        peephole: True, or the gates among "ifo" that see the cell state. Weights: weight_ch, H for each of them in
            that order. True is all gates that there are: "io" with coupled gates.
        layer_norm: of both products and of c_t. Weights: gain_ih and gain_hh, one for each row of weight_ih, gain_c
            [H] and, with bias, bias_c [H]; bias_ih and bias_hh are the biases of the other two.
        zoneout: (p_h, p_c), the probabilities that a unit keeps its h and its c at a step.
        recurrent_dropout: probability of dropping a unit's new candidate g at a step.
        variational_dropout: (p_x, p_h) or one for both: probabilities of dropping an element of every layer's input,
            and of the h that its recurrent product reads, for a whole sequence.
        weight_dropout: probability of dropping an element of weight_hh (Merity et al., 2018), at every call.
        coupled_gates: f = 1 - i. All weights of gates then have 3H rows: i, g, o.
        cell_clip: bound of |c_t|. recurrent_grad_clip: bound of the gradients of the pre-activations. None for none.

    Raises:
        ValueError: a probability outside [0, 1), a bound that is not positive, or variants that contradict each other.
        TypeError: a value of another type.
    """

    peephole: bool | str = False
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    variational_dropout: float | tuple[float, float] = (0.0, 0.0)
    weight_dropout: float = 0.0
    coupled_gates: bool = False
    cell_clip: float | None = None
    recurrent_grad_clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("layer_norm", "coupled_gates"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} should be a bool, got: {getattr(self, name)!r}")
        if not isinstance(self.zoneout, (tuple, list)):
            raise TypeError(f"zoneout is a pair (p_h, p_c), got: {self.zoneout!r}")
        variational = self.variational_dropout
        if not isinstance(variational, (tuple, list)):
            variational = (variational, variational)
        pairs = {"zoneout": self.zoneout, "variational_dropout": variational}
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(f"{name} is a pair of probabilities, got: {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(_probability(name, p) for p in pair))
        for name in ("recurrent_dropout", "weight_dropout"):
            object.__setattr__(self, name, _probability(name, getattr(self, name)))
        for name in ("cell_clip", "recurrent_grad_clip"):
            bound = getattr(self, name)
            if bound is not None and not (is_number(bound) and 0 < bound < float("inf")):
                error = ValueError if is_number(bound) else TypeError
                raise error(f"{name} should be a positive number or None, got: {bound!r}")
            object.__setattr__(self, name, None if bound is None else float(bound))
        object.__setattr__(self, "peephole", self._peepholes())

    def _peepholes(self) -> str:
        gates = "io" if self.coupled_gates else PEEPHOLES
        if isinstance(self.peephole, bool):
            return gates if self.peephole else ""
        if not isinstance(self.peephole, str):
            raise TypeError(f"peephole should be a bool or gates among {PEEPHOLES!r}, got: {self.peephole!r}")
        asked = "".join(gate for gate in PEEPHOLES if gate in self.peephole)
        if sorted(asked) != sorted(self.peephole):
            raise ValueError(f"peephole takes gates among {PEEPHOLES!r}, each once, got: {self.peephole!r}")
        if self.coupled_gates and "f" in asked:
            raise ValueError("coupled gates have no forget gate of their own (f = 1 - i) that could have a peephole")
        return asked

    def check(self, proj_size: int) -> None:
        """Raise the ValueError of a variant that does not go with projected h."""
        zoned_h, dropped_h = self.zoneout[0], self.variational_dropout[1]  # type: ignore[index]
        for name, asked in (
            ("layer_norm", self.layer_norm),
            ("zoneout of h", zoned_h),
            ("variational_dropout of h", dropped_h),
        ):
            if proj_size and asked:
                raise ValueError(
                    f"{name} is not supported with proj_size: the recurrence runs over h before its projection, "
                    "with W_hh W_hr as its weights"
                )

    @property
    def gates(self) -> int:
        return 3 if self.coupled_gates else 4

    def weights(self, hidden_size: int, bias: bool) -> dict[str, tuple[int]]:
        """Names, without layer and direction, and shapes of the weights that the plain LSTM has not, in order."""
        shapes: dict[str, tuple[int]] = {}
        if self.peephole:
            shapes["weight_ch"] = (len(self.peephole) * hidden_size,)  # type: ignore[arg-type]
        if self.layer_norm:
            shapes |= {"gain_ih": (self.gates * hidden_size,), "gain_hh": (self.gates * hidden_size,)}
            shapes |= {"gain_c": (hidden_size,)} | ({"bias_c": (hidden_size,)} if bias else {})
        return shapes

    def cell(self, training: bool) -> Cell:
        """For the kernels; the plain cell's where nothing changes it (weight_dropout does not, it changes weights)."""
        if self is PLAIN:  # that of most calls, which ask several times
            return PLAIN_CELL
        make = _cell.__wrapped__ if torch.compiler.is_compiling() else _cell  # Dynamo warns of caches
        return make(self, training, torch.is_grad_enabled())

    def kind(self, training: bool) -> str:
        """What the planner wants to know: one of `problem.KINDS`."""
        if self is PLAIN:
            return "plain"
        plain = self.cell(training) == PLAIN_CELL and not self.peephole
        if self.layer_norm:
            return "norm" if plain else "norm+"
        return "plain" if plain else "variant"

    def asked(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        plain = Variant()
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)}

    def four_gates(self, tensor: Tensor) -> Tensor:
        """A weight of gates [3H or 4H, ...] with rows for all four: zeros for the forget gate that is coupled."""
        if not self.coupled_gates:
            return tensor
        i, g, o = tensor.chunk(3)
        return torch.cat((i, torch.zeros_like(i), g, o))

    def three_peepholes(self, weight: Tensor) -> Tensor:
        """weight_ch -> [3, H], zeros where there is no peephole."""
        assert isinstance(self.peephole, str)
        rows = dict(zip(self.peephole, weight.chunk(len(self.peephole))))
        nothing = torch.zeros_like(next(iter(rows.values())))
        return torch.stack([rows.get(gate, nothing) for gate in PEEPHOLES])


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _probability(name: str, p: Any) -> float:
    if not is_number(p):
        raise TypeError(f"{name} should be a number in [0, 1), got: {p!r}")
    if not 0 <= p < 1:
        raise ValueError(f"{name} should be a probability in [0, 1), got: {p!r}")
    return float(p)


@lru_cache(maxsize=1024)  # every call asks several times
def _cell(variant: Variant, training: bool, gradient: bool) -> Cell:
    x, h = variant.variational_dropout  # type: ignore[misc]
    p_h, p_c = variant.zoneout
    return Cell(
        sampled=training and bool(p_h or p_c or variant.recurrent_dropout or x or h),
        zoneout_h=chance(p_h),
        zoneout_c=chance(p_c),
        recurrent_dropout=chance(variant.recurrent_dropout) if training else 0,
        variational_x=chance(x) if training else 0,
        variational_h=chance(h) if training else 0,
        cell_clip=variant.cell_clip or 0.0,
        recurrent_grad_clip=(variant.recurrent_grad_clip or 0.0) if gradient else 0.0,
        coupled_gates=variant.coupled_gates,
    )


PLAIN = Variant()
