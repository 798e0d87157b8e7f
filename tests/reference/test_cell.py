"""The cell's device functions, and the two specifications of its gradient against each other."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from engines import Engine
from layers import INPUTS, Case, by_reference

from lstm_triton.kernels.cell import sigmoid, tanh
from lstm_triton.reference import layer as reference

EPS = torch.finfo(torch.float32).eps


@triton.jit
def activations_kernel(x, s, t, n: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(s + i, sigmoid(value, EXACT))
    tl.store(t + i, tanh(value, EXACT))


def activations(engine: Engine, x: torch.Tensor, exact: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = torch.empty_like(x), torch.empty_like(x)
    with engine():
        activations_kernel[(1,)](x, s, t, x.numel(), exact)
    return s, t


@pytest.mark.every_target
@pytest.mark.parametrize("exact", [True, False])
def test_activations_are_safe_for_any_input(engine: Engine, exact: bool) -> None:
    x = torch.tensor([0.0, -0.0, 44.0, -44.0, 89.0, -89.0, 1e4, -1e4, 3e38, -3e38, float("inf"), -float("inf"), 1e-30, -1e-30, 0.5, -0.5])  # fmt: skip
    s, t = activations(engine, x, exact)
    # By one reciprocal, which may be off by a unit in the last place, a 1 may become a little more.
    torch.testing.assert_close(s, x.sigmoid())
    torch.testing.assert_close(t, x.tanh(), rtol=1e-5, atol=6e-8 if exact or not engine.compiled else 3e-7)
    assert (t.abs() <= (1 if exact or not engine.compiled else 1 + EPS)).all()


@pytest.mark.parametrize("exact", [True, False])
def test_nan_stays_nan(engine: Engine, exact: bool) -> None:
    s, t = activations(engine, torch.full((16,), float("nan")), exact)
    assert s.isnan().all()
    assert t.isnan().all()


@pytest.mark.every_target
def test_activations_are_as_accurate_as_pytorchs(engine: Engine) -> None:
    x = torch.linspace(-12, 12, 4096)
    truth = x.double()
    for ours, theirs, want in zip(activations(engine, x), (x.sigmoid(), x.tanh()), (truth.sigmoid(), truth.tanh())):
        assert (ours - want).abs().max() <= 2 * max((theirs - want).abs().max(), EPS / 2)


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.float64),
        Case(dtype=torch.float64, directions=2, lengths=True, reset=True, batch=6, batch_first=True),
    ],
    ids=["plain", "everything"],
)
def test_the_hand_written_backward_is_autograds(case: Case) -> None:
    v = case.tensors()
    options = dict(batch_first=case.batch_first, lengths=v["lengths"], reset=v["reset"])
    options["reset_state"] = (v["reset_h"], v["reset_c"]) if case.reset else None
    state = (v["h_0"], v["c_0"])
    out, _, _, saved = reference.layer_forward(v["x"], v["w_ih"], v["w_hh"], v["bias"], state, **options)
    grads = reference.layer_backward(
        v["dout"], v["dh_n"], v["dc_n"], saved, v["x"], v["w_ih"], v["w_hh"], out, state, **options
    )
    want = by_reference(case, torch.float64)
    for name in INPUTS:
        if v[name] is not None:
            torch.testing.assert_close(getattr(grads, name), want[f"d{name}"])


def test_the_reference_is_pytorchs_lstm() -> None:
    module = torch.nn.LSTM(5, 6, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    stack = [torch.stack([getattr(module, f"{n}_l0{s}") for s in ("", "_reverse")]) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
    out, h_n, c_n, _ = reference.layer_forward(x, stack[0], stack[1], stack[2] + stack[3])
    want, (h, c) = module(x)
    for a, b in ((out, want), (h_n, h), (c_n, c)):
        torch.testing.assert_close(a, b)
