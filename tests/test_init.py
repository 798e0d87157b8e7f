"""Initialisation recipes: what every gate's weights and biases become."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lstm_triton import LSTM, LSTMCell, init

MODULES = {
    "lstm": lambda **options: LSTM(24, 32, 2, bidirectional=True, **options),
    "torch": lambda **options: nn.LSTM(24, 32, **options),
    "cell": lambda **options: LSTMCell(24, 32, **options),
}


def parts(module: nn.Module, name: str) -> list[tuple[torch.Tensor, ...]]:
    """The gates i, f, g, o of every parameter of this kind."""
    return [p.detach().chunk(4) for full, p in module.named_parameters() if full.startswith(name)]


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_xavier_orthogonal(build) -> None:
    module = build()
    assert init.xavier_orthogonal_(module) is module
    for gates in parts(module, "weight_ih"):
        for gate in gates:
            bound = math.sqrt(6 / sum(gate.shape))
            assert gate.abs().max() <= bound
            assert gate.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for gates in parts(module, "weight_hh"):
        for gate in gates:
            torch.testing.assert_close(gate @ gate.t(), torch.eye(32), rtol=0, atol=1e-5)
    sums = [[a + b for a, b in zip(*pair)] for pair in zip(parts(module, "bias_ih"), parts(module, "bias_hh"))]
    for i, f, g, o in sums:
        assert (f == 1).all()
        assert all((gate == 0).all() for gate in (i, g, o))


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_chrono(build) -> None:
    module = build()
    before = [p.detach().clone() for name, p in module.named_parameters() if name.startswith("weight")]
    init.chrono_(module, 100)
    after = [p.detach() for name, p in module.named_parameters() if name.startswith("weight")]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    for i, f, g, o in parts(module, "bias_ih"):
        assert torch.equal(i, -f)
        assert (f >= 0).all()
        assert (f <= math.log(99)).all()
        assert 30 < f.exp().mean() < 70
        assert (g == 0).all()
        assert (o == 0).all()
    assert all((gate == 0).all() for gates in parts(module, "bias_hh") for gate in gates)


def test_default_is_the_constructors() -> None:
    torch.manual_seed(3)
    built = LSTM(5, 6, 2)
    module = init.xavier_orthogonal_(LSTM(5, 6, 2))
    torch.manual_seed(3)
    init.default_(module)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), module.parameters()))


def test_projections_and_no_bias() -> None:
    module = init.xavier_orthogonal_(LSTM(5, 8, proj_size=3, bias=False), forget_bias=0)
    for gate in module.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate.t() @ gate, torch.eye(3), rtol=0, atol=1e-5)
    assert module.weight_hr_l0.abs().max() <= math.sqrt(6 / 11)


def test_errors() -> None:
    with pytest.raises(TypeError, match="should be an LSTM or LSTMCell, got GRU"):
        init.xavier_orthogonal_(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="needs biases; the module has bias=False"):
        init.xavier_orthogonal_(LSTM(3, 4, bias=False))
    with pytest.raises(ValueError, match="needs biases"):
        init.chrono_(LSTM(3, 4, bias=False), 10)
    with pytest.raises(ValueError, match="max_time should be at least 2 steps, got: 1"):
        init.chrono_(LSTM(3, 4), 1)
    module = nn.utils.parametrizations.weight_norm(LSTM(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="initialise first"):
        init.xavier_orthogonal_(module)


def test_variants_have_their_gates_and_gains() -> None:
    """Coupled gates have three; peepholes and the initial state are 0, gains 1."""
    module = LSTM(
        24, 32, bidirectional=True, peephole=True, layer_norm=True, coupled_gates=True, learn_initial_state=True
    )
    init.xavier_orthogonal_(module)
    for gate in module.weight_hh_l0.detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), atol=1e-5, rtol=0)
    for name, parameter in module.named_parameters():
        if name.startswith("gain_"):
            assert (parameter == 1).all()
        elif not name.startswith("weight_ih") and not name.startswith("weight_hh"):
            assert (parameter == 0).all(), name
    init.chrono_(module, 10)
    i, g, o = module.bias_ih_l0.detach().chunk(3)
    assert (-i).exp().min() >= 1
    assert (-i).exp().max() <= 9
    assert (torch.cat((g, o, module.bias_hh_l0.detach())) == 0).all()
    assert (module.gain_c_l0 == 1).all()
    with_forget = init.xavier_orthogonal_(LSTM(24, 32, peephole=True))
    assert (with_forget.bias_ih_l0.chunk(4)[1] == 1).all()
    init.default_(module)
    assert (module.gain_hh_l0 == 1).all()
