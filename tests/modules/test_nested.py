"""Nested (jagged) tensors in and out: what packing gives, without sorting."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence, unpack_sequence

from lstm_triton import LSTM

BACKENDS = ["torch", "triton"]
LENGTHS = (3, 1, 5, 2)


def sequences(input_size: int = 4) -> list[torch.Tensor]:
    return [torch.randn(length, input_size) for length in LENGTHS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=2)], ids=str)
def test_as_packed(backend: str, options: dict) -> None:
    module = LSTM(4, 5, **options, batch_first=True, backend=backend, precision="ieee")
    given = sequences()
    nested = torch.nested.nested_tensor(given, layout=torch.jagged, requires_grad=True)
    out, (h_n, c_n) = module(nested)
    leaves = [one.clone().requires_grad_() for one in given]
    packed, (h_p, c_p) = module(pack_sequence(leaves, enforce_sorted=False))
    torch.testing.assert_close(h_n, h_p)
    torch.testing.assert_close(c_n, c_p)
    assert out.is_nested
    assert torch.equal(out.offsets(), nested.offsets())
    for a, b in zip(out.unbind(), unpack_sequence(packed)):
        torch.testing.assert_close(a, b)
    weights = list(module.parameters())
    ours = torch.autograd.grad(out.values().square().sum() + c_n.sum(), [nested, *weights])
    theirs = torch.autograd.grad(packed.data.square().sum() + c_p.sum(), [*leaves, *weights])
    torch.testing.assert_close(ours[0].values(), torch.cat(theirs[: len(leaves)]))
    for a, b in zip(ours[1:], theirs[len(leaves) :]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_initial_state_and_states_of_every_step(backend: str) -> None:
    module = LSTM(4, 5, batch_first=True, backend=backend)
    given, hx = sequences(), (torch.randn(1, 4, 5), torch.randn(1, 4, 5))
    nested = torch.nested.nested_tensor(given, layout=torch.jagged)
    out, _, states = module(nested, hx, return_states=("c", "layers", "gates"))
    lengths = torch.tensor(LENGTHS)
    want, _, padded = module(pad_sequence(given, batch_first=True), hx, lengths=lengths, return_states=("c", "gates"))
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(out.unbind()[row], want[row, :length])
        torch.testing.assert_close(states.c[0].unbind()[row], padded.c[0][row, :length])
        torch.testing.assert_close(states.gates[0].unbind()[row], padded.gates[0][row, :length])
    assert torch.equal(states.layers[0].values(), out.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_among_them(backend: str) -> None:
    module = LSTM(4, 5, batch_first=True, backend=backend)
    values, offsets = torch.randn(5, 4), torch.tensor([0, 3, 3, 5])
    out, (h_n, _) = module(torch.nested.nested_tensor_from_jagged(values, offsets))
    assert out.values().shape == (5, 5)
    assert torch.equal(h_n[0, 1], torch.zeros(5))


def test_errors() -> None:
    module, given = LSTM(4, 5, batch_first=True), sequences()
    nested = torch.nested.nested_tensor(given, layout=torch.jagged)
    with pytest.raises(ValueError, match="it goes with batch_first=True"):
        LSTM(4, 5)(nested)
    with pytest.raises(ValueError, match="a nested tensor has its own lengths"):
        module(nested, lengths=torch.tensor(LENGTHS))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 4, got 3"):
        module(torch.nested.nested_tensor(sequences(3), layout=torch.jagged))
    values = torch.randn(11, 4)
    holes = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 8]), lengths=torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="with holes is not supported"):
        module(holes)
    with pytest.raises(ValueError, match=r"must be \[B, length, input_size\]"):
        module(torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged))
