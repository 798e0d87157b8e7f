"""The options of a call of `lstm`, and what is decided by them and by the shapes, types and devices of its tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import PLAIN_CELL
from ..layer.eager import PLAIN_TYPES, nobody_observes
from ..layer.fallback import AtenOptions
from ..layer.records import Choices
from ..planning.memory import Memory
from ..planning.route import BACKENDS, PRECISIONS, Request, check_choice, kernel_hidden_size, kernel_refusal
from ..planning.transforms import autocast_is_on
from ..variant import Variant
from .checks import Sizes, State, check_call, check_recompute, check_states


class Marks(NamedTuple):
    """Where rows end and begin anew; see `lstm`."""

    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_state: State | None = None


class Stack(NamedTuple):
    """The options of `lstm`: how a stack is computed."""

    bias: bool
    num_layers: int
    proj_size: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    return_states: Sequence[str]
    recompute: str
    batch_invariant: bool
    variant: Variant
    backend: str
    precision: str
    plan: str = ""

    @property
    def sizes(self) -> Sizes:
        directions = 2 if self.bidirectional else 1
        return Sizes(self.num_layers * directions, directions, self.proj_size, self.bias, self.variant)

    @property
    def for_aten(self) -> AtenOptions:
        return AtenOptions(
            self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first
        )  # fmt: skip

    def check(self) -> None:
        """Raise what an option deserves that is none of its choices, or goes with no other."""
        check_choice("backend", self.backend, BACKENDS)
        if self.precision:
            check_choice("precision", self.precision, PRECISIONS)
        check_recompute(self.recompute)
        check_states(self.return_states, self.recompute)
        if not isinstance(self.variant, Variant):
            raise TypeError(f"variant should be a Variant, got {type(self.variant).__name__}")
        if self.proj_size:
            self.variant.check(self.proj_size)

    def choices(self, keep: str) -> Choices:
        """The operator's."""
        cell = self.variant.cell(self.training)
        text = "" if cell is PLAIN_CELL or cell == PLAIN_CELL else cell.encode()
        return Choices(
            self.batch_first, self.bidirectional, keep, self.batch_invariant, self.precision, self.plan, text
        )  # fmt: skip


class Decided(NamedTuple):
    """What calls of one signature have in common.

    refusal: why the kernels do not run, "" if they do. kind: one of `problem.KINDS`. padded: hidden units that the
    kernels compute with, H or more. layers: for the number of a layer and what is kept of it its choices and, if there
    is a signature, its memory.
    """

    sizes: Sizes
    hidden_size: int
    refusal: str
    kind: str
    padded: int
    layers: dict[tuple[int, str], tuple[Choices, Memory | None]]


def signature_of(
    input: Tensor, hx: State | None, weights: Sequence[Tensor | None], stack: Stack, marks: Marks
) -> Hashable | None:
    """What `decide` follows from; None where tensors are not what they seem, or somebody observes the call."""
    if not nobody_observes() or autocast_is_on(input.device.type):
        return None
    try:
        hash(stack)
    except TypeError:  # an option that is none
        return None
    of_tensors = _kinds((input, *weights)), _kinds(() if hx is None else hx), _kinds(marks[:2])
    of_state = _kinds(() if marks.reset_state is None else marks.reset_state)
    if None in of_tensors or of_state is None:
        return None
    return stack, torch.is_grad_enabled(), hx is None, *of_tensors, of_state


def _kinds(tensors: Iterable[Tensor | None]) -> tuple | None:
    found: list[Hashable] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in PLAIN_TYPES and not (tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested):
            found.append((tensor.shape, tensor.dtype, tensor.device))
        else:
            return None
    return tuple(found)


def decide(
    input: Tensor, hx: State | None, weights: Sequence[Tensor], stack: Stack, marks: Marks, refusal: str | None
) -> Decided:
    """Check a call but for its marks, and find out how it is computed. refusal: None if it is still to be asked for."""
    stack.check()
    variant, sizes = stack.variant, stack.sizes
    check_call(input, hx, weights, sizes, stack.batch_first)
    hidden_size, kind = weights[0].shape[0] // variant.gates, variant.kind(stack.training)
    dtype, device = str(input.dtype).removeprefix("torch."), input.device
    request = Request(
        stack.backend, device.type, device.index, dtype, stack.precision, hidden_size, sizes.directions, kind
    )
    if refusal is None:
        refusal = kernel_refusal(*request)
    if refusal and (stack.plan or stack.batch_invariant):
        given = "a plan was given" if stack.plan else "batch_invariant is asked for"
        raise RuntimeError(f"{given}, and the kernels do not run: {refusal}")
    padded = hidden_size
    if not refusal and kind == "plain" and not stack.plan and hidden_size * input.element_size() % 16:
        seq_len = input.shape[1 if stack.batch_first else 0]
        if seq_len > 1 or stack.batch_invariant:  # whose bits do not depend on where a sequence is cut
            padded = kernel_hidden_size(*request)
    return Decided(sizes, hidden_size, refusal, kind, padded, {})
