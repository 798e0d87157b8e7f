"""Memory modes: the same results and gradients, and the bytes that the formulas of `kept_bytes` say."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from layers import INPUTS, OUTPUTS, Case, arguments, assert_as_good_as_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM
from lstm_triton.kernels.backward import lstm_backward
from lstm_triton.kernels.forward import lstm_forward
from lstm_triton.layer import backward as backward_pass
from lstm_triton.layer import forward as forward_pass
from lstm_triton.layer import op as ops
from lstm_triton.layer import windows
from lstm_triton.layer.records import Choices, Inputs, read

MODES = ["none", "gates", "chunk:1", "chunk:3", "chunk:100"]
KEEP = {"none": "all", "gates": "cells"}
CASES = {
    "plain": Case(seq_len=5),
    "no-state": Case(seq_len=5, state=False, batch_first=True),
    "everything": Case(directions=2, lengths=True, reset=True, batch_first=True, batch=5, seq_len=6, seed=2),
    "half": Case(directions=2, lengths=True, reset=True, batch=4, seq_len=5, dtype=torch.float16),
}


def by_operators(case: Case, keep: str) -> dict[str, Tensor]:
    given = case.tensors()
    leaves = {name: given[name].to(case.dtype).requires_grad_() for name in INPUTS if given[name] is not None}
    outputs = torch.ops.lstm_triton.layer(*arguments(case, leaves, keep))[:3]
    cotangents = [given[f"d{name}"].to(case.dtype) for name in OUTPUTS]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = dict(zip(OUTPUTS, (output.detach() for output in outputs)))
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads)}


@pytest.mark.parametrize("keep", ["cells", "chunk:1", "chunk:2", "chunk:100"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_in_every_mode(case: Case, keep: str) -> None:
    assert_as_good_as_torch(by_operators(case, keep), case)


@pytest.mark.parametrize("recompute", ["gates", "chunk:2"])
def test_gradcheck(recompute: str) -> None:
    module = LSTM(2, 2, bidirectional=True, backend="triton", precision="ieee", recompute=recompute).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    marks = dict(lengths=torch.tensor([3, 2]), reset=torch.tensor([[False, True], [True, False], [True, False]]))
    assert torch.autograd.gradcheck(lambda v: module(v, **marks)[0], x, fast_mode=True)


@pytest.mark.parametrize("recompute", MODES[1:])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_modes_of_the_module(backend: str, recompute: str) -> None:
    plain = LSTM(4, 5, 2, bidirectional=True, backend=backend)
    module = LSTM(4, 5, 2, bidirectional=True, backend=backend, recompute=recompute)
    module.load_state_dict(plain.state_dict())
    assert f"recompute={recompute}" in repr(module)
    x = torch.randn(4, 2, 4)
    results = []
    for one in (plain, module):
        out, _ = one(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(one.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "chunk:2"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lengths_of_narrow_types(backend: str, recompute: str, dtype: torch.dtype) -> None:
    """Differences of lengths and window borders must not wrap around."""
    module, x = LSTM(3, 4, backend=backend, recompute=recompute), torch.randn(6, 2, 3)
    want = module(x, lengths=torch.tensor([1, 6]))
    got = module(x, lengths=torch.tensor([1, 6]).to(dtype))
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)):
        assert torch.equal(a, b)


def test_nothing_is_recomputed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyTorch's path such a call is nn.LSTM's, not a loop."""
    from lstm_triton.reference import layer as reference

    monkeypatch.setattr(reference, "ensemble_forward", None)
    module = LSTM(3, 4, 2, recompute="gates")
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        want = torch.nn.LSTM.forward(module, x)[0]
        assert torch.equal(module(x)[0], want)
    module(x)[0].sum().backward()  # recomputed, by aten
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("recompute", ["", "gate", "chunk", "chunk:", "chunk:0", "chunk:-1", "chunk:two", "chunk:1.5"])
def test_unknown_modes(recompute: str) -> None:
    with pytest.raises(ValueError, match="recompute should be one of 'none', 'gates', 'chunk:K', K >= 1"):
        LSTM(4, 5, recompute=recompute)


# The formulas. e: bytes of an element; R = T * B rows; D directions.


def kept_bytes(case: Case, recompute: str) -> int:
    """What autograd keeps of one layer between its passes, beyond inputs and weights.

    out counts: it is the caller's as well. "none": out, c and four gates of every step; "gates": out and c;
    "chunk:K": out, and h and fp32 c entering each window.
    """
    e = case.dtype.itemsize
    row = case.directions * case.hidden_size
    rows = case.seq_len * case.batch
    if recompute == "none":
        return 6 * rows * row * e
    if recompute == "gates":
        return 2 * rows * row * e
    entering = windows.count(case.seq_len, int(recompute.partition(":")[2])) * case.batch * row
    return rows * row * e + entering * (e + max(e, 4))


SIZES = Case(seq_len=64, batch=8, input_size=16, hidden_size=32, directions=2)


@pytest.mark.parametrize("recompute", ["none", "gates", "chunk:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kept_bytes(recompute: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SIZES, dtype=dtype)
    without_launches(monkeypatch)
    module = LSTM(16, 32, bidirectional=True, backend="triton", recompute=recompute).to(dtype)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(case.seq_len, case.batch, 16, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    of_inputs = x.nbytes + sum(p.nbytes for p in module.parameters())
    of_biases = module.bias_ih_l0.nbytes * 2  # their sum, for both directions
    assert sum(kept.values()) - of_inputs + 2 * of_biases - of_biases == kept_bytes(case, recompute)


def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators with all their buffers, and no kernel."""

    def idle(*_: object) -> None:
        pass

    own = {"launch": idle}
    monkeypatch.setattr(forward_pass, "lstm_forward", lambda *a, **k: lstm_forward(*a, **(k | own)))
    monkeypatch.setattr(backward_pass, "lstm_backward", lambda *a, **k: lstm_backward(*a, **(k | own)))
    monkeypatch.setattr(backward_pass, "activate", lambda gates, *_: gates)  # in place


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at the same time; views of `given` are none."""

    def __init__(self, given: list[Tensor | None]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given if tensor is not None}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.given:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def peak_bytes(case: Case, recompute: str) -> int:
    """The most that the two operators have alive at once, beyond inputs, weights, states and gradients of weights.

    That is in the backward pass: what was kept, gates that were not, dgates and dx, and with batch_first the h_{t-1}
    of every step. With "chunk:K" all of these but dx are a window's, which has its own out and c as well.
    """
    e = case.dtype.itemsize
    row, rows = case.directions * case.hidden_size, case.seq_len * case.batch
    dx, copied = rows * case.input_size * e, int(case.batch_first)
    if recompute.startswith("chunk"):
        of_window = int(recompute.partition(":")[2]) * case.batch * case.hidden_size
        return kept_bytes(case, recompute) + dx + (4 + 1 + 1 + 4 + copied) * of_window * e
    gates = 0 if recompute == "none" else 4 * rows * row * e
    return kept_bytes(case, recompute) + gates + (4 + copied) * rows * row * e + dx


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("recompute", ["none", "gates", "chunk:8"])
def test_peak_bytes(recompute: str, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without_launches(monkeypatch)
    case = replace(
        SIZES, seq_len=256, batch=64, batch_first=batch_first
    )  # large against weights and states, which the formula leaves out
    given = {n: None if t is None else t.to(case.dtype) for n, t in case.tensors().items()}
    inputs = arguments(case, given, KEEP.get(recompute, recompute))
    v, choices = read(inputs, Inputs, Choices)
    with Peak([*v, *given.values()]) as memory:
        out, h_n, c_n, *kept = ops.compute_layer(*inputs)
        forward = memory.peak
        cotangents = (given["dout"], h_n, c_n, None, None)
        wanted = [given[name] is not None for name in INPUTS]
        ops.compute_layer_backward(*cotangents, *v, out, *kept, *choices, wanted)
    formula = peak_bytes(case, recompute)
    assert forward <= memory.peak
    assert 0.95 * formula <= memory.peak <= 1.05 * formula, f"{memory.peak / formula:.3f} of the formula"


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_gradients_a_long_sequence_goes_through_in_windows(
    batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the output only one window's gates exist; the results are those of the whole."""
    module = LSTM(3, 4, bidirectional=True, batch_first=batch_first, backend="triton", precision="ieee")
    x = torch.randn(3, 40, 3) if batch_first else torch.randn(40, 3, 3)
    lengths = torch.tensor([40, 21, 0])
    with torch.no_grad():
        whole = module(x, lengths=lengths)
        monkeypatch.setattr(windows, "GATE_BYTES", 1)  # windows of 16 steps, the least
        parts = module(x, lengths=lengths)
    for a, b in zip(torch.utils._pytree.tree_leaves(whole), torch.utils._pytree.tree_leaves(parts)):
        torch.testing.assert_close(a, b)
    without_launches(monkeypatch)
    peaks = []
    for seq_len in (400, 800):
        v = [torch.zeros(seq_len, 8, 16), torch.zeros(2, 128, 16), torch.zeros(2, 128, 32), torch.zeros(2, 128)]
        with Peak(v) as memory:
            ops.compute_layer(*v, *(None,) * 11, False, True, "nothing", False, "ieee", "", "")
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] == 400 * 8 * 2 * 32 * 4  # the output
