"""One pass of a layer by given configs, on a tiny problem, beside plain PyTorch: is what was compiled right?

The tiny problem has the layer's shapes of weights, its options and the same optional inputs, so that the binary is the
one that the layer will run; only batch and sequence are short. Its numbers come from generators of their own. PyTorch
computes on the CPU: its autograd would wait for the device's thread, which may be the one that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import Config
from ..planning.precision import matmul_precision
from ..reference import layer as reference
from . import backward as backward_pass
from . import forward as forward_pass
from .records import DIFFERENTIABLE, OF_SETS, Cotangents, Inputs, Kept, Options, Plans

ROWS, STEPS = 3, 3
# How far off a result may be: as a part of its size, and in units of what one rounding of every input changes in it,
# which counts wherever a result hangs on the last digits (clips, normalised differences). What a compiler gets wrong is
# off by more, whatever the numbers: only what is wrong for all SEEDS is a complaint.
PART, FACTOR, SEEDS = 1 / 32, 16.0, 3
ROUNDING = {"tf32": 2.0**-11, "tf32x3": 2.0**-21}


class Incomparable(Exception):
    """Plain PyTorch cannot compute what a config is to be compared with: by some setting of the process."""


class Pass(NamedTuple):
    """One pass of a layer that is about to run.

    save, c_dtype: of a forward pass, what it keeps and the type of c_n. given: gradients that a backward pass gets, of
    which the types count. wanted: gradients that are asked of it.
    """

    which: str
    v: Inputs
    options: Options
    save: bool = True
    c_dtype: torch.dtype | None = None
    given: Cotangents = Cotangents(None, None, None)
    wanted: Mapping[str, bool] = MappingProxyType({})


def complaint(one: Pass, forward: Config, backward: Config | None) -> str:
    """What is wrong with the results of a pass by these configs; "" if nothing is.

    Raises what a launch raises, and Incomparable.
    """
    ours, device = replace(one.options, plans=Plans(forward, backward), time_begin=0), one.v.x.device

    def compare(seed: int) -> str:
        guard = torch.accelerator.device_index(device.index)
        with guard, torch.no_grad(), matmul_precision(one.v.x.dtype, ours.precision):
            tiny = _tiny(one.v, ours, seed)
            if one.which == "forward":
                return _compare_forward(tiny, ours, device, one.save, one.c_dtype)
            return _compare_backward(tiny, ours, device, one.given, one.wanted)

    # In a thread of its own: inside an operator nothing records gradients, and casts and modes may be active.
    found = ""
    with ThreadPoolExecutor(1) as thread:
        for seed in range(SEEDS):
            found = thread.submit(compare, seed).result()
            if not found:
                return ""
    return found


def _tiny(v: Inputs, options: Options, seed: int) -> Inputs:
    """Random tensors on the CPU, of the shapes and types of a layer's but for batch and sequence."""
    generator = torch.Generator("cpu").manual_seed(seed)
    steps = min(STEPS, options.layout(v.x).seq_len)
    order = (ROWS, steps) if options.batch_first else (steps, ROWS)

    def draw(shape: tuple[int, ...], like: Tensor, scale: float, mean: float = 0.0) -> Tensor:
        found = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * scale + mean
        return found.to(like.dtype)

    def tensor_of(name: str, given: Tensor) -> Tensor:
        if name == "x":
            return draw((*order, *given.shape[2:]), given, 1.0)
        if name in ("w_ih", "w_hh"):
            return draw(tuple(given.shape), given, max(given.shape[-1], 1) ** -0.5)
        if name in ("h_0", "c_0", "reset_h", "reset_c"):
            return draw((given.shape[0], ROWS, given.shape[2]), given, 0.5)
        if name == "lengths":
            return torch.tensor([steps, 1, max(steps - 1, 1)], device="cpu", dtype=given.dtype)
        if name == "reset":
            return torch.rand(order, generator=generator, device="cpu") < 0.4
        if name == "seed":
            return torch.arange(3 + seed, 3 + seed + given.shape[0], device="cpu")
        return draw(tuple(given.shape), given, 0.1, mean=float(name.startswith(("gain", "norm"))))

    return v._replace(**{name: tensor_of(name, given) for name, given in v._asdict().items() if given is not None})


def _moved(v: Inputs, device: torch.device) -> Inputs:
    return Inputs(*(None if tensor is None else tensor.to(device) for tensor in v))  # type: ignore[arg-type]


def _compare_forward(
    tiny: Inputs, options: Options, device: torch.device, save: bool, c_dtype: torch.dtype | None
) -> str:
    found = forward_pass.forward(_moved(tiny, device), options, save, c_dtype)
    ours = [found.out, found.h_n, found.c_n]
    if save:
        assert found.gates is not None
        assert found.cells is not None
        ours += [_live(tensor.cpu(), tiny, options) for tensor in (found.gates, found.cells)]
    names = ("out", "h_n", "c_n", "the gates", "the cells")
    return _worst(dict(zip(names, ours)), lambda v: _by_pytorch(v, options), tiny, options.precision)


def _compare_backward(
    tiny: Inputs, options: Options, device: torch.device, given: Cotangents, wanted: Mapping[str, bool]
) -> str:
    names = [name for name in DIFFERENTIABLE if wanted[name] and getattr(tiny, name) is not None]
    asked = {name: name in names for name in DIFFERENTIABLE}
    there = _moved(tiny, device)
    forward = forward_pass.forward(there, options, True)
    assert forward.gates is not None
    assert forward.cells is not None
    generator = torch.Generator("cpu").manual_seed(SEEDS)

    def draw(one: Tensor | None, like: Tensor) -> Tensor | None:
        return None if one is None else torch.randn(like.shape, generator=generator, device="cpu").to(one.dtype)

    of_states = (draw(one, like) for one, like in zip(given[:3], (forward.out, forward.h_n, forward.c_n)))
    of_rows = (draw(one, like) for one, like in zip(given[3:], (forward.gates, forward.cells)))
    cotangents = Cotangents(*of_states, *(None if one is None else _live(one, tiny, options) for one in of_rows))
    on_device = Cotangents(*(None if one is None else one.to(device) for one in cotangents))
    kept = Kept(forward.out, forward.gates, forward.cells, forward.stats)
    ours = backward_pass.backward(there, options, kept, on_device, asked)

    def gradients(v: Inputs) -> tuple[Tensor, ...]:
        leaves = [getattr(v, name).requires_grad_() for name in names]
        with torch.enable_grad():
            pairs = [
                (result, cotangent.to(result.dtype))
                for result, cotangent in zip(_by_pytorch(v, options), cotangents)
                if cotangent is not None
            ]
            results, directions = zip(*pairs)
            return torch.autograd.grad(results, leaves, directions, materialize_grads=True)

    return _worst({f"the gradient of {n}": ours[n] for n in names}, gradients, tiny, options.precision)


def _by_pytorch(v: Inputs, options: Options) -> tuple[Tensor, ...]:
    """out, h_n, c_n, gates and cells by the specification; the padding of the last two is 0."""
    sets, hidden_size = v.w_hh.shape[0], v.w_hh.shape[2]
    one_way = options.order == "reverse"  # to the specification the second of two directions, each with these weights
    if one_way:
        doubled = {name: getattr(v, name).repeat_interleave(2, 0) for name in OF_SETS if getattr(v, name) is not None}
        v = v._replace(**doubled)
    bidirectional = options.order != "forward"
    out, h_n, c_n, gates, cells = reference.ensemble_forward(
        v, batch_first=options.batch_first, bidirectional=bidirectional, cell=options.cell
    )
    if one_way:
        out = out.unflatten(-1, (2 * sets, hidden_size))[:, :, 1::2].flatten(2)
        h_n, c_n, gates, cells = h_n[1::2], c_n[1::2], gates[:, 1::2], cells[:, 1::2]
    return out, h_n, c_n, *(_live(tensor.flatten(2), v, options) for tensor in (gates, cells))


def _live(by_row: Tensor, v: Inputs, options: Options) -> Tensor:
    """[rows, ...] with 0 beyond the rows' lengths, where anything may stand."""
    if v.lengths is None:
        return by_row
    layout = options.layout(v.x)
    live = torch.arange(layout.seq_len, device=v.x.device).unsqueeze(1) < v.lengths
    live = (live.t() if options.batch_first else live).reshape(-1, *(1,) * (by_row.dim() - 1))
    return torch.where(live, by_row, 0)


def _worst(
    ours: Mapping[str, Tensor], specification: Callable[[Inputs], tuple[Tensor, ...]], tiny: Inputs, precision: str
) -> str:
    """What of our results is furthest beyond its limit, in words; "" if nothing is."""
    dtype = tiny.x.dtype
    unit = max(ROUNDING.get(precision, 0.0) if dtype == torch.float32 else 0.0, torch.finfo(dtype).eps / 2)
    precise = torch.float64 if dtype == torch.float32 else torch.float32
    try:
        truth, moved = (specification(_as(tiny, precise, off)) for off in (0.0, unit))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Incomparable(f"{type(error).__name__}: {error}") from error
    worst, found = 1.0, ""
    for (name, result), want, other in zip(ours.items(), truth, moved):
        size, off = _rms(want), _rms(result.cpu().to(precise) - want.reshape(result.shape))
        limit = max(PART * size, FACTOR * _rms(other - want), unit)
        if not off <= limit * worst:
            worst, found = off / limit, f"wrong: {name} is off by {off:.2g}, where its size is {size:.2g}"
    return found


def _as(v: Inputs, dtype: torch.dtype, off: float) -> Inputs:
    """Copies in another type, numbers off by up to so much of themselves, rows alike; what is not floating stays."""
    generator = torch.Generator("cpu").manual_seed(SEEDS)

    def copy(tensor: Tensor) -> Tensor:
        found = tensor.detach().to(dtype, copy=True)
        if off:
            found *= 1 + off * (2 * torch.rand((*found.shape[:-1], 1), generator=generator, device="cpu") - 1)
        return found

    floating = {name: t for name, t in v._asdict().items() if t is not None and t.is_floating_point()}
    return v._replace(**{name: copy(tensor) for name, tensor in floating.items()})


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
