"""The LSTM by hand is an LSTM, and its worked numbers are right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lstm_triton import LSTM
from lstm_triton.recipes import from_scratch
from lstm_triton.reference import layer as reference


def test_every_stage_is_nn_lstm_and_ours() -> None:
    found = from_scratch.differences(seed=3, hidden_size=7)
    assert len(found) == 10
    assert max(found.values()) < 20 * torch.finfo(torch.float32).eps  # a few dozen sums of numbers below 1


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_in_fp64_with_gradients(options: dict) -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, dtype=torch.float64, **options)
    mine = from_scratch.Stack(3, 5, **options).double().take(theirs)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    gradients = []
    for module in (mine, theirs):
        leaf = x.clone().requires_grad_()
        output, (h_n, c_n) = module(leaf)
        (output.sum() + h_n.square().sum() + c_n.sum()).backward()
        gradients.append((output, leaf.grad))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_worked_step() -> None:
    step = from_scratch.worked_step()
    torch.testing.assert_close(step.c, torch.tensor([1.05, 0.67, 0.18, 0.675]))
    torch.testing.assert_close(step.h, torch.tensor([0.6, 0.7, 0.5, 0.9]) * torch.tanh(step.c))


def test_the_worked_unit() -> None:
    """0.741 x 0.7 + 0.615 x 0.446 = 0.793, shown as 0.625 x tanh(0.793) = 0.412."""
    unit = from_scratch.worked_unit()
    values = [round(float(value), 3) for value in (unit.f, unit.i, unit.g, unit.o, unit.c, unit.h)]
    assert values == [0.741, 0.615, 0.446, 0.625, 0.793, 0.412]


def test_it_agrees_with_the_specification() -> None:
    """Written twice on purpose, once to be read: they may not drift apart."""
    torch.manual_seed(1)
    cell = from_scratch.SeparateGates(3, 4).double()
    w_ih, w_hh, bias = torch.randn(16, 3).double(), torch.randn(16, 4).double(), torch.randn(16).double()
    cell.take(w_ih, w_hh, bias)
    x, h, c = (torch.randn(2, size, dtype=torch.float64) for size in (3, 4, 4))
    out, h_n, c_n, *_ = reference.layer_forward(
        x[None], w_ih[None], w_hh[None], bias[None], (h[None], c[None]), batch_first=False
    )
    torch.testing.assert_close(cell(x, (h, c)), (h_n[0], c_n[0]))
    assert torch.equal(out[0], h_n[0])


def test_figures() -> None:
    step = from_scratch.worked_step()
    texts = {text.get_text() for text in from_scratch.flow_figure(step).axes[0].texts}
    assert {"c before", "f", "i · g", "1.05  0.67  0.18  0.675"} <= texts
    assert len(from_scratch.table_figure(step).axes[0].texts) == 36
    x = torch.randn(5, 3)
    assert len(from_scratch.sequence_figure(LSTM(3, 2), x, unit=1).axes[0].lines) == 4
