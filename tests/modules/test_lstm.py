"""LSTM and LSTMCell are nn.LSTM and nn.LSTMCell: constructor, weights, results, on every backend."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import LSTM, LSTMCell

BACKENDS = ["auto", "triton", "torch"]
OPTIONS = {
    "plain": {},
    "layers": dict(num_layers=3),
    "no-bias": dict(bias=False),
    "batch-first": dict(batch_first=True),
    "bidirectional": dict(bidirectional=True),
    "projection": dict(proj_size=3),
    "projections": dict(proj_size=2, num_layers=2, bias=False, batch_first=True, bidirectional=True),
    "everything": dict(num_layers=2, bias=False, batch_first=True, bidirectional=True),
}


def pair(backend: str, *sizes: int, **options) -> tuple[nn.LSTM, LSTM]:
    """nn.LSTM and ours from the same seed."""
    torch.manual_seed(7)
    theirs = nn.LSTM(*sizes, **options)
    torch.manual_seed(7)
    return theirs, LSTM(*sizes, **options, backend=backend)


def assert_same_results(theirs: nn.Module, ours: nn.Module, *inputs) -> None:
    """Outputs, states and the gradients of all parameters and inputs."""
    grads = []
    for module in (theirs, ours):
        module.zero_grad()
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]) or None)
        torch.manual_seed(1)
        sum((t * torch.randn(t.shape)).sum() for t in (out, h_n, c_n)).backward()
        grads.append([out, h_n, c_n, *(p.grad for p in module.parameters()), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_results(backend: str, options: dict, state: bool, batched: bool) -> None:
    theirs, ours = pair(backend, 5, 6, **options)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn((4, 3, 5) if batched else (4, 5))
    batch = (3 if not options.get("batch_first") else 4,) if batched else ()
    hx = [torch.randn(layers, *batch, size) for size in (options.get("proj_size", 6), 6)] if state else []
    assert_same_results(theirs, ours, x, *hx)
    assert_same_shape_and_type(theirs, ours, x)


def assert_same_shape_and_type(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    (a, (b, c)), (d, (e, f)) = theirs(x), ours(x)
    assert [t.shape for t in (a, b, c)] == [t.shape for t in (d, e, f)]
    assert [t.dtype for t in (a, b, c)] == [t.dtype for t in (d, e, f)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(backend: str, options: dict, enforce_sorted: bool) -> None:
    theirs, ours = pair(backend, 5, 6, **options)
    lengths = [4, 2, 2, 1] if enforce_sorted else [2, 4, 1, 2]
    first = options.get("batch_first", False)
    x = torch.randn((4, 4, 5))
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        packed = pack_padded_sequence(leaf, torch.tensor(lengths), batch_first=first, enforce_sorted=enforce_sorted)
        out, (h_n, c_n) = module(packed)
        padded, out_lengths = pad_packed_sequence(out, batch_first=first)
        assert out_lengths.tolist() == lengths
        module.zero_grad()
        (padded.square().sum() + h_n.sum() + 2 * c_n.sum()).backward()
        results.append([padded, h_n, c_n, leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_equal_packing(backend: str) -> None:
    """lengths= on a padded tensor in any order is what packing gives; NaN in the padding does not leak."""
    theirs, ours = pair(backend, 5, 6, num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, 5)
    packed, (h_1, c_1) = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
    want, _ = pad_packed_sequence(packed)
    dirty = x.clone()
    for row, length in enumerate(lengths.tolist()):
        dirty[length:, row] = float("nan")
    dirty.requires_grad_()
    out, (h_2, c_2) = ours(dirty, lengths=lengths)
    for a, b in ((want, out), (h_1, h_2), (c_1, c_2)):
        torch.testing.assert_close(a, b)
    (out.sum() + h_2.sum() + c_2.sum()).backward()
    for row, length in enumerate(lengths.tolist()):
        assert (dirty.grad[length:, row] == 0).all()
        assert torch.isfinite(dirty.grad[:length, row]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_length_zero_returns_its_state(backend: str) -> None:
    ours = LSTM(5, 6, backend=backend)
    h_0, c_0 = torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    out, (h_n, c_n) = ours(torch.randn(3, 2, 5), (h_0, c_0), lengths=torch.tensor([0, 3]))
    assert torch.equal(out[:, 0], torch.zeros(3, 6))
    assert torch.equal(h_n[:, 0], h_0[:, 0])
    assert torch.equal(c_n[:, 0], c_0[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_equals_separate_sequences(backend: str, bidirectional: bool) -> None:
    """A mark before step 2 makes steps 0-1 and 2-4 two sequences, in both directions."""
    theirs, ours = pair(backend, 5, 6, bidirectional=bidirectional)
    x = torch.randn(5, 2, 5)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[2] = True
    out, _ = ours(x, reset=reset)
    torch.testing.assert_close(out, torch.cat((theirs(x[:2])[0], theirs(x[2:])[0])))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_and_state_dict(options: dict) -> None:
    theirs, ours = pair("auto", 5, 6, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()):
        assert torch.equal(a, b)
    other = LSTM(5, 6, **options)
    other.load_state_dict(theirs.state_dict())
    nn.LSTM(5, 6, **options).load_state_dict(other.state_dict())
    assert repr(ours) == repr(theirs)


def test_constructor() -> None:
    assert (
        repr(LSTM(5, 6, 2, backend="triton", precision="ieee"))
        == "LSTM(5, 6, num_layers=2, backend=triton, precision=ieee)"
    )
    module = LSTM(5, 6, 2, True, True, 0.5, True, 3, "cpu", torch.float64)
    assert module.proj_size == 3
    assert module.weight_ih_l0.dtype == torch.float64
    assert LSTM(5, 6, device="meta").weight_ih_l0.is_meta


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_dropout(backend: str) -> None:
    """Between layers and in training only; with p = 1 the upper layer sees zeros."""
    module = LSTM(5, 6, 2, dropout=1.0, backend=backend)
    x = torch.randn(4, 3, 5)
    zeros = torch.zeros(4, 3, 6)
    upper = nn.LSTM(6, 6)
    upper.load_state_dict({k.replace("l1", "l0"): v for k, v in module.state_dict().items() if "l1" in k})
    torch.testing.assert_close(module(x)[0], upper(zeros)[0])
    module.eval()
    theirs = nn.LSTM(5, 6, 2)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x)[0], theirs(x)[0])


def test_dropout_rate() -> None:
    module = LSTM(5, 64, 2, dropout=0.3, backend="triton")
    module.weight_ih_l0.data.zero_()
    module.bias_ih_l0.data.fill_(3.0)  # the lower layer's outputs are all alike and far from 0
    seen = []
    original = torch.nn.functional.dropout
    torch.nn.functional.dropout = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    try:
        module(torch.randn(8, 16, 5))
    finally:
        torch.nn.functional.dropout = original
    assert 0.25 < (seen[0] == 0).float().mean() < 0.35


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_backward_in_eval_mode_and_partial_gradients(backend: str) -> None:
    module = LSTM(5, 6, 2, backend=backend).eval()
    module.weight_hh_l0.requires_grad_(False)
    module.bias_ih_l1.requires_grad_(False)
    module(torch.randn(4, 3, 5))[0].sum().backward()
    assert module.weight_hh_l0.grad is None
    assert module.bias_ih_l1.grad is None
    assert module.weight_ih_l0.grad is not None


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_copies(backend: str) -> None:
    module = LSTM(5, 6, 2, backend=backend)
    x = torch.randn(4, 3, 5)
    want = module(x)[0]
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)):
        assert other.backend == backend
        assert torch.equal(other(x)[0], want)
    assert torch.equal(torch.func.functional_call(module, dict(module.named_parameters()), (x,))[0], want)


def test_batch_first_copies_nothing_and_output_is_contiguous() -> None:
    module = LSTM(5, 6, batch_first=True, backend="triton")
    x = torch.randn(3, 4, 5)
    out, _ = module(x)
    assert out.shape == (3, 4, 6)
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_sequence_under_compile(backend: str) -> None:
    """Nobody looks at the values there, so they are clamped on either path."""
    module = LSTM(5, 6, bidirectional=True, backend=backend)
    x = torch.randn(4, 2, 5)
    compiled = torch.compile(module, backend="eager")
    want = module(x, lengths=torch.tensor([4, 2]))[0]
    torch.testing.assert_close(compiled(x, lengths=torch.tensor([9, 2]))[0], want)


def test_float64_is_not_cast_by_autocast() -> None:
    module = LSTM(5, 6, dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x, lengths=torch.tensor([3, 1]))[0].dtype == torch.float64


def test_autocast() -> None:
    """Computes in autocast's type, as nn.LSTM does."""
    module = LSTM(5, 6, backend="triton")
    with torch.autocast("cpu", dtype=torch.float16):
        out, (h_n, _) = module(torch.randn(4, 3, 5))
    assert out.dtype == h_n.dtype == torch.float16
    out.sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["triton"])
def test_compile_fullgraph(backend: str) -> None:
    module = LSTM(5, 6, 2, bidirectional=True, backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((4, 3), (6, 2)):
        x = torch.randn(steps, batch, 5)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
    compiled(x)[0].sum().backward()
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_compile_for_training_on_any_path(backend: str, packed: bool) -> None:
    """Where Dynamo cannot go the graph breaks, as it does at nn.LSTM; results and gradients stay right."""
    module = LSTM(5, 6, backend=backend)
    x = torch.randn(4, 3, 5)
    given = pack_padded_sequence(x, torch.tensor([4, 2, 1])) if packed else x
    want = module(given)[0]
    got = torch.compile(module, backend="aot_eager")(given)[0]
    torch.testing.assert_close(got.data, want.data)
    (got.data if packed else got).sum().backward()
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiling_warns_of_no_cache_of_ours(backend: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(LSTM(5, 6, backend=backend), backend="aot_eager")(torch.randn(4, 3, 5))
    assert not [one for one in caught if "lru_cache" in str(one.message)], "Dynamo warns of caches"


def test_explain() -> None:
    x = torch.randn(4, 3, 5)
    text = str(lstm_triton.explain(LSTM(5, 6, 2), x))
    assert text.count("torch (the tensors are on cpu") == 2
    text = str(lstm_triton.explain(LSTM(5, 6, 2, backend="triton"), x))
    assert text.count("forward: local, W_hh resident on chip, plan from heuristic") == 2
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))
    assert "triton" in str(lstm_triton.explain(LSTM(5, 6, backend="triton"), packed))
    assert "triton" in str(lstm_triton.explain(LSTMCell(5, 6, backend="triton"), x[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_reset_row_starts_from_the_given_state(backend: str, shared: bool, batch_first: bool) -> None:
    """Two layers: the steps from the reset on are those of a new sequence, and its gradient is that of its start."""
    module = LSTM(5, 6, 2, backend=backend, precision="ieee", batch_first=batch_first)
    x = torch.randn(7, 3, 5)
    given = [torch.randn(2, 6) if shared else torch.randn(2, 3, 6) for _ in range(2)]
    state = [tensor.clone().requires_grad_() for tensor in given]
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[4] = True
    swap = (lambda tensor: tensor.transpose(0, 1)) if batch_first else (lambda tensor: tensor)
    out, _ = module(swap(x), reset=swap(reset), reset_state=tuple(state))
    start = [tensor.clone().requires_grad_() for tensor in given]
    rows = tuple(tensor.unsqueeze(1).expand(2, 3, 6) if shared else tensor for tensor in start)
    late, _ = LSTM.forward(module, swap(x[4:]).contiguous(), tuple(row.contiguous() for row in rows))
    torch.testing.assert_close(swap(out)[4:], swap(late))
    got = torch.autograd.grad(swap(out)[4:].square().sum(), state)
    want = torch.autograd.grad(late.square().sum(), start)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_cell(backend: str, bias: bool, batched: bool, state: bool) -> None:
    torch.manual_seed(3)
    theirs = nn.LSTMCell(5, 6, bias=bias)
    torch.manual_seed(3)
    ours = LSTMCell(5, 6, bias=bias, backend=backend)
    x = torch.randn((3, 5) if batched else (5,))
    hx = (torch.randn((3, 6) if batched else (6,)), torch.randn((3, 6) if batched else (6,))) if state else None
    for a, b in zip(theirs(x, hx), ours(x, hx)):
        torch.testing.assert_close(a, b)
    sum(t.sum() for t in ours(x, hx)).backward()
    sum(t.sum() for t in theirs(x, hx)).backward()
    for a, b in zip(theirs.parameters(), ours.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@settings(max_examples=25)
@given(
    seq_len=st.integers(1, 6),
    batch=st.integers(1, 18),
    input_size=st.integers(1, 9),
    hidden_size=st.integers(1, 35),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    state=st.booleans(),
)
def test_any_shape(seq_len, batch, input_size, hidden_size, layers, bidirectional, bias, batch_first, state) -> None:
    options = dict(num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    theirs, ours = pair("triton", input_size, hidden_size, **options)
    x = torch.randn((batch, seq_len, input_size) if batch_first else (seq_len, batch, input_size))
    states = layers * (2 if bidirectional else 1)
    hx = [torch.randn(states, batch, hidden_size) for _ in range(2)] if state else []
    assert_same_results(theirs, ours, x, *hx)
