"""torch.func.vmap: ensembles side by side in one launch, equal to the loop; other axes and transforms."""

from __future__ import annotations

import pytest
import torch
from layers import argument
from torch import Tensor

from lstm_triton import LSTM
from lstm_triton.layer import forward as forward_pass
from lstm_triton.layer import vmap
from lstm_triton.planning.device import KNOWN

BACKENDS = ["torch", "triton"]
MEMBERS = 3


def ensemble(backend: str, **options) -> tuple[list[LSTM], LSTM, dict[str, Tensor]]:
    """Members, a module to call with their parameters, and these stacked."""
    options = dict(backend=backend, precision="ieee", **options)
    members = [LSTM(3, 4, **options) for _ in range(MEMBERS)]
    parameters, _ = torch.func.stack_module_state(members)
    return members, LSTM(3, 4, **options, device="meta"), parameters


def call(module: LSTM):
    def run(parameters: dict[str, Tensor], *arguments, **marks):
        out, (h_n, c_n) = torch.func.functional_call(module, parameters, arguments, marks)
        return out, h_n, c_n

    return run


def loss(results) -> Tensor:
    return sum((one * torch.linspace(-1, 2, one.numel()).view_as(one)).sum() for one in results)


def assert_like_the_loop(members: list[LSTM], results, parameters: dict[str, Tensor], calls: list) -> None:
    """Results and gradients; calls: arguments and marks of each member."""
    loop = []
    for member, (arguments, marks) in zip(members, calls):
        out, (h_n, c_n) = member(*arguments, **marks)
        loop.append((out, h_n, c_n))
    stacked = [torch.stack(each) for each in zip(*loop)]
    for a, b in zip(results, stacked):
        torch.testing.assert_close(a, b)
    ours = torch.autograd.grad(loss(results), list(parameters.values()))
    theirs = torch.autograd.grad(loss(stacked), [p for member in members for p in member.parameters()])
    count = len(ours)
    for index, grad in enumerate(ours):
        torch.testing.assert_close(grad, torch.stack(theirs[index::count]), rtol=1e-4, atol=1e-5)


OPTIONS = {
    "plain": {},
    "everything": dict(num_layers=2, bidirectional=True, batch_first=True),
    "projection": dict(proj_size=2),
    "gates-again": dict(recompute="gates", bidirectional=True),
    "chunks": dict(recompute="chunk:2", bias=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shared", [True, False], ids=["one-input", "inputs"])
def test_ensemble(backend: str, options: dict, shared: bool) -> None:
    members, module, parameters = ensemble(backend, **options)
    x = torch.randn(3, 2, 3) if shared else torch.randn(MEMBERS, 3, 2, 3)
    results = torch.func.vmap(call(module), in_dims=(0, None if shared else 0))(parameters, x)
    calls = [((x if shared else x[index],), {}) for index in range(MEMBERS)]
    assert_like_the_loop(members, results, parameters, calls)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_over_states_only(backend: str) -> None:
    module = LSTM(3, 4, proj_size=2, bidirectional=True, backend=backend)
    x, h, c = torch.randn(3, 2, 3), torch.randn(MEMBERS, 2, 2, 2), torch.randn(MEMBERS, 2, 2, 4)
    out = torch.func.vmap(lambda h, c: module(x, (h, c))[0])(h, c)
    torch.testing.assert_close(out, torch.stack([module(x, pair)[0] for pair in zip(h, c)]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reverse_mode_of_torch_func(options: dict) -> None:
    module = LSTM(3, 4, **options)
    x = torch.randn(2, 3, 3)
    want = torch.autograd.functional.vjp(lambda v: module(v)[0].square().sum(), x)[1]
    torch.testing.assert_close(torch.func.grad(lambda v: module(v)[0].square().sum())(x), want)


def test_a_large_ensemble_goes_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 64 members of H=512 in one launch would crowd each other out; eight of H=128 do not."""
    monkeypatch.setattr(vmap, "kernel_device", lambda device: KNOWN["sm_90"])

    def of(members: int, hidden_size: int) -> int:
        w_hh = torch.empty(1, 4 * hidden_size, hidden_size, device="meta", dtype=torch.bfloat16)
        return vmap.members_per_launch(members, 1, w_hh, 32, "tf32")

    assert of(8, 128) == 8
    assert 1 <= of(64, 512) < 64


def test_groups_give_what_one_launch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    members, module, parameters = ensemble("triton", bidirectional=True)
    x = torch.randn(MEMBERS, 3, 2, 3)
    monkeypatch.setattr(vmap, "members_per_launch", lambda *_: 2)
    results = torch.func.vmap(call(module))(parameters, x)
    assert_like_the_loop(members, results, parameters, [((one,), {}) for one in x])


def test_an_ensemble_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = forward_pass.lstm_forward

    def counting(*given, **options):
        launched.append(tuple(argument("w_hh", real, *given, **options).shape))
        return real(*given, **options)

    monkeypatch.setattr(forward_pass, "lstm_forward", counting)
    _, module, parameters = ensemble("triton", bidirectional=True)
    torch.func.vmap(call(module), in_dims=(0, None))(parameters, torch.randn(3, 2, 3))
    assert launched == [(MEMBERS * 2, 16, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ensemble_with_states_and_shared_marks(backend: str) -> None:
    members, module, parameters = ensemble(backend, bidirectional=True)
    x, hx = torch.randn(3, 2, 3), (torch.randn(MEMBERS, 2, 2, 4), torch.randn(MEMBERS, 2, 2, 4))
    marks = dict(lengths=torch.tensor([3, 1]), reset=torch.rand(3, 2) < 0.5)

    def run(p, x, h, c):
        return call(module)(p, x, (h, c), **marks)

    results = torch.func.vmap(run, in_dims=(0, None, 0, 0))(parameters, x, *hx)
    calls = [((x, (hx[0][index], hx[1][index])), marks) for index in range(MEMBERS)]
    assert_like_the_loop(members, results, parameters, calls)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ensemble_with_lengths_of_its_members(backend: str) -> None:
    members, module, parameters = ensemble(backend, batch_first=True)
    x, lengths = torch.randn(2, 3, 3), torch.tensor([[3, 1], [0, 2], [2, 2]])
    results = torch.func.vmap(lambda p, n: call(module)(p, x, lengths=n))(parameters, lengths)
    assert_like_the_loop(members, results, parameters, [((x,), dict(lengths=n)) for n in lengths])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("recompute", ["none", "chunk:2"])
def test_over_inputs_only(backend: str, batch_first: bool, recompute: str) -> None:
    """Further rows of the batch; the weights' gradients sum over them."""
    module = LSTM(3, 4, bidirectional=True, batch_first=batch_first, backend=backend, recompute=recompute)
    x = torch.randn(3, 2, 5, 3, requires_grad=True)  # mapped over axis 1
    out, _ = torch.func.vmap(module, in_dims=1)(x)
    want = torch.stack([module(x[:, index])[0] for index in range(2)])
    torch.testing.assert_close(out, want)
    leaves = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(loss([out]), leaves), torch.autograd.grad(loss([want]), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ensemble_in_an_ensemble(backend: str) -> None:
    members, module, parameters = ensemble(backend)
    x = torch.randn(2, 3, 2, 3)  # two inputs for every member

    def run(p):
        return torch.func.vmap(lambda v: call(module)(p, v)[0])(x)

    out = torch.func.vmap(run)(parameters)
    for index, member in enumerate(members):
        torch.testing.assert_close(out[index], torch.stack([member(v)[0] for v in x]))
    nested = {name: torch.stack((p, 2 * p)) for name, p in parameters.items()}
    out = torch.func.vmap(torch.func.vmap(lambda p: call(module)(p, x[0])[0]))(nested)
    torch.testing.assert_close(out[0, 1], members[1](x[0])[0])
    doubled = {name: 2 * p for name, p in members[2].named_parameters()}
    torch.testing.assert_close(out[1, 2], torch.func.functional_call(members[2], doubled, (x[0],))[0])


def test_many_gradients_at_once() -> None:
    """vmap over the backward pass, as for a Jacobian."""
    module = LSTM(3, 4, backend="triton", precision="ieee")
    out, _ = module(torch.randn(2, 2, 3))
    rows = torch.eye(out.numel()).view(-1, *out.shape)[:3]

    def pull_back(row: Tensor) -> Tensor:
        return torch.autograd.grad(out, module.weight_hh_l0, row, retain_graph=True)[0]

    together = torch.func.vmap(pull_back)(rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index], pull_back(row))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_mode(options: dict) -> None:
    """By the path that has it, in plain PyTorch, chosen by "auto"; against reverse mode."""
    module = LSTM(3, 4, **options).double()
    x, tangent = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    out, derivative = torch.func.jvp(lambda v: module(v)[0], (x,), (tangent,))
    torch.testing.assert_close(out, module(x)[0])
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v)[0], x)
    torch.testing.assert_close(derivative, torch.tensordot(jacobian, tangent, dims=3))
    with torch.autograd.forward_ad.dual_level():
        out, _ = module(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, derivative)


def test_gradients_of_single_samples() -> None:
    """vmap(grad): what differential privacy asks for."""
    module = LSTM(3, 4, bidirectional=True)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 5, 3)  # 5 samples

    def of_sample(p: dict[str, Tensor], v: Tensor) -> Tensor:
        return loss([torch.func.functional_call(module, p, (v.unsqueeze(1),))[0]])

    grads = torch.func.vmap(torch.func.grad(of_sample), in_dims=(None, 1))(parameters, x)
    for index in range(5):
        want = torch.autograd.grad(loss([module(x[:, index : index + 1])[0]]), list(module.parameters()))
        for a, b in zip(grads.values(), want):
            torch.testing.assert_close(a[index], b)


def test_hessian() -> None:
    module = LSTM(2, 2).double()
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    ours = torch.func.hessian(lambda v: module(v)[0].square().sum())(x)
    theirs = torch.autograd.functional.hessian(lambda v: torch.nn.LSTM.forward(module, v)[0].square().sum(), x)
    torch.testing.assert_close(ours, theirs)
