"""Sequences of one step: one launch with the input's projection in it, and LSTMCell with masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import Case, argument, assert_as_good_as_torch, by_kernels
from torch import Tensor

from lstm_triton import LSTM, LSTMCell, explain
from lstm_triton.kernels.config import Config
from lstm_triton.layer import forward as forward_pass
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.planner import SINGLE_BATCH, plan_single
from lstm_triton.planning.problem import Problem

BACKENDS = ["torch", "triton"]
SINGLE = {
    "weights-first": Config("single", "none", False, True, 1, 16, 16, 16, 4),
    "weights-second": Config("single", "none", False, False, 1, 16, 32, 32, 4),
    "split-k": Config("single", "none", False, False, 2, 16, 16, 32, 4),
}
BACKWARD = Config("local", "none", True, False, 4, 16, 32, 32, 4)
CASES = {
    "plain": Case(seq_len=1),
    "wide-input": Case(seq_len=1, input_size=37),
    "no-state": Case(seq_len=1, state=False, batch_first=True),
    "everything": Case(seq_len=1, directions=2, lengths=True, reset=True, batch=18, seed=3),
    "half": Case(seq_len=1, directions=2, batch=3, dtype=torch.float16),
    "bf16": Case(seq_len=1, lengths=True, dtype=torch.bfloat16),
    "one-of-each": Case(seq_len=1, batch=1, input_size=1, hidden_size=1),
}


@pytest.mark.parametrize("config", SINGLE.values(), ids=SINGLE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_launch(config: Config, case: Case) -> None:
    assert_as_good_as_torch(by_kernels(case, config, BACKWARD), case)


def placements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The placements of all forward launches from now on."""
    seen: list[str] = []
    real = forward_pass.lstm_forward

    def watching(*given, **options):
        seen.append(argument("config", real, *given, **options).placement)
        return real(*given, **options)

    monkeypatch.setattr(forward_pass, "lstm_forward", watching)
    return seen


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = placements(monkeypatch)
    module = LSTM(4, 5, backend="triton")
    module(torch.randn(1, 2, 4))
    LSTMCell(4, 5, backend="triton")(torch.randn(2, 4))
    assert seen == ["single", "single"]
    module(torch.randn(2, 2, 4))
    module(torch.randn(1, SINGLE_BATCH + 1, 4))
    LSTM(4, 5, backend="triton", batch_invariant=True)(torch.randn(1, 2, 4))
    assert "single" not in seen[2:]
    assert len(seen) == 5


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("hidden_size", [1, 20, 256, 650, 2048, 8192])
def test_there_is_a_plan(arch: str, dtype: str, hidden_size: int) -> None:
    problem = Problem("forward", hidden_size, 16, 1, dtype, "tf32")
    config = plan_single(problem, KNOWN[arch])
    assert config is not None
    assert (config.placement, config.protocol, config.resident) == ("single", "none", False)
    assert plan_single(replace(problem, batch=SINGLE_BATCH + 1), KNOWN[arch]) is None


def test_explain_says_so() -> None:
    module = LSTM(4, 5, backend="triton")
    assert "forward: single, W_hh and W_ih read once, in one launch" in str(explain(module, torch.randn(1, 2, 4)))
    assert "single" in str(explain(LSTMCell(4, 5, backend="triton"), torch.randn(2, 4)))
    assert "single" not in str(explain(module, torch.randn(2, 2, 4)))


def test_streaming_equals_the_sequence() -> None:
    module = LSTM(4, 5, 2, backend="triton", precision="ieee").eval()
    x, state, outs = torch.randn(6, 3, 4), None, []
    with torch.no_grad():
        for x_t in x:
            out, state = module(x_t.unsqueeze(0), state)
            outs.append(out)
        want, (h_n, c_n) = module(x)
    for a, b in ((torch.cat(outs), want), (state[0], h_n), (state[1], c_n)):
        torch.testing.assert_close(a, b)


# LSTMCell with masks, against nn.LSTMCell and torch.where.


def by_hand(cell: LSTMCell, x: Tensor, hx, active=None, reset=None, reset_state=None) -> tuple[Tensor, Tensor]:
    state = hx if hx is not None else (x.new_zeros(len(x), 6), x.new_zeros(len(x), 6))
    fresh = reset_state if reset_state is not None else (x.new_zeros(6), x.new_zeros(6))
    start = state
    if reset is not None:
        start = tuple(torch.where(reset.unsqueeze(1), new, old) for new, old in zip(fresh, state))
    new = torch.nn.LSTMCell.forward(cell, x, start)
    if active is None:
        return new
    return tuple(torch.where(active.unsqueeze(1), after, before) for after, before in zip(new, state))


MASKS = {
    "active": ("active",),
    "reset": ("reset",),
    "both": ("active", "reset"),
    "reset-state": ("reset", "reset_state"),
    "everything": ("active", "reset", "reset_state"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("names", MASKS.values(), ids=MASKS)
def test_masked_cell(backend: str, state: bool, names: tuple[str, ...]) -> None:
    cell = LSTMCell(5, 6, backend=backend, precision="ieee")
    x = torch.randn(4, 5, requires_grad=True)
    hx = tuple(torch.randn(4, 6, requires_grad=True) for _ in range(2)) if state else None
    marks = {
        "active": torch.tensor([True, False, True, False]),
        "reset": torch.tensor([True, True, False, False]),
        "reset_state": tuple(torch.randn(6, requires_grad=True) for _ in range(2)),
    }
    given = {name: marks[name] for name in names}
    leaves = [x, *(hx or ()), *cell.parameters(), *(given.get("reset_state") or ())]
    results = []
    for h, c in (cell(x, hx, **given), by_hand(cell, x, hx, **given)):
        grads = torch.autograd.grad(h.square().sum() + 2 * c.sum(), leaves, materialize_grads=True)
        results.append([h, c, *grads])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if state and "active" in names:
        assert torch.equal(results[0][0][1], hx[0][1])
        assert torch.equal(results[0][1][3], hx[1][3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "marks", "error", "message"),
    [
        ((5,), dict(active=torch.tensor(True)), ValueError, "go with batched 2-D input"),
        ((4, 5), dict(active=torch.ones(4)), RuntimeError, "active must be a bool tensor of size"),
        ((4, 5), dict(active=torch.ones(3, dtype=torch.bool)), RuntimeError, "active must be a bool tensor of size"),
        ((4, 5), dict(reset=torch.ones(3, dtype=torch.bool)), RuntimeError, "reset must be a bool tensor of size"),
        ((4, 5), dict(reset_state=(torch.zeros(6), torch.zeros(6))), RuntimeError, "it needs reset="),
        ((4, 5), dict(reset_state=(torch.zeros(6),)), RuntimeError, "reset_state has an h and a c, got 1"),
        ((4, 5), dict(active=[True] * 4), TypeError, "active should be a bool tensor, got list"),
    ],
)
def test_wrong_masks(backend: str, x: tuple, marks: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LSTMCell(5, 6, backend=backend)(torch.randn(x), **marks)


@pytest.mark.parametrize(("backend", "size"), [("auto", (2, 4)), ("triton", (2, 4)), ("triton", (4,))])
def test_the_state_of_a_rollout_is_detached_in_place(backend: str, size: tuple[int, ...]) -> None:
    cell = LSTMCell(4, 5, backend=backend)
    h, c = cell(torch.randn(size))
    for state in (h, c):
        assert not state._is_view()
        assert not state.detach_().requires_grad
    cell(torch.randn(size), (h, c))[0].sum().backward()
