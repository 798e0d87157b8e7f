"""A layer with random data, its fp64 truth, and PyTorch's own error on it: what kernels are held to.

Tolerance: a result of ours may be at most twice as far from the fp64 reference as plain PyTorch is
in the same type and precision, by the largest and by the rms error. PyTorch's error, relative to the result's
largest value, is the worst of DRAWS draws of the same layer: one draw of a maximum is mostly luck,
and with four it still depended on the processor's BLAS.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM
from lstm_triton.kernels import launch
from lstm_triton.kernels.backward import lstm_backward
from lstm_triton.kernels.config import PLAIN_CELL, Cell, Config
from lstm_triton.kernels.forward import lstm_forward
from lstm_triton.layer import backward as backward_pass
from lstm_triton.layer import forward as forward_pass
from lstm_triton.layer.backward import operand_of, product_of
from lstm_triton.layer.choice import Pass
from lstm_triton.layer.forward import marks_of, projected_input, variants_of
from lstm_triton.layer.records import DIFFERENTIABLE as INPUTS
from lstm_triton.layer.records import WEIGHTS, Inputs, Options
from lstm_triton.reference import layer as reference
from lstm_triton.reference.cell import CellWeights

DRAWS = 16
OUTPUTS = ("out", "h_n", "c_n")


@dataclass(frozen=True)
class Case:
    """Sizes and features of a layer; every tensor follows from them and the seed."""

    seq_len: int = 4
    batch: int = 3
    input_size: int = 5
    hidden_size: int = 20
    directions: int = 1
    dtype: torch.dtype = torch.float32
    batch_first: bool = False
    state: bool = True
    lengths: bool = False
    reset: bool = False
    cell: Cell = PLAIN_CELL
    peephole: bool = False
    norm: bool = False
    seed: int = 0

    def tensors(self) -> dict[str, Tensor | None]:
        """fp64 inputs whose values are exact in `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(self.dtype).double()

        steps = (self.batch, self.seq_len) if self.batch_first else (self.seq_len, self.batch)
        hidden, gates = self.hidden_size, 4 * self.hidden_size
        state = (self.directions, self.batch, hidden)
        given = {
            "x": draw(*steps, self.input_size),
            "w_ih": draw(self.directions, gates, self.input_size, scale=self.input_size**-0.5),
            "w_hh": draw(self.directions, gates, hidden, scale=hidden**-0.5),
            "bias": draw(self.directions, gates),
            "h_0": draw(*state) if self.state else None,
            "c_0": draw(*state) if self.state else None,
            "reset_h": draw(*state) if self.reset else None,
            "reset_c": draw(*state) if self.reset else None,
            "lengths": None,
            "reset": None,
            "peephole": draw(self.directions, 3, hidden) if self.peephole else None,
            "gain_ih": 1 + draw(self.directions, gates, scale=0.25) if self.norm else None,
            "gain_hh": 1 + draw(self.directions, gates, scale=0.25) if self.norm else None,
            "norm_c": draw(self.directions, 2, hidden) if self.norm else None,
            "seed": torch.full((self.directions,), 2**40 * self.seed + 1) if self.cell.draws else None,
        }
        if self.lengths:
            given["lengths"] = torch.randint(0, self.seq_len + 1, (self.batch,), generator=generator)
        if self.reset:
            given["reset"] = torch.rand(*steps, generator=generator) < 0.3
        for name, shape in (("out", (*steps, self.directions * hidden)), ("h_n", state), ("c_n", state)):
            given[f"d{name}"] = draw(*shape)
        return given


# Bits of an fp32 factor that do not count. TF32 holds 11 significant bits, and so does each of the two parts of tf32x3.
DROPPED_BITS = {"tf32": 13, "tf32x3": 2}


def to_tf32(x: Tensor, precision: str = "tf32") -> Tensor:
    """The nearest numbers that a factor can be, as cuBLAS and cuDNN have fp32 factors rounded for TF32."""
    bits, unit = x.contiguous().view(torch.int32), 1 << DROPPED_BITS[precision]
    return torch.where(x.isfinite(), ((bits + unit // 2) & -unit).view(torch.float32), x)


def truncated(x: Tensor) -> Tensor:
    """As NVIDIA's matrix unit takes what has not been rounded."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Tf32Products(TorchDispatchMode):
    """Products of matrices as a GPU has them: both factors rounded. But those with `w_hh`, if that is given, as our
    kernels have them for TF32: both truncated, and the sum `restored` times as long."""

    def __init__(self, precision: str = "tf32", w_hh: Tensor | None = None, restored: float = 1.0) -> None:
        super().__init__()
        self.precision, self.w_hh, self.restored = precision, w_hh, restored

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            assert "mm" not in func.name(), f"{func} is not rounded"
            return func(*args, **(kwargs or {}))
        if self.w_hh is None or all(factor.data_ptr() != self.w_hh.data_ptr() for factor in args):
            return func(*(to_tf32(factor, self.precision) for factor in args))
        return func(*(truncated(factor) for factor in args)) * self.restored


@lru_cache(maxsize=64)
def by_reference(
    case: Case, dtype: torch.dtype, precision: str = "ieee", restored: float | None = None
) -> dict[str, Tensor]:
    """Every output and gradient by plain PyTorch in `dtype`, gradients by autograd.

    precision: "ieee", or for float32 "tf32" as cuDNN has it (or, with `restored`, as our kernels have it), or "tf32x3".
    """
    given = case.tensors()
    leaves = {name: given[name].to(dtype).requires_grad_() for name in INPUTS if given[name] is not None}
    if precision in DROPPED_BITS:
        with Tf32Products(precision) if restored is None else Tf32Products(precision, leaves["w_hh"], restored):
            return _results(case, given, leaves, dtype)
    return _results(case, given, leaves, dtype)


def _results(
    case: Case, given: dict[str, Tensor | None], leaves: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    v = {name: leaves.get(name) for name in INPUTS}
    *outputs, _ = reference.layer_forward(
        v["x"],
        v["w_ih"],
        v["w_hh"],
        v["bias"],
        (v["h_0"], v["c_0"]) if case.state else None,
        batch_first=case.batch_first,
        lengths=given["lengths"],
        reset=given["reset"],
        reset_state=(v["reset_h"], v["reset_c"]) if case.reset else None,
        variants=CellWeights(case.cell, *(v[name] for name in WEIGHTS), given["seed"]),
    )
    cotangents = [given[f"d{name}"].to(dtype) for name in OUTPUTS]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = dict(zip(OUTPUTS, (output.detach() for output in outputs)))
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def arguments(
    case: Case, leaves: dict[str, Tensor], keep: str = "all", precision: str = "ieee", plan: str = ""
) -> tuple:
    """Of the operator, the differentiable ones being the leaves."""
    given = case.tensors()
    tensors = Inputs(**{name: leaves[name] if name in leaves else given[name] for name in Inputs._fields})
    cell = "" if case.cell == PLAIN_CELL else case.cell.encode()
    return (*tensors, case.batch_first, case.directions == 2, keep, False, precision, plan, cell)


def backward_of(config: Config) -> Config:
    """The config of the backward pass with the same tiles: `local` splits the depth by gates there."""
    return replace(config, split_k=4) if config.placement == "local" else config


def by_kernels(
    case: Case, forward: Config, backward: Config | None = None, precision: str = "ieee"
) -> dict[str, Tensor]:
    """The same by the operators, with these configs; the backward one by default with the forward one's tiles."""
    given = case.tensors()
    leaves = {name: given[name].to(case.dtype).requires_grad_() for name in INPUTS if given[name] is not None}
    plan = f"{forward.encode()}|{(backward or backward_of(forward)).encode()}"
    outputs = torch.ops.lstm_triton.layer(*arguments(case, leaves, "all", precision, plan))[:3]
    cotangents = [given[f"d{name}"].to(case.dtype) for name in OUTPUTS]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = dict(zip(OUTPUTS, (output.detach() for output in outputs)))
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Per result: the largest and the rms error, over the largest true value."""
    errors = {}
    for name, want in truth.items():
        error, scale = (results[name].double() - want).abs(), max(float(want.abs().max()), 1e-30)
        errors[name] = float(error.max()) / scale, float(error.square().mean().sqrt()) / scale
    return errors


@lru_cache(maxsize=64)
def torch_errors(case: Case, precision: str = "ieee") -> dict[str, tuple[float, float]]:
    """PyTorch's own relative errors on layers like this one; precision: "ieee" or, of float32, one of DROPPED_BITS."""
    # fp64 cannot be its own truth: there the error is fp32's, scaled by the types' precision.
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    draws = [replace(case, seed=seed, dtype=dtype) for seed in range(case.seed, case.seed + DRAWS)]
    errors = [
        relative_errors(by_reference(draw, dtype, precision), by_reference(draw, torch.float64)) for draw in draws
    ]
    scale = torch.finfo(case.dtype).eps / torch.finfo(dtype).eps
    return {name: tuple(scale * max(error[name][i] for error in errors) for i in (0, 1)) for name in errors[0]}


def assert_as_good_as_torch(ours: dict[str, Tensor], case: Case, precision: str = "ieee") -> None:
    """precision: of kernels that have been compiled for it; the interpreter knows none but "ieee"."""
    truth, own = by_reference(case, torch.float64), torch_errors(case, precision)
    assert ours.keys() == truth.keys()
    for name, (largest, rms) in relative_errors(ours, truth).items():
        assert torch.isfinite(ours[name]).all(), f"{name} is not finite"
        assert largest <= 2 * own[name][0], f"{name}: largest error {largest:.2e}, torch's {own[name][0]:.2e}"
        assert rms <= 2 * own[name][1], f"{name}: rms error {rms:.2e}, torch's {own[name][1]:.2e}"


def run_recurrence(case: Case, config: Config, run_forward=lstm_forward, run_backward=lstm_backward) -> list[Tensor]:
    """Only the two recurrences, by the launchers: out, h_n, c_n, dgates, dc_0, and gradients of variants."""
    given = {n: t.to(case.dtype) if t is not None and t.is_floating_point() else t for n, t in case.tensors().items()}
    v = Inputs(**{name: given[name] for name in Inputs._fields})
    order = "both" if case.directions == 2 else "forward"
    options = Options(case.batch_first, order, cell=case.cell)
    layout, gates, variants = options.layout(v.x), projected_input(v, options).contiguous(), variants_of(v, options)
    lengths, reset = marks_of(v, layout)
    state = (v.h_0, v.c_0) if case.state else None
    reset_state = (v.reset_h, v.reset_c) if case.reset else None
    out, h_n, c_n, cells, stats = run_forward(
        gates,
        v.w_hh,
        state,
        layout,
        config,
        "ieee",
        True,
        lengths=lengths,
        reset=reset,
        reset_state=reset_state,
        variants=variants,
    )
    product = None
    if case.norm:
        by_time = out.view(*v.x.shape[:2], -1)
        product = product_of(v, options, operand_of(v, options, variants, by_time))
    found = run_backward(
        given["dout"], given["dh_n"], given["dc_n"], gates, cells, v.w_hh, v.c_0,
        layout, backward_of(config), "ieee", lengths=lengths, reset=reset, reset_c=v.reset_c, variants=variants,
        product=product, stats=stats,
    )  # fmt: skip
    return [out, h_n, c_n, *(tensor for tensor in (*found[:2], *found[3:]) if tensor is not None)]


def argument(name: str, function: Any, *given: Any, **options: Any) -> Any:
    """What a call hands to the parameter of this name."""
    return inspect.signature(function).bind(*given, **options).arguments[name]


def use_configs(patch: pytest.MonkeyPatch, configs: Mapping[str, Config]) -> list[tuple[str, Config]]:
    """Layers take these configs, by pass; returned is a list that notes every (pass, config) that is then launched."""
    noted: list[tuple[str, Config]] = []
    # Each of the two modules has imported the name for itself.
    for module, which in ((forward_pass, "forward"), (backward_pass, "backward")):
        real = getattr(module, f"lstm_{which}")

        def noting(*given: Any, which: str = which, real: Any = real, **options: Any) -> Any:
            noted.append((which, argument("config", real, *given, **options)))
            return real(*given, **options)

        patch.setattr(module, "pass_of", lambda which, *_: Pass(configs[which], launch.run))
        patch.setattr(module, f"lstm_{which}", noting)
    return noted


def with_exact_products(module: torch.nn.Module, *shape: int) -> Tensor:
    """An input of such a shape, and weights W_ih and biases for it, set in the module, for the first layer.

    Each sum of products of the input is exact in every type, whatever its order: a GEMM has no choice, and what differs
    in a bit behind it differs in the kernels.
    """
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("weight_ih", "bias")):
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=drawn) / 16)
    assert (2 * shape[-1] + 4) <= 256, "sixteenths that bfloat16 holds"
    like = next(module.parameters())
    return torch.randint(-1, 2, shape, generator=drawn).to(like.device, like.dtype)


def assert_like(results: list[Tensor], want: list[Tensor], bits: int = 3) -> None:
    """The first ones, by default out, h_n and c_n, bit by bit; the rest have been through a GEMM of cuBLAS.

    Which of its algorithms runs depends on the workspace that there is: inside of a graph or on another stream it may
    be another one, whose sums are made in another order, and of slices rounded to the type. Neither is an error of ours.
    """
    for index, (a, b) in enumerate(zip(results, want, strict=True)):
        if index < bits:
            assert torch.equal(a, b), f"result {index}"
        else:
            few = 4 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=few, atol=few * float(b.detach().abs().max()))


NEAR = 1e-5  # of a clip's limit; far more than fp32 is off after a few steps


def away_from_clips(exact: LSTM, *shape: int, **marks: Tensor) -> Tensor:
    """A drawn fp32 input for which no cell state comes near the clip of this fp64 module on PyTorch's path.

    A clip's gradient jumps from 0 to 1 at the limit: a state that rounding moves across it changes the gradients of all
    steps before, and right code looks wrong. Which states are clipped is compared for limits a little lower and higher.
    """
    variant = exact.variant
    for seed in range(200):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(exact.weight_hh_l0.device)
        if variant.cell_clip is None:
            return x
        clipped = []
        try:
            for limit in (variant.cell_clip * (1 - NEAR), variant.cell_clip * (1 + NEAR)):
                exact.variant = replace(variant, cell_clip=limit)
                torch.manual_seed(1)  # the masks of other variants
                with torch.no_grad():
                    *_, states = exact(x.double(), return_states=("c",), **marks)
                clipped.append(tree_leaves(states)[0].abs() == limit)
        finally:
            exact.variant = variant
        assert clipped[0].any(), "else there is no clip to speak of"
        if torch.equal(*clipped):
            return x
    raise AssertionError("every draw has a cell state near the limit: the module is too large for this")
