"""One pass of a layer by given configs, on a tiny problem, beside plain PyTorch: is what was compiled right?

The tiny problem has the layer's shapes of weights, its options and the same optional inputs, so that the binary is the
one that the layer will run; only batch and sequence are short. Its numbers come from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from . import adjoint, layer, reference
from .kernels.config import Config
from .layer import DIFFERENTIABLE, OF_SETS, Cotangents, Inputs, Options

ROWS, STEPS = 3, 3
# How much further from the truth than PyTorch in the same type: what a compiler gets wrong is off by percents and more.
FACTOR = 4.0
# An error below one rounding of the type is luck. tf32 has 10 bits behind the point; three of its products have 21.
ROUNDING = {"tf32": 2.0**-11, "tf32x3": 2.0**-21}


class Incomparable(Exception):
    """Plain PyTorch cannot compute what a config is to be compared with: by some setting of the process."""


def complaint(
    which: str,
    forward: Config,
    backward: Config | None,
    v: Inputs,
    options: Options,
    save: bool,
    c_dtype: torch.dtype | None,
    given: Cotangents,
    wanted: Mapping[str, bool],
) -> str:
    """What is wrong with the results of a pass by these configs; "" if nothing is.

    given: tensors, or anything else but None, for the gradients that a backward pass gets. Raises what a launch raises,
    and Incomparable.
    """

    def compare() -> str:
        with torch.accelerator.device_index(v.x.device.index), torch.no_grad():
            tiny = _tiny(v, options)
            plan = f"{forward.encode()}|{(backward or forward).encode()}"
            ours_options = replace(options, plan=plan, time_begin=0)
            if which == "forward":
                return _compare_forward(tiny, ours_options, save, c_dtype)
            return _compare_backward(tiny, ours_options, given, wanted)

    # In a thread of its own: inside an operator nothing records gradients, and casts and modes may be active.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compare).result()


def _tiny(v: Inputs, options: Options) -> Inputs:
    """Random tensors, of the shapes and types of a layer's but for batch and sequence."""
    generator = torch.Generator(v.x.device).manual_seed(0)
    steps = min(STEPS, options.layout(v.x).seq_len)
    order = (ROWS, steps) if options.batch_first else (steps, ROWS)

    def draw(shape: tuple[int, ...], like: Tensor, scale: float, mean: float = 0.0) -> Tensor:
        found = torch.randn(shape, generator=generator, device=like.device) * scale + mean
        return found.to(like.dtype)

    def tensor_of(name: str, given: Tensor) -> Tensor:
        if name == "x":
            return draw((*order, *given.shape[2:]), given, 1.0)
        if name in ("w_ih", "w_hh"):
            return draw(tuple(given.shape), given, given.shape[-1] ** -0.5)
        if name in ("h_0", "c_0", "reset_h", "reset_c"):
            return draw((given.shape[0], ROWS, given.shape[2]), given, 0.5)
        if name == "lengths":
            return torch.tensor([steps, 1, max(steps - 1, 1)], device=given.device, dtype=given.dtype)
        if name == "reset":
            return torch.rand(order, generator=generator, device=given.device) < 0.4
        if name == "seed":
            return torch.arange(3, 3 + given.shape[0], device=given.device)
        return draw(tuple(given.shape), given, 0.1, mean=float(name.startswith(("gain", "norm"))))

    return v._replace(**{name: tensor_of(name, given) for name, given in v._asdict().items() if given is not None})


def _compare_forward(tiny: Inputs, options: Options, save: bool, c_dtype: torch.dtype | None) -> str:
    found = layer.forward(tiny, options, save, c_dtype)
    ours = [found.out, found.h_n, found.c_n]
    if save:
        assert found.gates is not None
        assert found.cells is not None
        ours += [_live(tensor, tiny, options) for tensor in (found.gates, found.cells)]
    own, truth = _in_both_types(lambda dtype: _by_pytorch(_as(tiny, dtype), options), tiny.x.dtype)
    names = ("out", "h_n", "c_n", "the gates", "the cells")
    return _worst(dict(zip(names, zip(ours, own, truth))), tiny.x.dtype, options.precision)


def _compare_backward(tiny: Inputs, options: Options, given: Cotangents, wanted: Mapping[str, bool]) -> str:
    asked = {name: wanted[name] and getattr(tiny, name) is not None for name in DIFFERENTIABLE}
    forward = layer.forward(tiny, options, True)
    assert forward.gates is not None
    assert forward.cells is not None
    generator = torch.Generator(tiny.x.device).manual_seed(1)

    def draw(one: Tensor | None, like: Tensor) -> Tensor | None:
        return None if one is None else torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)

    of_states = (draw(one, like) for one, like in zip(given[:3], (forward.out, forward.h_n, forward.c_n)))
    of_rows = (draw(one, like) for one, like in zip(given[3:], (forward.gates, forward.cells)))
    cotangents = Cotangents(*of_states, *(None if one is None else _live(one, tiny, options) for one in of_rows))
    kept = forward.out, forward.gates, forward.cells, forward.stats
    ours = adjoint.backward(tiny, options, *kept, cotangents, asked)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        v = _as(tiny, dtype)
        leaves = [getattr(v, name).requires_grad_() for name in DIFFERENTIABLE if asked[name]]
        with torch.enable_grad():
            pairs = [
                (result, cotangent.to(result.dtype))
                for result, cotangent in zip(_by_pytorch(v, options), cotangents)
                if cotangent is not None
            ]
            results, directions = zip(*pairs)
            return torch.autograd.grad(results, leaves, directions, materialize_grads=True)

    own, truth = _in_both_types(gradients, tiny.x.dtype)
    names = [name for name in DIFFERENTIABLE if asked[name]]
    compared = {f"the gradient of {n}": (ours[n], a, b) for n, a, b in zip(names, own, truth)}
    return _worst(compared, tiny.x.dtype, options.precision)


def _in_both_types(
    compute: Callable[[torch.dtype], tuple[Tensor, ...]], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """By PyTorch, in a type and in one that is far more precise."""
    try:
        return compute(dtype), compute(torch.float64 if dtype == torch.float32 else torch.float32)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Incomparable(f"{type(error).__name__}: {error}") from error


def _as(v: Inputs, dtype: torch.dtype) -> Inputs:
    """Copies in another type; what is not floating stays."""
    floating = {name: t for name, t in v._asdict().items() if t is not None and t.is_floating_point()}
    return v._replace(**{name: t.detach().to(dtype, copy=True) for name, t in floating.items()})


def _by_pytorch(v: Inputs, options: Options) -> tuple[Tensor, ...]:
    """out, h_n, c_n, gates and cells by the specification; the padding of the last two is 0."""
    sets, hidden_size = v.w_hh.shape[0], v.w_hh.shape[2]
    one_way = options.order == "reverse"  # to the specification the second of two directions, each with these weights
    if one_way:
        doubled = {name: getattr(v, name).repeat_interleave(2, 0) for name in OF_SETS if getattr(v, name) is not None}
        v = v._replace(**doubled)
    bidirectional = options.order != "forward"
    found = reference.ensemble_forward(
        *v, batch_first=options.batch_first, bidirectional=bidirectional, cell=options.cell
    )
    out, h_n, c_n, gates, cells = found
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


def _worst(compared: Mapping[str, tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, precision: str) -> str:
    """Of (ours, PyTorch's, the truth) by name, what is furthest beyond its limit in words; "" if nothing is."""
    unit = ROUNDING.get(precision, 0.0) if dtype == torch.float32 else 0.0
    unit = max(unit, torch.finfo(dtype).eps)
    sizes = torch.stack([
        torch.stack([_rms(ours.double() - truth.reshape(ours.shape)), _rms(own.double() - truth), _rms(truth.double())])
        for ours, own, truth in compared.values()
    ]).tolist()  # fmt: skip
    worst = ("", 1.0)
    for name, (error, theirs, size) in zip(compared, sizes):
        excess = error / (FACTOR * max(theirs, unit * size, torch.finfo(dtype).tiny))
        if not excess <= worst[1]:
            of_size = (
                f"by {error / size:.2g} of its size, PyTorch's is off by {theirs / size:.2g}" if size else "from 0"
            )
            worst = (f"wrong: {name} is off {of_size}", math.inf if math.isnan(excess) else excess)
    return worst[0]


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
