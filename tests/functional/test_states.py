"""The states of every step: return_states on every form of input, with gradients flowing in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM
from lstm_triton.functional import States

BACKENDS = ["torch", "triton"]
EVERYTHING = ("c", "layers", "gates")


def cell_by_cell(module: LSTM, x: Tensor) -> States:
    """The states of a stack of one-way layers, by nn.LSTMCell."""
    of_c, of_h, of_gates = [], [], []
    for index in range(module.num_layers):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(module, f"{name}_l{index}") for name in names]
        h = c = x.new_zeros((x.shape[1], module.hidden_size))
        hs, cs, gates = [], [], []
        for x_t in x:
            a = nn.functional.linear(x_t, weights[0], weights[2]) + nn.functional.linear(h, weights[1], weights[3])
            i, f, g, o = a.chunk(4, 1)
            gates.append(torch.stack((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), 1).unsqueeze(1))
            h, c = torch._VF.lstm_cell(x_t, (h, c), *weights)
            hs.append(h)
            cs.append(c)
        of_c.append(torch.stack(cs))
        of_gates.append(torch.stack(gates))
        x = torch.stack(hs)
        of_h.append(x)
    return States(tuple(of_c), tuple(of_h), tuple(of_gates))


def tensors(states: States) -> list[Tensor]:
    return [one for of_layers in states if of_layers is not None for one in of_layers]


def weighted(values: list[Tensor]) -> Tensor:
    """A loss in which every element counts otherwise."""
    return sum((value * torch.linspace(-1, 2, value.numel()).view_as(value)).sum() for value in values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_and_their_gradients(backend: str) -> None:
    module = LSTM(4, 5, 2, backend=backend, precision="ieee")
    x = torch.randn(3, 2, 4, requires_grad=True)
    leaves = [x, *module.parameters()]
    *_, states = module(x, return_states=EVERYTHING)
    want = cell_by_cell(module, x)
    for a, b in zip(tensors(states), tensors(want)):
        torch.testing.assert_close(a, b)
    ours, theirs = (torch.autograd.grad(weighted(tensors(s)), leaves) for s in (states, want))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [("c",), ("gates",), ("layers",), ("layers", "c")])
def test_only_what_is_asked_for(backend: str, asked: tuple[str, ...]) -> None:
    module = LSTM(4, 5, 2, bidirectional=True, backend=backend)
    out, (_, c_n), states = module(torch.randn(3, 2, 4), return_states=asked)
    assert {name for name in States._fields if getattr(states, name) is not None} == set(asked)
    shapes = {"c": (3, 2, 10), "layers": (3, 2, 10), "gates": (3, 2, 2, 4, 5)}
    for name in asked:
        assert [tuple(one.shape) for one in getattr(states, name)] == [shapes[name]] * 2
    if "layers" in asked:
        assert torch.equal(states.layers[-1], out)
    if "c" in asked:
        assert torch.equal(states.c[-1][-1, :, :5], c_n[2])
        assert torch.equal(states.c[-1][0, :, 5:], c_n[3])


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padding_of_states_is_zero(backend: str, gradient: bool) -> None:
    module = LSTM(4, 5, bidirectional=True, backend=backend, batch_first=True)
    x, lengths = torch.randn(3, 4, 4), torch.tensor([2, 4, 0])
    with torch.set_grad_enabled(gradient):
        *_, states = module(x, lengths=lengths, return_states=EVERYTHING)
    for one in tensors(states):
        for row, length in enumerate(lengths.tolist()):
            assert (one[row, length:] == 0).all()
            assert (one[row, :length] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_take_the_form_of_the_input(backend: str) -> None:
    module = LSTM(4, 5, batch_first=True, backend=backend)
    x, lengths = torch.randn(2, 3, 4), torch.tensor([1, 3])
    *_, padded = module(x, lengths=lengths, return_states=EVERYTHING)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    *_, states = module(packed, return_states=EVERYTHING)
    for a, b in zip(tensors(states), tensors(padded)):
        assert isinstance(a, PackedSequence)
        torch.testing.assert_close(pad_packed_sequence(a, batch_first=True)[0], b)
    *_, single = module(x[1], return_states=EVERYTHING)
    for a, b in zip(tensors(single), tensors(padded)):
        torch.testing.assert_close(a, b[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_projected_layers(backend: str) -> None:
    module = LSTM(4, 6, 2, proj_size=3, backend=backend)
    out, _, states = module(torch.randn(3, 2, 4), return_states=EVERYTHING)
    assert states.layers[0].shape == (3, 2, 3)
    assert states.c[1].shape == (3, 2, 6)
    i, f, g, o = states.gates[1].unbind(3)
    before = torch.cat((torch.zeros(1, 2, 6), states.c[1][:-1]))
    torch.testing.assert_close(states.c[1], (f.squeeze(2) * before + (i * g).squeeze(2)))
    torch.testing.assert_close(out, (o.squeeze(2) * states.c[1].tanh()) @ module.weight_hr_l1.t())


def test_second_derivatives_through_states() -> None:
    module = LSTM(2, 2, backend="triton", precision="ieee").double()

    def run(x: Tensor) -> list[Tensor]:
        return tensors(module(x, return_states=EVERYTHING)[-1])

    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_any_iterable_of_names() -> None:
    *_, states = LSTM(4, 5)(torch.randn(3, 2, 4), return_states=(name for name in ("c",)))
    assert states.c is not None


@pytest.mark.parametrize(
    ("asked", "recompute", "message"),
    [
        (("h",), "none", "return_states takes a sequence of 'c', 'layers', 'gates'"),
        ("c", "none", "return_states takes a sequence of"),
        (("gates",), "gates", "return_states='gates' needs what recompute='gates' does not keep"),
        (("c",), "chunk:2", "return_states='c' needs what recompute='chunk:2' does not keep"),
    ],
)
def test_what_cannot_be_returned_is_an_error(asked: object, recompute: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTM(4, 5, recompute=recompute)(torch.randn(3, 2, 4), return_states=asked)
