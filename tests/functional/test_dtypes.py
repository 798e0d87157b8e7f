"""Which type goes in, what is computed in, what comes out: the README's table, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lstm_triton import LSTM, LSTMCell

BACKENDS = ["auto", "triton"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# parameters, input, h_0 and c_0, autocast (None for off) -> output and states
TABLE = [
    (torch.float32, torch.float32, None, None, torch.float32),
    (torch.float16, torch.float16, None, None, torch.float16),
    (torch.float64, torch.float64, None, None, torch.float64),
    (torch.float32, torch.float32, torch.float16, None, torch.float32),
    (torch.float32, torch.float32, torch.float64, None, torch.float32),
    (torch.float16, torch.float16, torch.float32, None, torch.float16),
    (torch.float32, torch.float32, None, torch.float16, torch.float16),
    (torch.float32, torch.float16, None, torch.float16, torch.float16),
    (torch.float16, torch.float32, torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float64, torch.float16, torch.float16),
    (torch.float64, torch.float64, None, torch.float16, torch.float64),
]


@pytest.mark.parametrize(("parameters", "given", "state", "autocast", "output"), TABLE, ids=str)
def test_the_table(parameters, given, state, autocast, output) -> None:
    """On the kernels; gradients come in the type of what they are of."""
    module = LSTM(4, 5, 2, bidirectional=True, backend="triton", precision="ieee").to(parameters)
    x = torch.randn(3, 2, 4).to(given).requires_grad_()
    hx = None if state is None else tuple(torch.randn(4, 2, 5).to(state).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out, (h_n, c_n) = module(x, hx)
    assert out.dtype == h_n.dtype == c_n.dtype == output
    (out.sum() + h_n.sum() + c_n.sum()).backward()
    for leaf in (x, *(hx or ()), *module.parameters()):
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", FLOATS, ids=str)
def test_initial_states_of_any_floating_type(backend: str, state: torch.dtype) -> None:
    """nn.LSTM refuses them; ours are those of the same values in the input's type."""
    module = LSTM(4, 5, backend=backend, precision="ieee")
    x, hx = torch.randn(3, 2, 4), tuple(torch.randn(1, 2, 5).to(state) for _ in range(2))
    want, (h_w, c_w) = module(x, tuple(value.float() for value in hx))
    out, (h_n, c_n) = module(x, hx)
    for a, b in ((out, want), (h_n, h_w), (c_n, c_w)):
        torch.testing.assert_close(a, b)
    cell = LSTMCell(4, 5, backend=backend)
    for a, b in zip(cell(x[0], (hx[0][0], hx[1][0])), cell(x[0], (hx[0][0].float(), hx[1][0].float()))):
        torch.testing.assert_close(a, b)


def test_the_kernels_read_c_in_its_own_type() -> None:
    """A half-precision LSTM that goes on from an fp32 cell state has not rounded it."""
    module = LSTM(4, 5, backend="triton").half()
    nn.init.zeros_(module.weight_ih_l0)
    for bias in (module.bias_ih_l0, module.bias_hh_l0):
        nn.init.zeros_(bias)
    c_0 = torch.full((1, 1, 5), 1.0001)  # 1 in half precision
    x, h_0 = torch.zeros(1, 1, 4).half(), torch.zeros(1, 1, 5)
    *_, (_, c_n) = module(x, (h_0, 4096 * c_0))
    assert (c_n == torch.tensor(4096 * 1.0001 * 0.5).half()).all()


def test_grad_scaler() -> None:
    module = LSTM(4, 5, backend="triton")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = module.weight_hh_l0.detach().clone()
    x = torch.randn(3, 2, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = module(x)[0].float().square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(module.weight_hh_l0, before)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_are_no_floats(backend: str, bad: torch.dtype) -> None:
    state = torch.ones(1, 2, 5).to(bad)
    with pytest.raises(RuntimeError):
        LSTM(4, 5, backend=backend)(torch.randn(3, 2, 4), (state, state))
