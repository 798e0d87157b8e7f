"""Wrong input: the type of error that nn.LSTM raises, and what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import LSTM, LSTMCell

BACKENDS = ["auto", "triton", "torch"]


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_constructor_errors(cls) -> None:
    with pytest.raises(ValueError, match="backend should be one of 'auto', 'triton', 'torch', got: 'cuda'"):
        cls(5, 6, backend="cuda")
    with pytest.raises(ValueError, match="precision should be one of"):
        cls(5, 6, precision="fp8")
    for options in (
        dict(num_layers=0),
        dict(dropout=2),
        dict(dropout=True),
        dict(proj_size=6),
        dict(bias=1),
        dict(batch_first=0),
    ):
        if cls is LSTM:
            with pytest.raises((ValueError, TypeError)) as theirs:
                nn.LSTM(5, 6, **options)
            with pytest.raises(theirs.type, match=str(theirs.value)[:20]):
                LSTM(5, 6, **options)


def errors() -> dict:
    x = torch.randn(3, 2, 5)
    state = torch.zeros(1, 2, 6)
    return {
        "four dimensions": ((x[None],), ValueError),
        "one dimension": ((x[0, 0],), ValueError),
        "wrong input size": ((torch.randn(3, 2, 4),), RuntimeError),
        "wrong type": ((x.double(),), ValueError),
        "integers": ((x.long(),), ValueError),
        "no steps": ((torch.randn(0, 2, 5),), RuntimeError),
        "not a tensor": (([1.0],), AttributeError),
        "none": ((None,), AttributeError),
        "another device": ((x.to("meta"),), RuntimeError),
        "h_0 of the wrong batch": ((x, (torch.zeros(1, 3, 6), state)), RuntimeError),
        "c_0 of the wrong size": ((x, (state, torch.zeros(1, 2, 5))), RuntimeError),
        "h_0 of another rank": ((x, (torch.zeros(2, 6), torch.zeros(2, 6))), RuntimeError),
        "batched state, unbatched input": ((x[:, 0], (state, state)), RuntimeError),
        "state of integers": ((x, (state.long(), state.long())), RuntimeError),
        "state on another device": ((x, (state.to("meta"), state.to("meta"))), RuntimeError),
        "state of one": ((x, (state,)), IndexError),
        "state of numbers": ((x, (1, 2)), AttributeError),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", errors())
def test_errors_have_the_type_of_nn_lstm(backend: str, name: str) -> None:
    inputs, expected = errors()[name]
    with pytest.raises(expected) as theirs:
        nn.LSTM(5, 6)(*inputs)
    assert theirs.type is expected
    with pytest.raises(expected) as ours:
        LSTM(5, 6, backend=backend)(*inputs)
    assert ours.type is expected
    assert str(ours.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(lengths=torch.tensor([1, 4])), RuntimeError, r"lengths must lie in \[0, 3\], got \[1, 4\]"),
        (dict(lengths=torch.tensor([-1, 3])), RuntimeError, r"lengths must lie in \[0, 3\]"),
        (dict(lengths=[1, 2]), TypeError, "lengths must be a tensor, got list"),
        (dict(lengths=torch.tensor([1, 2, 3])), RuntimeError, r"of size \(2,\), got torch.int64 of size \(3,\)"),
        (dict(lengths=torch.tensor([1.0, 2.0])), RuntimeError, "must be an integer tensor"),
        (dict(lengths=torch.tensor([True, False])), RuntimeError, "must be an integer tensor"),
        (
            dict(reset=torch.zeros(2, 3, dtype=torch.bool)),
            RuntimeError,
            r"reset must be a bool tensor of size \(3, 2\)",
        ),
        (dict(reset=torch.zeros(3, 2)), RuntimeError, "reset must be a bool tensor"),
        (dict(reset_state=(torch.zeros(1, 4), torch.zeros(1, 4))), RuntimeError, "it needs reset="),
        (
            dict(reset=torch.zeros(3, 2, dtype=torch.bool), reset_state=(torch.zeros(1, 3), torch.zeros(1, 4))),
            RuntimeError,
            r"reset_state must be of size \(1, 6\) or \(1, 2, 6\)",
        ),
    ],
)
def test_errors_of_lengths_and_reset(backend: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(5, 6, backend=backend)(torch.randn(3, 2, 5), **options)


def test_contradictory_inputs() -> None:
    packed = pack_padded_sequence(torch.randn(3, 2, 5), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="PackedSequence has its own lengths"):
        LSTM(5, 6)(packed, lengths=torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="batched 3-D input"):
        LSTM(5, 6)(torch.randn(3, 5), lengths=torch.tensor([3]))


def test_bf16_in_the_interpreter_is_refused_with_the_reason() -> None:
    module = LSTM(5, 6, backend="triton", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter multiplies the bit patterns of bfloat16"):
        module(torch.randn(3, 2, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_states_are_too_many(backend: str) -> None:
    x, state = torch.randn(3, 2, 5), torch.zeros(1, 2, 6)
    with pytest.raises(RuntimeError, match="expects two hidden states"):
        LSTM(5, 6, backend=backend)(x, (state, state, state))
    with pytest.raises(RuntimeError, match="expects two hidden states"):
        LSTMCell(5, 6, backend=backend)(x[0], (state[0], state[0], state[0]))


def test_transforms_without_a_rule_are_errors_where_the_kernels_are_demanded() -> None:
    x = torch.randn(3, 2, 5)
    module = LSTM(5, 6, backend="triton")
    for call, reason in (
        (lambda: torch.func.jvp(lambda v: module(v)[0], (x,), (x,)), "forward-mode"),
        (lambda: torch.func.grad(lambda v: module(v)[0].sum())(x), r"torch\.func\.grad is active"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        module(torch.autograd.forward_ad.make_dual(x, x))


def test_errors_of_the_functional_form() -> None:
    lstm, x = lstm_triton.functional.lstm, torch.randn(3, 2, 5)
    good = [torch.randn(24, 5), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
    assert lstm(x, None, good)[0].shape == (3, 2, 6)
    for index, shape in ((0, (20, 5)), (1, (24, 4)), (1, (24, 12)), (2, (1,)), (3, (6,))):
        bad = [*good[:index], torch.randn(shape), *good[index + 1 :]]
        with pytest.raises(RuntimeError, match=r"Expected (weight|bias)_.h of size"):
            lstm(x, None, bad, backend="triton")
    with pytest.raises(RuntimeError, match="expected 4 weights of at least one layer, got 2"):
        lstm(x, None, good[:2])
    with pytest.raises(ValueError, match="backend should be one of"):
        lstm(x, None, good, backend="Triton")
    with pytest.raises(ValueError, match="precision should be one of"):
        lstm(x, None, good, precision="tf23")
    with pytest.raises(RuntimeError, match="a plan was given, and the kernels do not run"):
        lstm(x, None, good, plan="x|y")
    with pytest.raises(ValueError, match="two configs"):
        lstm(x, None, good, backend="triton", plan="nonsense")


def test_explain_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match=r"explains an LSTM or LSTMCell of lstm_triton, got LSTM of torch"):
        lstm_triton.explain(nn.LSTM(5, 6), torch.randn(4, 3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_errors(backend: str) -> None:
    x, h = torch.randn(3, 5), torch.zeros(3, 6)
    bad = ((x[None],), (x, (h[None], h)), (x[:, :4],), (x, (h[:2], h[:2])), (x.double(),))
    for inputs in bad:
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            nn.LSTMCell(5, 6)(*inputs)
        with pytest.raises(theirs.type):
            LSTMCell(5, 6, backend=backend)(*inputs)
