"""Without the kernels: by aten where it can, else step by step in plain PyTorch; and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ..kernels.config import PLAIN_CELL, Cell, compute_dtype
from ..planning.device import on_gpu
from ..planning.route import warn_once_of_the_loop
from ..planning.transforms import transformed
from ..reference import layer as reference
from .records import DIFFERENTIABLE, Cotangents, Inputs, LayerResult, Options


def without_kernels(
    v: Inputs, batch_first: bool, bidirectional: bool, cell: Cell = PLAIN_CELL, training: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer by aten, or step by step where aten lacks something; as cuDNN has it, only `training` has a gradient."""
    directions = 2 if bidirectional else 1
    marked = v.lengths is not None or v.reset is not None or v.peephole is not None or v.gain_ih is not None
    if marked or cell != PLAIN_CELL or v.x.dim() == 4 or v.w_ih.shape[0] != directions:
        found = reference.ensemble_forward(v, batch_first=batch_first, bidirectional=bidirectional, cell=cell)
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()
    batch = v.x.shape[0] if batch_first else v.x.shape[1]
    zeros = v.x.new_zeros((directions, batch, v.w_hh.shape[2]))
    state = [zeros if tensor is None else tensor.to(v.x.dtype) for tensor in (v.h_0, v.c_0)]
    weights = []
    for index in range(directions):
        weights += [v.w_ih[index], v.w_hh[index]]
        if v.bias is not None:
            weights += [v.bias[index], torch.zeros_like(v.bias[index])]
    return torch._VF.lstm(v.x, state, weights, v.bias is not None, 1, 0.0, training, bidirectional, batch_first)


def layer_without_kernels(v: Inputs, options: Options) -> tuple[Tensor, ...]:
    """What `op.layer` gives. What is kept for the backward pass alone is empty: that computes everything again."""
    if options.keep.kind == "nothing":
        found = without_kernels(v, options.batch_first, options.bidirectional, options.cell)
        return *found, *(v.x.new_empty(0) for _ in range(3))
    return by_steps(v, options)


def by_steps(v: Inputs, options: Options, loop: Callable[..., Any] = reference._loop) -> tuple[Tensor, ...]:
    """The same by the specification. loop: over the steps."""
    kind, size = options.keep
    results = reference.ensemble_forward(
        v, batch_first=options.batch_first, bidirectional=options.bidirectional, cell=options.cell, loop=loop
    )
    out, h_n, c_n, gates, cells = (tensor.contiguous() for tensor in results)
    compute, nothing = compute_dtype(v.x.dtype), v.x.new_zeros(0)
    if kind == "nothing":
        return out, h_n, c_n, nothing, nothing.clone(), nothing.clone()
    if size:  # borders of windows
        layout = options.layout(v.x)
        at_h = h_n.new_zeros((-(-layout.seq_len // size), *h_n.shape))
        return out, h_n, c_n, at_h, at_h.to(compute, copy=True), nothing
    stats = nothing if v.gain_hh is None else v.x.new_zeros((*cells.shape[:2], 4), dtype=compute)
    return out, h_n, c_n, gates.flatten(2) if kind == "all" else nothing.clone(), cells, stats


class AtenOptions(NamedTuple):
    """Those of aten's lstm, in its order; of packed sequences it takes all but the last."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool


def stack_by_aten(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    options: AtenOptions,
    sizes: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """All plain layers at once. sizes: of the states, L * D, B, H or P, H."""
    hx = _zeros(input, sizes) if hx is None else hx
    return torch._VF.lstm(input, hx, list(weights), *options)


def _zeros(input: Tensor, sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    states, batch, out_size, hidden_size = sizes
    return input.new_zeros((states, batch, out_size)), input.new_zeros((states, batch, hidden_size))


def stack_by_packing(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    lengths: Tensor,
    options: AtenOptions,
    sizes: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`stack_by_aten` on rows that end at their lengths [B] int64; what stands beyond them is not read."""
    hx, batch_first = _zeros(input, sizes) if hx is None else hx, options.batch_first
    seq_len, empty = input.shape[1 if batch_first else 0], None
    ends = lengths.cpu()
    if torch.jit.is_tracing() or int(ends.min()) == 0:  # a packed row has a step at least
        empty, ends = lengths == 0, ends.clamp(min=1)
        of_rows = empty.view((-1, 1, 1) if batch_first else (1, -1, 1))
        input = input.masked_fill(of_rows, 0)
    packed = pack_padded_sequence(input, ends, batch_first, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    state = [each.index_select(1, order) for each in hx]
    data, h_n, c_n = torch._VF.lstm(packed.data, packed.batch_sizes, state, list(weights), *options[:-1])
    found = PackedSequence(data, packed.batch_sizes, order, back)
    out, _ = pad_packed_sequence(found, batch_first, total_length=seq_len)
    h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
    if empty is not None:
        out = out.masked_fill(of_rows, 0)
        h_n, c_n = (torch.where(empty.unsqueeze(-1), first, last) for first, last in zip(hx, (h_n, c_n)))
    return out, h_n, c_n


def layer_by_pytorch(
    v: Inputs, batch_first: bool, bidirectional: bool, cell: Cell, recompute: str, by_aten: bool
) -> LayerResult:
    """One layer by aten or step by step in plain PyTorch; whole once more in backward if anything is to be recomputed.

    (Not under torch.func's transforms, which do not go with the hooks that this takes.)
    """

    def run(*tensors):
        own = Inputs(*tensors)
        if by_aten:
            return (*without_kernels(own, batch_first, bidirectional, training=True), None, None)
        return reference.ensemble_forward(own, batch_first=batch_first, bidirectional=bidirectional, cell=cell)

    if recompute != "none" and not transformed():
        return LayerResult(*checkpoint(run, *v, use_reentrant=False))
    return LayerResult(*run(*v))


def gradients_with_a_graph(given: Cotangents, v: Inputs, options: Options, wanted: list[bool]) -> list[Tensor]:
    """The wanted gradients as functions that autograd can differentiate again: step by step."""
    if on_gpu(v.x.device):
        warn_once_of_the_loop("create_graph=True asks for derivatives of derivatives")
    if options.cell.recurrent_grad_clip:
        raise RuntimeError("recurrent_grad_clip has no second derivative: what it makes of a gradient is none itself")
    return _gradients(given, v, options, wanted, True)


def gradients_by_pytorch(given: Cotangents, v: Inputs, options: Options, wanted: list[bool]) -> list[Tensor]:
    """The wanted gradients where no config of the backward pass is left: step by step."""
    with torch.enable_grad():
        floating = {name: t for name, t in v._asdict().items() if t is not None and t.is_floating_point()}
        leaves = v._replace(**{name: tensor.detach().requires_grad_() for name, tensor in floating.items()})
        return _gradients(given, leaves, options, wanted, False)


def gradients_in_an_operator(given: Cotangents, v: Inputs, options: Options, wanted: list[bool]) -> list[Tensor]:
    """The same inside an operator, where nothing records gradients: in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(gradients_by_pytorch, given, v, options, wanted).result()
    return [gradient.contiguous() for gradient in found]


def _gradients(given: Cotangents, v: Inputs, options: Options, wanted: list[bool], create_graph: bool) -> list[Tensor]:
    results = reference.ensemble_forward(
        v, batch_first=options.batch_first, bidirectional=options.bidirectional, cell=options.cell
    )
    pairs = [(result, d.to(result.dtype)) for result, d in zip(results, given) if d is not None]
    asked = (getattr(v, name) for name, want in zip(DIFFERENTIABLE, wanted) if want)
    targets = [tensor for tensor in asked if tensor is not None]
    outputs, cotangents = [result for result, _ in pairs], [d for _, d in pairs]
    return list(torch.autograd.grad(outputs, targets, cotangents, create_graph=create_graph, materialize_grads=True))
