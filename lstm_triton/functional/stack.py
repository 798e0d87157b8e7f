"""The LSTM as a function of explicit weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer import eager, op
from ..layer import vmap as vmap  # registers what vmap makes of the operators
from ..layer.export import layer_for_onnx
from ..layer.fallback import layer_by_pytorch, stack_by_aten, stack_by_packing
from ..layer.records import Inputs, LayerResult
from ..planning.device import on_gpu
from ..planning.memory import Memory, memory
from ..planning.route import Unusable, has_kernels, log_once, warn_once_of_the_loop
from ..planning.settings import strict
from ..planning.transforms import (
    aten_can,
    autocast_is_on,
    exporting,
    needs_gradient,
    transformed,
    without_autocast,
)
from ..variant import PLAIN, Variant
from .checks import State, check_marks, reset_state_of
from .decision import Decided, Marks, Stack, decide, signature_of
from .padding import padded_layer
from .projection import projected_layer
from .weights import layer_weights

# T^2 * B * H up to which packing is trained faster than the loop over steps on a CPU: the gradient of a packed step is
# a tensor as large as the sequence. Both took as long at about T = 330 (B = 16, H = 32) and T = 75 (32, 256), on a core
# of an AMD EPYC.
MOST_PACKED = 50_000_000
KEEP = {"none": "all", "gates": "cells"}  # what the operator keeps for a recompute mode; "chunk:K" is both


class States(NamedTuple):
    """What `return_states` asks for, a tensor for each layer in [S] = [T, B] or [B, T]; None for the rest.

    c: cell states [S, D * H]; layers: outputs h [S, D * H], or P with projections, before dropout; gates: activated
    gates i, f, g, o [S, D, 4, H]. Steps beyond a row's length are 0. Gradients flow through all of them.
    """

    c: tuple[Tensor, ...] | None = None
    layers: tuple[Tensor, ...] | None = None
    gates: tuple[Tensor, ...] | None = None

    def map(self, change: Callable[[Tensor], Any]) -> States:
        """The same with every tensor changed."""
        return States(*(None if of_layers is None else tuple(map(change, of_layers)) for of_layers in self))


def lstm(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    proj_size: int = 0,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: State | None = None,
    return_states: Sequence[str] = (),
    recompute: str = "none",
    batch_invariant: bool = False,
    variant: Variant = PLAIN,
    backend: str = "auto",
    precision: str = "",
    plan: str = "",
) -> Any:
    """Run a stacked LSTM over a batch of sequences.

    Under `torch.func.vmap` over weights (and inputs, if they differ) the members of an ensemble run side by side in
    one launch, or in as few as the planner finds best for many large ones.

    Args:
        input: [T, B, input_size], or [B, T, input_size] with batch_first.
        hx: h_0 and c_0, [num_layers * D, B, H], of any floating types; None for zeros. c_0 is read in its own type.
        weights: per layer and direction weight_ih [4H, I], weight_hh [4H, H] and, with bias,
            bias_ih [4H], bias_hh [4H]; gate order i, f, g, o, as in `nn.LSTM._flat_weights`. With
            proj_size = P, weight_hh is [4H, P] and weight_hr [P, H] follows. Then those of the variant.
        proj_size: size of the projected h, 0 for none; H below is then P wherever h is meant.
        dropout: probability of dropping an output of every layer but the last, if `training`.
        training: whether masks are drawn, of dropout and of the variant; else each is replaced by its mean.
        lengths: [B] integers in [0, T], any order, on any device. A row stops at its length:
            outputs beyond it are 0, h_n and c_n are its last real ones, the reverse direction
            starts at its true end, and no gradient reaches the padding.
        reset: bool [T, B] (or [B, T]): before step t the state of a marked row becomes zero; with
            two directions the row is cut there into independent sequences.
        reset_state: h and c that a marked row takes in place of zeros, each [num_layers * D, H] for
            all rows (learnable: gradients sum over rows and resets) or [num_layers * D, B, H].
        return_states: any of "c", "layers" and "gates", to be returned for every step; see `States`.
        recompute: what the backward pass computes again in place of keeping it. "none"; "gates": the gates, by GEMMs
            over the sequence (kept: h and c of every step); "chunk:K": everything, K steps at a time (kept: h and c of
            every K-th step). On PyTorch's path either mode computes a whole layer again, and under torch.func's
            transforms nothing.
        batch_invariant: row i of every result and of the input's gradient has the same bits whatever the other rows
            are, how many there are, and (without projections) where a sequence is cut into calls. Slower; kernels
            only. c_n then comes in float32 for 16-bit types: give it to the next call as it is.
        variant: what the cell computes beyond the plain LSTM; see `Variant`.
        backend: "auto", "triton" or "torch"; "triton" raises where the kernels cannot run. "auto"
            takes the kernels wherever they run: that nn.LSTM is faster, as measured or predicted, counts
            for the module only, whose weights can lie as cuDNN wants them.
        precision: of float32 products on a GPU, "ieee", "tf32" or "tf32x3"; "" follows
            `torch.backends.cudnn`, as nn.LSTM does.
        plan: configs to use in place of the planner's; see `layer.op`.

    Returns:
        output [T, B, D * H] (or [B, T, D * H]), h_n and c_n [num_layers * D, B, H]; and `States` if asked for.

    Raises:
        RuntimeError: shapes that do not fit together, T = 0, tensors on different devices or of
            different types, or a path that cannot run.
        ValueError: an unknown or contradictory choice.
    """
    asked = return_states if isinstance(return_states, str) else tuple(return_states)
    stack = Stack(
        bias, num_layers, proj_size, dropout, training, bidirectional, batch_first, asked, recompute, batch_invariant,
        variant, backend, precision, plan,
    )  # fmt: skip
    return run_stack(input, hx, weights, stack, Marks(lengths, reset, reset_state))


def run_stack(
    input: Tensor, hx: State | None, weights: Sequence[Tensor], stack: Stack, marks: Marks, refusal: str | None = None
) -> Any:
    """`lstm` by records. refusal: why the kernels do not run, where the caller has asked; None to ask here."""
    signature = None if torch.compiler.is_compiling() else signature_of(input, hx, weights, stack, marks)
    if signature is not None:
        known = memory()
        decided = known.get(signature)
        if decided is None:
            decided = known[signature] = decide(input, hx, weights, stack, marks, refusal)
        return run_decided(decided, input, hx, weights, stack, marks, known=True)
    input, hx, marks, weights = _autocast(input, hx, marks, weights)
    decided = decide(input, hx, weights, stack, marks, refusal)
    return run_decided(decided, input, hx, weights, stack, marks, known=False)


def run_decided(
    decided: Decided,
    input: Tensor,
    hx: State | None,
    weights: Sequence[Tensor],
    stack: Stack,
    marks: Marks,
    known: bool,
) -> Any:
    """What has been decided of a call. known: for all calls of its signature."""
    sizes, hidden_size, refusal, kind, padded, layers = decided
    variant, batch_first, training, device = stack.variant, stack.batch_first, stack.training, input.device
    of_states = sizes.states, input.shape[0 if batch_first else 1], stack.proj_size or hidden_size, hidden_size
    reset_state = lengths = None
    if marks.lengths is not None or marks.reset is not None or marks.reset_state is not None:
        check_marks(input, batch_first, marks.lengths, marks.reset)
        reset_state, lengths = reset_state_of(marks.reset_state, marks.reset, input, of_states), marks.lengths
    if hx is not None:
        hx = hx[0].to(input.dtype), hx[1].to(input.dtype) if refusal else hx[1]
    if stack.recompute != "none" and not torch.is_grad_enabled():
        stack = stack._replace(recompute="none")  # there is no backward pass
    if variant.weight_dropout and training:
        weights = list(weights)
        for index in range(1, len(weights), len(sizes.names)):
            weights[index] = F.dropout(weights[index], variant.weight_dropout)
    by_aten = packs = False
    if refusal:
        packs = lengths is not None and _packs(input, hx, weights, decided, stack, marks)
        by_aten = kind == "plain" and lengths is None and marks.reset is None and not stack.return_states
        if by_aten and aten_can():
            if stack.recompute == "none":
                return stack_by_aten(input, hx, weights, stack.for_aten, of_states)
        elif on_gpu(device) and not packs:
            warn_once_of_the_loop(refusal)
    cell = variant.cell(training)
    seeds = None
    if cell.draws:  # on the device, for CUDA graphs; both directions of a layer have the same
        seeds = torch.randint(2**62, (stack.num_layers,), device=device).repeat_interleave(sizes.directions)
    if lengths is not None:
        lengths = lengths.to(device, torch.int64)  # once, for all layers and both passes
        if packs:
            return stack_by_packing(input, hx, weights, lengths, stack.for_aten, of_states)
        # Whatever stands in the padding, NaN included, must not reach a product.
        input = input.masked_fill(_padding(lengths, input, batch_first).unsqueeze(-1), 0)

    asked = stack.return_states

    def by_kernels(index: int, v: Inputs) -> LayerResult:
        which = index, _keep(v, stack)
        if which not in layers:
            layers[which] = stack.choices(which[1]), Memory() if known else None
        if torch.onnx.is_in_onnx_export() and exporting():
            return layer_for_onnx(v, layers[which][0])
        return eager.layer(v, *layers[which])

    # What a compiler traces would be as long as the sequence: the operator computes the same loop.
    traced = torch.compiler.is_compiling() and not exporting()
    opaque = traced and bool(refusal) and not by_aten and not has_kernels(device)

    def run(index: int, v: Inputs) -> LayerResult:
        if not refusal or opaque:
            try:
                if padded == hidden_size:
                    return by_kernels(index, v)
                return padded_layer(partial(by_kernels, index), v, padded, asked)
            except Unusable as error:  # a call like this one is refused from now on
                if stack.backend == "triton" or strict() or stack.plan or stack.batch_invariant:
                    raise
                log_once(str(error))
        with without_autocast(device.type):
            aten = by_aten and aten_can()
            return layer_by_pytorch(v, batch_first, stack.bidirectional, cell, stack.recompute, aten)

    results = []
    for index in range(stack.num_layers):
        of_layer = slice(index * sizes.directions, (index + 1) * sizes.directions)
        own, w_hr = layer_weights(weights, of_layer, sizes)
        (h_0, c_0), (reset_h, reset_c) = (
            (None, None) if pair is None else (pair[0][of_layer], pair[1][of_layer]) for pair in (hx, reset_state)
        )
        v = Inputs(
            x=input, **own, h_0=h_0, c_0=c_0, lengths=lengths, reset=marks.reset, reset_h=reset_h, reset_c=reset_c,
            seed=None if seeds is None else seeds[of_layer],
        )  # fmt: skip
        if w_hr is None:
            result = run(index, v)
        else:
            project = partial(op.linear, precision=stack.precision) if stack.batch_invariant else F.linear
            result = projected_layer(partial(run, index), v, w_hr, batch_first, project)
        results.append(result)
        input = result.out
        if stack.dropout and training and index < stack.num_layers - 1:
            input = F.dropout(input, stack.dropout)
    h_ns, c_ns = [result.h_n for result in results], [result.c_n for result in results]
    h_n, c_n = (torch.cat(each) if stack.num_layers > 1 else each[0] for each in (h_ns, c_ns))
    if not stack.return_states:
        return results[-1].out, h_n, c_n
    padding = None if lengths is None else _padding(lengths, input, batch_first)
    return results[-1].out, h_n, c_n, _asked_states(results, stack.return_states, sizes.directions, padding)


def _packs(
    input: Tensor, hx: State | None, weights: Sequence[Tensor], decided: Decided, stack: Stack, marks: Marks
) -> bool:
    """Whether rows of their own lengths, which the kernels do not run, are packed for PyTorch's own LSTM."""
    if decided.kind != "plain" or marks.reset is not None or stack.return_states or stack.recompute != "none":
        return False
    if torch.compiler.is_compiling() or exporting() or transformed() or not input.numel():
        return False
    if any(type(tensor) is not Tensor or tensor.is_meta for tensor in (input, marks.lengths)):
        return False  # there are no lengths to look at
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *(hx or ()), *weights))
    seq_len = input.shape[1 if stack.batch_first else 0]
    size = input.shape[0] * input.shape[1] * seq_len * decided.hidden_size
    return not trained or on_gpu(input.device) or size <= MOST_PACKED


def _keep(v: Inputs, stack: Stack) -> str:
    """What the operator is to keep: the backward pass's input only if there can be a backward pass."""
    if torch.is_grad_enabled() and any(tensor is not None and needs_gradient(tensor) for tensor in v):
        return KEEP.get(stack.recompute, stack.recompute)
    if "gates" in stack.return_states:
        return "all"
    return "cells" if "c" in stack.return_states else "nothing"


def _asked_states(results: list[LayerResult], asked: Sequence[str], directions: int, padding: Tensor | None) -> States:
    """The states of every layer, 0 in the padding."""

    def of_layers(kept: list[Tensor | None], *last: int) -> tuple[Tensor, ...]:
        """[rows, D, ...] of every layer as [S, *last]."""
        found = []
        for tensor, result in zip(kept, results):
            assert tensor is not None
            by_step = tensor.reshape(*result.out.shape[:2], *last)
            dims = (1,) * len(last)
            found.append(by_step if padding is None else by_step.masked_fill(padding.view(*padding.shape, *dims), 0))
        return tuple(found)

    hidden_size = results[0].c_n.shape[-1]
    return States(
        of_layers([result.cells for result in results], directions * hidden_size) if "c" in asked else None,
        tuple(result.out for result in results) if "layers" in asked else None,
        of_layers([result.gates for result in results], directions, 4, hidden_size) if "gates" in asked else None,
    )


def _autocast(
    input: Tensor, hx: State | None, marks: Marks, weights: Sequence[Tensor]
) -> tuple[Tensor, State | None, Marks, Sequence[Tensor]]:
    """Under autocast everything is computed in its type, as nn.LSTM does on a GPU; c keeps its own until it is read."""
    kind = input.device.type
    if input.dtype == torch.float64 or not autocast_is_on(kind):
        return input, hx, marks, weights
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), hx, marks, [weight.to(dtype) for weight in weights]


def _padding(lengths: Tensor, input: Tensor, batch_first: bool) -> Tensor:
    """bool [T, B] or [B, T]: steps beyond a row's length."""
    time = torch.arange(input.shape[1 if batch_first else 0], device=input.device)
    return time >= lengths.unsqueeze(1) if batch_first else time.unsqueeze(1) >= lengths
