"""`lengths=` where no kernel runs: packed for PyTorch's own LSTM, with the results of the loop over steps."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM
from lstm_triton.functional import stack

T, B = 6, 4
OPTIONS = {
    "plain": dict(),
    "everything": dict(num_layers=2, bidirectional=True, batch_first=True, bias=False),
    "projection": dict(proj_size=3, num_layers=2),
    "learned state": dict(learn_initial_state=True),
}
LENGTHS = {"mixed": [3, 6, 1, 6], "empty rows": [0, 5, 0, 2], "empty": [0] * B, "full": [T] * B}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call that is packed."""
    seen: list[int] = []
    real = stack.stack_by_packing
    monkeypatch.setattr(stack, "stack_by_packing", lambda *given: (seen.append(1), real(*given))[1])
    return seen


def results(module: LSTM, x: torch.Tensor, *given, **marks) -> list[torch.Tensor]:
    """Of a call, and the gradients of its input and its parameters."""
    x = x.clone().requires_grad_()
    found = tree_leaves(module(x, *given, **marks))
    asked = [x, *module.parameters()]
    return found + list(torch.autograd.grad(sum(t.sin().sum() for t in found), asked, materialize_grads=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
def test_the_same_as_by_steps(
    options: dict, lengths: list[int], given: bool, packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands beyond the lengths is never read, NaN included."""
    torch.manual_seed(0)
    module = LSTM(5, 4, backend="torch", **options).double()
    first = module.batch_first
    x, ends = torch.randn((B, T, 5) if first else (T, B, 5), dtype=torch.float64), torch.tensor(lengths)
    beyond = torch.arange(T) >= ends.unsqueeze(1)
    x = x.masked_fill((beyond if first else beyond.t()).unsqueeze(-1), torch.nan)
    states = module.num_layers * (2 if module.bidirectional else 1)
    hx = [(torch.randn(states, B, module.proj_size or 4).double(), torch.randn(states, B, 4).double())] * given
    found = results(module, x, *hx, lengths=ends)
    assert packed == [1]
    monkeypatch.setattr(stack, "MOST_PACKED", 0)
    want = results(module, x, *hx, lengths=ends)
    assert packed == [1], "long sequences are trained by the loop"
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_inference_is_packed_at_any_length(packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "MOST_PACKED", 0)
    module, x = LSTM(5, 4, backend="torch"), torch.randn(T, B, 5)
    with torch.no_grad():
        module(x, lengths=torch.tensor([3, 6, 1, 6], dtype=torch.int32))
    assert packed == [1]


ELSEWHERE = {
    "resets": (dict(), dict(reset=torch.zeros(T, B, dtype=torch.bool))),
    "states": (dict(), dict(return_states=("c",))),
    "variant": (dict(layer_norm=True), {}),
    "recompute": (dict(recompute="gates"), {}),
}


@pytest.mark.parametrize(("options", "marks"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_cannot_be_packed(options: dict, marks: dict, packed: list[int]) -> None:
    LSTM(5, 4, backend="torch", **options)(torch.randn(T, B, 5), lengths=torch.tensor([3, 6, 1, 6]), **marks)
    assert not packed


class Marked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = LSTM(5, 4, backend="torch")

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return self.lstm(x, lengths=ends)[0]


@pytest.mark.filterwarnings("ignore")  # the tracer's own
def test_torch_jit_trace() -> None:
    """What is traced with full rows takes empty ones."""
    module, x = Marked(), torch.randn(T, B, 5)
    traced = torch.jit.trace(module, (x, torch.tensor([3, 6, 1, 6])))
    ends = torch.tensor([0, 2, 6, 0])
    torch.testing.assert_close(traced(x, ends), module(x, ends))


def test_lengths_that_cannot_be_looked_at(packed: list[int]) -> None:
    module, x, ends = LSTM(5, 4, backend="torch"), torch.randn(T, B, 5), torch.tensor([3, 6, 0, 6])
    with torch.device("meta"):
        assert LSTM(5, 4)(torch.empty(T, B, 5), lengths=torch.empty(B, dtype=torch.int64))[0].shape == (T, B, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x, lengths=ends)[0].sin().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert packed == [1]
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    torch.testing.assert_close(torch.func.functionalize(loss)(x), loss(x))


def test_no_rows_and_transforms(packed: list[int]) -> None:
    module, ends = LSTM(5, 4, backend="torch"), torch.tensor([3, 6, 1, 6])
    assert module(torch.randn(T, 0, 5), lengths=torch.zeros(0, dtype=torch.int64))[0].shape == (T, 0, 4)
    x = torch.randn(2, T, B, 5)
    found = torch.func.vmap(lambda one: module(one, lengths=ends)[0])(x)
    assert not packed
    torch.testing.assert_close(found[1], module(x[1], lengths=ends)[0])
    assert packed == [1]
