"""proj_size: the recurrence over m with W_hh W_hr is nn.LSTM with projections, lengths and resets included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM

BACKENDS = ["auto", "triton"]


def pair(backend: str, *sizes: int, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.LSTM, LSTM]:
    torch.manual_seed(5)
    theirs = nn.LSTM(*sizes, **options).to(dtype)
    ours = LSTM(*sizes, **options, backend=backend, precision="ieee").to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state_of(module: nn.LSTM, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_ih_l0.dtype
    return torch.randn(count, batch, module.proj_size, dtype=dtype), torch.randn(
        count, batch, module.hidden_size, dtype=dtype
    )


def gradients(module: nn.Module, x: torch.Tensor, hx, **options) -> list[torch.Tensor]:
    """Results and all gradients, through out, h_n and c_n at once."""
    module.zero_grad()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *hx)]
    out, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]), **options)
    torch.manual_seed(1)
    sum((t * torch.randn(t.shape, dtype=t.dtype)).sum() for t in (out, h_n, c_n)).backward()
    return [out, h_n, c_n, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())]


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(2, 20), st.integers(1, 3)),
    batch=st.integers(1, 4),
    steps=st.integers(1, 5),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_lengths_are_packing(sizes, batch, steps, bias, bidirectional, batch_first, backend) -> None:
    inputs, hidden, layers = sizes
    proj_size = 1 + hidden // 3 if hidden > 2 else 1
    options = dict(proj_size=proj_size, bias=bias, bidirectional=bidirectional, batch_first=batch_first)
    theirs, ours = pair(backend, inputs, hidden, layers, **options)
    shape = (batch, steps) if batch_first else (steps, batch)
    x, hx = torch.randn(*shape, inputs, dtype=torch.float64), state_of(theirs, batch)
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = theirs

        def forward(self, x, hx):
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            out, state = self.lstm(packed, hx)
            return pad_packed_sequence(out, batch_first)[0], state

    for want, got in zip(gradients(Packed(), x, hx), gradients(ours, x, hx, lengths=lengths)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_steps_hands_its_state_through(backend: str) -> None:
    _, ours = pair(backend, 3, 6, proj_size=2, bidirectional=True)
    hx = state_of(ours, 3)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    x[:, 1] = float("nan")
    out, (h_n, c_n) = ours(x, hx, lengths=torch.tensor([4, 0, 2]))
    assert torch.equal(h_n[:, 1], hx[0][:, 1])
    assert torch.equal(c_n[:, 1], hx[1][:, 1])
    assert not out[:, 1].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given_state", [True, False])
def test_a_reset_is_a_new_sequence(backend: str, given_state: bool) -> None:
    theirs, ours = pair(backend, 3, 6, 2, proj_size=2)
    x, hx = torch.randn(7, 3, 3, dtype=torch.float64), state_of(theirs, 3)
    fresh = state_of(theirs, 3) if given_state else tuple(torch.zeros_like(t) for t in hx)
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[0, 1] = reset[4] = True
    options = {"reset": reset} | ({"reset_state": fresh} if given_state else {})
    starts = tuple(torch.where(reset[0].unsqueeze(-1), new, old) for new, old in zip(fresh, hx))
    first, _ = theirs(x[:4], starts)
    second, state = theirs(x[4:], fresh)
    out, found = ours(x, hx, **options)
    torch.testing.assert_close(out, torch.cat((first, second)))
    for a, b in zip(found, state):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_resets_lengths_and_a_learnable_state(backend: str) -> None:
    _, ours = pair(backend, 2, 4, proj_size=2, bidirectional=True)
    x, hx, fresh = torch.randn(3, 2, 2, dtype=torch.float64), state_of(ours, 2), state_of(ours, 2)
    reset, lengths = torch.tensor([[False, True], [True, False], [False, True]]), torch.tensor([3, 2])
    leaves = [tensor.requires_grad_() for tensor in (x, *hx, *fresh)]

    def call(x, h, c, reset_h, reset_c):
        out, state = ours(x, (h, c), lengths=lengths, reset=reset, reset_state=(reset_h, reset_c))
        return out, *state

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    """rms distance from fp64, over four draws: at most twice that of nn.LSTM in the same type."""
    for index, name in enumerate(("output", "h_n", "c_n", "input gradient")):
        errors = torch.zeros(2, dtype=torch.float64)
        for seed in range(4):
            theirs, ours = pair("triton", 16, 48, proj_size=16, dtype=dtype)
            exact = nn.LSTM(16, 48, proj_size=16).double()
            exact.load_state_dict(theirs.state_dict())
            torch.manual_seed(seed)
            x, hx = torch.randn(12, 4, 16).to(dtype), tuple(t.to(dtype) for t in state_of(theirs, 4))
            want = gradients(exact, x.double(), tuple(t.double() for t in hx))[index]
            for which, module in enumerate((ours, theirs)):
                errors[which] += (gradients(module, x, hx)[index].double() - want).square().sum()
        assert errors[0] <= 4 * errors[1], f"{name}: {errors.sqrt().tolist()}"


@pytest.mark.parametrize("given_state", [False, True])
def test_gradients_are_no_views_of_wider_tensors(given_state: bool) -> None:
    """Initial states come in as further inputs, which the gradients of x and its weights must not show."""
    module = LSTM(4, 5, 2, proj_size=2, bidirectional=True, backend="triton")
    x, state = torch.randn(3, 2, 4, requires_grad=True), (torch.randn(4, 2, 2), torch.randn(4, 2, 5))
    module(x, state if given_state else None)[0].sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad.is_contiguous()
