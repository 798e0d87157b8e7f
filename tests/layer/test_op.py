"""The operators as PyTorch sees them: gradcheck, opcheck, what is computed and what is kept."""

from __future__ import annotations

import layers
import pytest
import torch
from layers import INPUTS, Case, argument, backward_of, run_recurrence

from lstm_triton import functional
from lstm_triton.kernels.config import Config
from lstm_triton.layer import forward as forward_pass
from lstm_triton.layer.records import Choices, Inputs, read
from lstm_triton.testing.interpreter import cooperative

LOCAL = Config("local", "none", True, False, 1, 16, 16, 16, 4)
MAILBOX = Config("grid", "mailbox", True, False, 1, 16, 16, 16, 4)
FLAGS = Config("grid", "flags", False, False, 1, 16, 16, 16, 4)
STEPWISE = Config("stepwise", "none", True, True, 1, 16, 16, 16, 4)


def arguments(case: Case, dtype: torch.dtype, plan: str = "", keep: str = "all") -> tuple:
    given = case.tensors()
    leaves = {n: given[n].to(dtype).requires_grad_() for n in INPUTS if given[n] is not None}
    return layers.arguments(case, leaves, keep, plan=plan)


@pytest.mark.parametrize("config", [LOCAL, MAILBOX, FLAGS, STEPWISE], ids=lambda c: f"{c.placement}-{c.protocol}")
@pytest.mark.parametrize(
    "case",
    [
        Case(seq_len=3, batch=2, input_size=2, hidden_size=3),
        Case(seq_len=3, batch=3, input_size=2, hidden_size=2, directions=2, lengths=True, reset=True, batch_first=True),
    ],
    ids=["plain", "everything"],
)
def test_gradcheck(config: Config, case: Case) -> None:
    """fp64 gradients through the kernels against finite differences."""
    plan = f"{config.encode()}|{backward_of(config).encode()}"
    inputs = arguments(case, torch.float64, plan)
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def layer(*values):
        values = iter(values)
        given = [next(values) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in inputs]
        return torch.ops.lstm_triton.layer(*given)[:3]

    with cooperative(0):
        assert torch.autograd.gradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(state=False, batch_first=True), Case(directions=2, lengths=True, reset=True, batch_first=True)],
    ids=["plain", "no-state", "everything"],
)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.lstm_triton.layer.default, arguments(case, torch.float32))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.lstm_triton.layer.default, arguments(case, torch.float32, keep="nothing"))
    torch.library.opcheck(torch.ops.lstm_triton.layer_backward.default, backward_arguments(case))


@pytest.mark.parametrize("keep", ["cells", "chunk:2"])
def test_opcheck_of_memory_modes(keep: str) -> None:
    case = Case(directions=2, lengths=True, reset=True, batch_first=True)
    torch.library.opcheck(torch.ops.lstm_triton.layer.default, arguments(case, torch.float32, keep=keep))
    torch.library.opcheck(torch.ops.lstm_triton.layer_backward.default, backward_arguments(case, keep=keep))


def test_opcheck_of_the_linear_operator() -> None:
    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.lstm_triton.linear.default, (x, weight, "ieee"))
    torch.testing.assert_close(torch.ops.lstm_triton.linear(x, weight, "ieee"), x @ weight.t())


def backward_arguments(case: Case, wanted: list[bool] | None = None, keep: str = "all") -> tuple:
    inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(case, torch.float32, keep=keep)]
    out, h_n, c_n, *kept = torch.ops.lstm_triton.layer(*inputs)
    if wanted is None:
        given = case.tensors()
        wanted = [given[name] is not None for name in INPUTS]
    grads = [torch.randn_like(t) for t in (out, h_n, c_n)]
    v, choices = read(inputs, Inputs, Choices)
    return (*grads, None, None, *v, out, *kept, *choices, wanted)


@pytest.mark.parametrize("index", range(8))
def test_only_the_wanted_gradient_is_computed(index: int) -> None:
    case = Case(reset=True, directions=2)
    wanted = [i == index for i in range(len(INPUTS))]
    everything = torch.ops.lstm_triton.layer_backward(*backward_arguments(case))
    torch.manual_seed(0)
    full = torch.ops.lstm_triton.layer_backward(*backward_arguments(case))
    torch.manual_seed(0)
    one = torch.ops.lstm_triton.layer_backward(*backward_arguments(case, wanted))
    assert len(everything) == 8
    assert len(one) == 1
    assert torch.equal(one[0], full[index])


def test_gradient_through_one_output_only() -> None:
    """Each of out, h_n, c_n alone: the others' gradients arrive as None and count as zero."""
    case = Case(directions=2)
    inputs = arguments(case, torch.float64)
    outputs = torch.ops.lstm_triton.layer(*inputs)[:3]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor)]
    cotangents = [torch.randn_like(output) for output in outputs]
    parts = [torch.autograd.grad(o, leaves, c, retain_graph=True) for o, c in zip(outputs, cotangents)]
    whole = torch.autograd.grad(outputs, leaves, cotangents)
    for index, grad in enumerate(whole):
        torch.testing.assert_close(sum(part[index] for part in parts), grad)


def test_backward_twice() -> None:
    """retain_graph: the saved tensors survive the first backward untouched."""
    inputs = arguments(Case(), torch.float32)
    out = torch.ops.lstm_triton.layer(*inputs)[0]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor)]
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_backward_modifies_nothing() -> None:
    given = backward_arguments(Case(directions=2, lengths=True, reset=True))
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    torch.ops.lstm_triton.layer_backward(*given)
    for old, new in zip(before, given):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old, new)


def weights_of(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    given = {n: t.float() if t is not None and t.is_floating_point() else t for n, t in case.tensors().items()}
    return given["x"], [given["w_ih"][0], given["w_hh"][0], given["bias"][0], given["bias"][0]]


@pytest.mark.parametrize(("grad", "requires"), [(False, True), (True, False)])
def test_nothing_is_kept_without_a_gradient(grad: bool, requires: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = forward_pass.lstm_forward
    monkeypatch.setattr(
        forward_pass,
        "lstm_forward",
        lambda *a, **k: kept.append(argument("save", original, *a, **k)) or original(*a, **k),
    )
    x, weights = weights_of(Case())
    with torch.set_grad_enabled(grad):
        functional.lstm(x.requires_grad_(requires), None, weights, backend="triton")
    assert kept == [False]


def test_backward_without_saved_tensors_is_an_error() -> None:
    inputs = arguments(Case(), torch.float32, keep="nothing")
    out = torch.ops.lstm_triton.layer(*inputs)[0]
    with pytest.raises(RuntimeError, match='keep="nothing"'):
        out.sum().backward()


def test_strided_inputs() -> None:
    """A transposed x and sliced weights and states give what contiguous ones give."""
    case = Case(directions=2)
    inputs = list(arguments(case, torch.float64))
    want = torch.ops.lstm_triton.layer(*inputs)[:3]
    for index in range(6):
        t = inputs[index].detach()
        wide = torch.stack((t, t), dim=-1)[..., 0]  # every stride doubled
        assert not wide.is_contiguous()
        got = torch.ops.lstm_triton.layer(*inputs[:index], wide, *inputs[index + 1 :])[:3]
        assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_lengths_beyond_the_sequence_are_clamped() -> None:
    """On a device nobody looks at lengths before the launch, so the operator must not trust them."""
    inputs = list(arguments(Case(lengths=True), torch.float32))
    inputs[6] = torch.tensor([4, 4, 0])
    want = torch.ops.lstm_triton.layer(*inputs)[:3]
    inputs[6] = torch.tensor([9, 4, -3])
    assert all(torch.equal(a, b) for a, b in zip(want, torch.ops.lstm_triton.layer(*inputs)[:3]))


def test_a_plan_that_contradicts_the_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="'local' needs block_h >= H = 20, got 16"):
        torch.ops.lstm_triton.layer(*arguments(Case(), torch.float32, f"{LOCAL.encode()}|{LOCAL.encode()}"))


def test_half_a_state_is_an_error() -> None:
    inputs = list(arguments(Case(), torch.float32))
    inputs[5] = None
    with pytest.raises(RuntimeError, match="give both or none"):
        torch.ops.lstm_triton.layer(*inputs)


def test_an_empty_batch() -> None:
    inputs = list(arguments(Case(), torch.float32))
    for index in (0, 4, 5):
        inputs[index] = inputs[index][:, :0].detach().requires_grad_()
    out, h_n, c_n, *_ = torch.ops.lstm_triton.layer(*inputs)
    assert out.shape == (4, 0, 20)
    assert h_n.shape == c_n.shape == (1, 0, 20)
    grads = torch.autograd.grad(out.sum() + h_n.sum(), [t for t in inputs if isinstance(t, torch.Tensor)])
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_config_text_round_trip() -> None:
    for config in (LOCAL, MAILBOX, FLAGS, STEPWISE):
        assert Config.decode(config.encode()) == config
    with pytest.raises(ValueError, match="a config has the fields"):
        Config.decode("placement=grid")
    with pytest.raises(ValueError, match="a config has the fields"):
        Config.decode(LOCAL.encode() + " num_warps=4")
    for old, new, message in (
        ("resident=True", "resident=1", "resident of a config is a bool, got '1'"),
        ("block_b=16", "block_b=x", "block_b of a config is a int, got 'x'"),
    ):
        assert old in LOCAL.encode()
        with pytest.raises(ValueError, match=message):
            Config.decode(LOCAL.encode().replace(old, new))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(placement="nowhere"), "placement must be"),
        (dict(protocol="pigeon"), "protocol must be"),
        (dict(protocol="none"), "does not go with"),
        (dict(num_stages=0), "num_stages must be at least 1, got 0"),
        (dict(max_batch_tiles=-1), "max_batch_tiles must be at least 0, got -1"),
        (dict(num_warps=3), "num_warps must be 1, 2, 4 or 8, got 3"),
        (dict(split_k=0), "split_k must be 1, 2, 4 or 8, got 0"),
        (dict(protocol="mailbox", block_b=8, block_k=16, num_warps=8), "an element for each thread"),
        (dict(block_b=4), "block_b must be a power of two and at least 8"),
        (dict(block_h=24), "block_h must be a power of two and at least 8"),
        (dict(placement="local", protocol="none", block_h=8), "placement 'local' multiplies block_h x block_h"),
        (dict(split_k=4), "split_k needs"),
    ],
)
def test_contradictory_configs(changes: dict, message: str) -> None:
    fields = dict(
        placement="grid", protocol="flags", resident=True, units_first=False, split_k=1,
        block_b=16, block_h=16, block_k=16, num_warps=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Config(**(fields | changes))


def test_runs_are_bitwise_equal() -> None:
    case = Case(directions=2, lengths=True, reset=True)
    with cooperative(3):
        first = run_recurrence(case, MAILBOX)
    with cooperative(3):
        second = run_recurrence(case, MAILBOX)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_local_splits_the_depth_by_gates_and_only_backward() -> None:
    case = Case(hidden_size=5)
    with pytest.raises(ValueError, match="split_k is 4 or 8"):
        layers.by_kernels(case, LOCAL, LOCAL)
    with pytest.raises(ValueError, match="no split_k in the forward pass"):
        layers.by_kernels(case, backward_of(LOCAL))
