"""The copy task: who remembers what, and gradients on their way back."""

from __future__ import annotations

import pytest
import torch

from lstm_triton import LSTMCell
from lstm_triton.recipes import copy_task


def test_the_task() -> None:
    x, bits = copy_task.draw(torch.Generator().manual_seed(0), batch=6, bits=3, delay=4)
    assert x.shape == (10, 6, 3)
    assert torch.equal(x[:3, :, 0] > 0, bits > 0)
    assert torch.equal(x[:, 0, 1], torch.tensor([1.0] * 3 + [0.0] * 7))
    assert torch.equal(x[:, 0, 2], torch.tensor([0.0] * 7 + [1.0] * 3))
    assert not x[3:, :, 0].any()


def test_the_lstm_remembers_and_the_plain_network_does_not(tmp_path) -> None:
    """At a delay of 50, with the bits of a full run; the plain network may train for longer, and loses all the same."""
    arguments = ["--delays", "50", "--steps", "1500", "--evaluations", "25", "--quiet", "--out", str(tmp_path)]
    rnn, lstm = copy_task.train(copy_task.parse(arguments))
    assert lstm.accuracy >= 0.99
    assert lstm.curve.steps[-1] < rnn.curve.steps[-1] == 1500
    assert rnn.accuracy < (copy_task.CHANCE + 1) / 2  # less than half way from chance to all
    names = [line.get_label() for line in copy_task.accuracy_figure([lstm, rnn]).axes[0].lines]
    assert names == ["plain RNN", "LSTM", "chance"]


def test_gradients_keep_to_the_rule() -> None:
    found = {decay.name: decay for decay in copy_task.decays(hidden_size=16, steps=100)}
    lstm, rnn = found["LSTM, by the rule"], found["plain RNN, by the rule"]
    assert len(lstm.norms) == 101
    assert lstm.norms[-1] == pytest.approx(copy_task.FORGET**100, rel=0.02)
    assert rnn.norms[-1] < copy_task.NORM**100  # tanh takes its share
    assert (rnn.norms <= copy_task.NORM ** torch.arange(101) * (1 + 1e-9)).all()
    assert found["LSTM, default weights"].norms[-1] < 1e-6
    assert found["LSTM, default weights"].forget == pytest.approx(0.5, abs=0.02)
    assert lstm.forget == pytest.approx(copy_task.FORGET)
    assert lstm.factor == pytest.approx(copy_task.FORGET, rel=1e-3)
    assert rnn.forget is None
    assert len(copy_task.gradient_figure(list(found.values())).axes[0].lines) == 7


def test_gradients_of_states_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    cell, x = LSTMCell(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    norms = copy_task.state_gradients(cell, x)
    states = []
    with torch.no_grad():
        for x_t in x:
            states.append(cell(x_t, states[-1] if states else None))
    for back in range(5):
        h, c = states[4 - back]
        leaf = c.clone().requires_grad_()
        state = (h / c.tanh()) * leaf.tanh(), leaf  # h depends on c by the output gate
        for x_t in x[5 - back :]:
            state = cell(x_t, state)
        (gradient,) = torch.autograd.grad(state[0].square().sum() / 2, leaf)
        torch.testing.assert_close(gradient.norm(), norms[back])
