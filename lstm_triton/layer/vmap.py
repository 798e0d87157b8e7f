"""What `torch.func.vmap` makes of the operators.

Over weights: the members of an ensemble are further sets of weights, and run side by side in one launch, or in a few.
Over inputs or states alone: they are further rows of the batch. Over lengths or resets, and in backward passes: one
after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..planning.cost import microseconds_per_step
from ..planning.planner import NoPlan
from ..planning.precision import resolve_precision
from ..planning.problem import PASSES, Problem, ceil_div
from ..planning.route import kernel_device, plan_for
from . import op
from .choice import kind_of
from .records import OF_SETS, OF_WEIGHTS, Choices, Inputs, read

# For each of `Inputs` the axis that is mapped over, None for none: as vmap hands it over.
Dims = Sequence[int | None]


def _in_front(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    """[members, ...]: the mapped axis first, a view of all members where there is none."""
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one_by_one(run: Callable[..., Any], members: int, dims: Dims, arguments: tuple) -> tuple[Any, Any]:
    results = []
    for index in range(members):
        own = (value if dim is None else value.select(dim, index) for value, dim in zip(arguments, dims))
        results.append(run(*own))
    stacked = [torch.stack(each) for each in zip(*results)]
    if isinstance(results[0], tuple):
        return tuple(stacked), (0,) * len(stacked)
    return stacked, [0] * len(stacked)


@op.layer.register_vmap
def _(info, in_dims, *arguments):
    members, (dims, _), (v, choices) = (
        info.batch_size, read(in_dims, Inputs, Choices), read(arguments, Inputs, Choices)
    )  # fmt: skip
    if dims.lengths is not None or dims.reset is not None:
        return _one_by_one(torch.ops.lstm_triton.layer, members, in_dims, arguments)
    cell = choices.options().cell
    # Masks are drawn by the row of the batch: members of one seed share them only as sets of weights.
    if not cell.draws and all(getattr(dims, name) is None for name in OF_WEIGHTS):
        return _as_rows(members, dims, v, choices)
    if cell.sampled and cell.variational_x and dims.x is None:  # a mask of its own for every member
        v, dims = v._replace(x=v.x.expand(members, *v.x.shape)), dims._replace(x=0)
    return _as_sets(members, dims, v, choices)


def members_per_launch(members: int, sets: int, w_hh: Tensor, batch: int, precision: str, kind: str = "plain") -> int:
    """How many members of an ensemble go into one launch: more at a time is better until they crowd each other out.

    sets: of weights of each member. By the planner's estimate of both passes, in halves.
    """
    device = kernel_device(w_hh.device)
    if isinstance(device, NoPlan) or device.arch == "interpreter":
        return members
    dtype, precision = str(w_hh.dtype).removeprefix("torch."), resolve_precision(precision)

    def estimate(count: int) -> float:
        total = 0.0
        for which in PASSES:
            problem = Problem(which, w_hh.shape[-1], batch, count * sets, dtype, precision, kind)
            chosen = plan_for(problem, device)
            if isinstance(chosen, NoPlan):
                return math.inf
            total += microseconds_per_step(chosen.config, problem, device)
        return total * ceil_div(members, count)

    counts = [members]
    while counts[-1] > 1:
        counts.append(ceil_div(counts[-1], 2))
    return min(counts, key=estimate)  # the first, and so the largest, of equals


def _as_sets(members: int, dims: Any, v: Any, choices: Choices) -> tuple[tuple, tuple]:
    """All members in one launch, or group by group."""
    w_hh = v.w_hh if dims.w_hh is None else v.w_hh.select(dims.w_hh, 0)
    axis = 0 if choices.batch_first else 1
    batch = (v.x if dims.x is None else v.x.select(dims.x, 0)).shape[axis]
    kind = kind_of(v, choices.options().cell)
    sets, plan, precision = w_hh.shape[0], choices.plan, choices.precision
    count = members if plan else members_per_launch(members, sets, w_hh, batch, precision, kind)
    if count == members:
        return _one_launch(members, dims, v, choices)
    groups = []
    for start in range(0, members, count):
        size = min(count, members - start)
        of_group = {
            name: tensor if dim is None or tensor is None else tensor.narrow(dim, start, size)
            for (name, tensor), dim in zip(v._asdict().items(), dims)
        }
        groups.append(_one_launch(size, dims, v._replace(**of_group), choices))
    where = groups[0][1]
    results = [
        parts[0] if dim is None else torch.cat(parts, dim) for parts, dim in zip(zip(*(g for g, _ in groups)), where)
    ]
    return tuple(results), where


def _one_launch(members: int, dims: Any, v: Any, choices: Choices) -> tuple[tuple, tuple]:
    merged = {}
    for name in OF_SETS:
        tensor = getattr(v, name)
        merged[name] = None if tensor is None else _in_front(tensor, getattr(dims, name), members).flatten(0, 1)
    x = v.x
    inner = x.dim() - (dims.x is not None) == 4  # an ensemble in an ensemble: its x has members already
    if dims.x is not None or inner:
        x = _in_front(x, dims.x, members).movedim(0, 2)
        x = x.flatten(2, 3) if inner else x
    out, h_n, c_n, *states = torch.ops.lstm_triton.layer(*v._replace(**merged, x=x), *choices)
    sets = (members, -1)
    results: list[Tensor] = [out.unflatten(-1, sets), h_n.unflatten(0, sets), c_n.unflatten(0, sets)]
    where: list[int | None] = [2, 0, 0]
    for kept in states:
        results.append(kept.unflatten(1, sets) if kept.dim() > 1 else kept)
        where.append(1 if kept.dim() > 1 else None)
    return tuple(results), tuple(where)


def _as_rows(members: int, dims: Any, v: Any, choices: Choices) -> tuple[tuple, tuple]:
    batch_axis = 0 if choices.batch_first else 1
    axes = dict(x=batch_axis, reset=batch_axis, lengths=0, h_0=1, c_0=1, reset_h=1, reset_c=1)
    merged = {}
    for name, axis in axes.items():
        tensor = getattr(v, name)
        if tensor is not None:
            merged[name] = _in_front(tensor, getattr(dims, name), members).movedim(0, axis).flatten(axis, axis + 1)
    out, h_n, c_n, *states = torch.ops.lstm_triton.layer(*v._replace(**merged), *choices)
    rows = (members, -1)
    results: list[Tensor] = [out.unflatten(batch_axis, rows), h_n.unflatten(1, rows), c_n.unflatten(1, rows)]
    where: list[int | None] = [batch_axis, 1, 1]
    seq_len = out.shape[1 - batch_axis]
    for kept in states:
        if kept.dim() == 4:  # [windows, D, B, H]
            results.append(kept.unflatten(2, rows))
            where.append(2)
        elif kept.dim() == 3 and batch_axis == 0:  # rows (b, t)
            results.append(kept.unflatten(0, rows))
            where.append(0)
        elif kept.dim() == 3:  # rows (t, b)
            results.append(kept.unflatten(0, (seq_len, members, -1)).movedim(1, 0).flatten(1, 2))
            where.append(0)
        else:
            results.append(kept)
            where.append(None)
    return tuple(results), tuple(where)


@op.layer_backward.register_vmap
def _(info, in_dims, *arguments):
    # `wanted` is a list, and so is what in_dims says of it.
    dims = [None if isinstance(dim, (list, tuple)) else dim for dim in in_dims]
    return _one_by_one(torch.ops.lstm_triton.layer_backward, info.batch_size, dims, arguments)
