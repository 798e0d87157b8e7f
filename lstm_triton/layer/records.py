"""What a layer is given and what it gives: the records that the operators, their rules and both passes share.

An operator's arguments are the fields of some records, one after the other: `schema_of` makes its schema of them, and
`read` makes them of its arguments. Shapes are those of `op.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..kernels.config import PLAIN_CELL, Cell, Config, Layout, compute_dtype
from ..kernels.matmul import matmul
from ..planning.precision import resolve_precision
from ..reference.layer import Inputs as Inputs

OF_THE_CALL = ("lengths", "reset", "seed")  # have no gradient
STATES = ("h_0", "c_0", "reset_h", "reset_c")
DIFFERENTIABLE = tuple(name for name in Inputs._fields if name not in OF_THE_CALL)
OF_SETS = tuple(n for n in Inputs._fields if n not in ("x", "lengths", "reset"))  # their first axis counts the sets
OF_WEIGHTS = tuple(name for name in DIFFERENTIABLE if name not in ("x", *STATES))
WEIGHTS = OF_WEIGHTS[3:]  # of the variants of the cell


class Choices(NamedTuple):
    """How an operator is called, in types that its schema knows; see `op.py`. Inside they are `Options`."""

    batch_first: bool = False
    bidirectional: bool = False
    keep: str = "nothing"
    batch_invariant: bool = False
    precision: str = ""
    plan: str = ""
    cell: str = ""

    def options(self) -> Options:
        """What they say; ValueError for a text that says nothing. The precision is that of the moment."""
        return _options(self, resolve_precision(self.precision))


class Kept(NamedTuple):
    """What a forward pass leaves for the backward one: out, and what `keep` says.

    Activated gates, cells and moments; or with "chunk:K" in place of the first two h and c entering each window.
    """

    out: Tensor
    gates: Tensor
    cells: Tensor
    stats: Tensor | None


class Results(NamedTuple):
    """Of a forward pass: out [S, D * H], h_n, c_n, gates (activated if kept, else spent or None), and what is kept."""

    out: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor | None
    cells: Tensor | None
    stats: Tensor | None


class Cotangents(NamedTuple):
    """Gradients of the operator's outputs; None is zero."""

    out: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    gates: Tensor | None = None
    cells: Tensor | None = None


class LayerResult(NamedTuple):
    """What one layer gives: out [S, D * H], h_n and c_n [D, B, H], and states that were kept, if any (see `op`)."""

    out: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor | None
    cells: Tensor | None


class Keep(NamedTuple):
    """kind: "nothing", "all", "cells" or "chunk"; size: steps of a window of the last, 0 for the others."""

    kind: str
    size: int = 0


NOTHING = Keep("nothing")


class Plans(NamedTuple):
    """Configs that an argument gives; None for one that it does not."""

    forward: Config
    backward: Config | None


@dataclass(frozen=True)
class Options:
    """How a layer is computed.

    order: which sets of weights run in reverse, "forward", "reverse" or "both". precision: "ieee", "tf32" or "tf32x3".
    plans: None for the planner's choice. time_begin: time of the first step, where this is a window of a longer
    sequence.
    """

    batch_first: bool = False
    order: str = "forward"
    keep: Keep = NOTHING
    batch_invariant: bool = False
    precision: str = "ieee"
    plans: Plans | None = None
    cell: Cell = PLAIN_CELL
    time_begin: int = 0

    @property
    def bidirectional(self) -> bool:
        """Whether every second set of weights runs in reverse."""
        return self.order == "both"

    def layout(self, x: Tensor) -> Layout:
        batch, seq_len = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        return Layout(batch, seq_len, self.batch_first)

    def c_dtype(self, x: Tensor) -> torch.dtype:
        """Of c_n."""
        return compute_dtype(x.dtype) if self.batch_invariant else x.dtype

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a [D, M, K] @ b [D, K, N], or both without D."""
        if not self.batch_invariant:
            return a @ b
        if a.dim() == 2:
            return matmul(a, b, None, self.precision)
        return torch.stack([matmul(one, other, None, self.precision) for one, other in zip(a, b)])


@lru_cache(maxsize=1024)
def _options(choices: Choices, precision: str) -> Options:
    return Options(
        choices.batch_first,
        "both" if choices.bidirectional else "forward",
        keep_of(choices.keep),
        choices.batch_invariant,
        precision,
        plans_of(choices.plan),
        Cell.decode(choices.cell) if choices.cell else PLAIN_CELL,
    )


def keep_of(text: str) -> Keep:
    kind, colon, size = text.partition(":")
    if not colon and kind in ("nothing", "all", "cells"):
        return Keep(kind)
    if kind != "chunk" or not size.isdecimal() or int(size) == 0:
        raise ValueError(f"keep should be one of 'nothing', 'all', 'cells' or 'chunk:K', got: {text!r}")
    return Keep(kind, int(size))


def plans_of(text: str) -> Plans | None:
    """The configs of a text; that of one step in one launch ("single") may come without a backward one."""
    if not text:
        return None
    texts = text.split("|")
    if len(texts) != 2 and not (len(texts) == 1 and "placement=single" in text):
        raise ValueError(f"a plan is two configs with a | between them, got {text!r}")
    configs = [Config.decode(one) for one in texts]
    return Plans(configs[0], configs[1] if len(configs) > 1 else None)


def read(arguments: Sequence[Any], *records: Any) -> tuple[Any, ...]:
    """An operator's arguments as these records, and what follows them one by one."""
    found, at = [], 0
    for record in records:
        found.append(record(*arguments[at : at + len(record._fields)]))
        at += len(record._fields)
    return (*found, *arguments[at:])


_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", str: "str", list[bool]: "bool[]"}


def schema_of(record: Any, prefix: str = "") -> list[str]:
    """The arguments that a record's fields are in the schema of an operator."""
    return [f"{_SCHEMA[hint]} {prefix}{name}" for name, hint in get_type_hints(record).items()]
