"""What is decided once for calls that are alike, and what makes it decided anew."""

from typing import Any

import pytest
import torch
import triton
from engines import Engine
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM, functional
from lstm_triton.functional import stack
from lstm_triton.kernels import launch
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.launch import LaunchRefused
from lstm_triton.layer import eager, op
from lstm_triton.layer import forward as forward_pass
from lstm_triton.planning import memory, route, settings, store
from lstm_triton.planning.device import INTERPRETER
from lstm_triton.planning.problem import Problem
from lstm_triton.planning.table import NO_TABLE


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that something of a call is decided."""
    seen: list[str] = []

    def noting(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **options: (seen.append(name), real(*given, **options))[1])

    noting(stack, "decide")
    noting(forward_pass, "pass_of")
    noting(op.backward_pass, "pass_of")
    return seen


def step(module: LSTM, x: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
    out = module(x, state or None)[0]
    out.sum().backward()
    return out


def test_a_call_like_the_last_one_is_not_decided_again(decided: list[str]) -> None:
    module, x = LSTM(3, 4, 2, backend="triton"), torch.randn(2, 2, 3)
    first = step(module, x)
    assert decided == ["decide", *["pass_of"] * 4]
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    again = step(module, x.clone())
    assert decided == ["decide", *["pass_of"] * 4]
    assert torch.equal(first, again)
    assert all(torch.equal(parameter.grad, want) for parameter, want in zip(module.parameters(), gradients))


CHANGES = {
    "length": lambda module, x: module(torch.cat((x, x))),
    "batch": lambda module, x: module(torch.cat((x, x), 1)),
    "state": lambda module, x: module(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))),
    "type of c": lambda module, x: module(x, (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())),
    "lengths": lambda module, x: module(x, lengths=torch.tensor([1, 2])),
    "resets": lambda module, x: module(x, reset=torch.zeros(2, 2, dtype=torch.bool)),
    "states": lambda module, x: module(x, return_states=["c"]),
    "evaluation": lambda module, x: module.eval()(x),
    "option": lambda module, x: (setattr(module, "recompute", "gates"), module(x)),
    "order": lambda module, x: (setattr(module, "batch_first", True), module(x)),
    "type": lambda module, x: module.double()(x.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_differs_is_decided(change, decided: list[str]) -> None:
    module, x = LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    module(x)
    decided.clear()
    change(module, x)
    assert decided[0] == "decide"


def test_weights_are_those_of_the_moment() -> None:
    module, other, x = LSTM(3, 4, backend="triton"), LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    want = other(x)[0]
    module(x)
    assert torch.equal(torch.func.functional_call(module, dict(other.named_parameters()), (x,))[0], want)
    assert not torch.equal(module(x)[0], want)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x)[0], want)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(0)
    assert not torch.allclose(module(x)[0], want)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that does not start at a multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("options", [dict(), dict(layer_norm=True, recompute="gates")], ids=["plain", "variant"])
def test_a_binary_for_aligned_pointers_gets_no_others(
    engine: Engine, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the caller, nor from hooks that have put saved tensors elsewhere."""
    real = launch.again

    def noticing(binary: Any, grid: launch.Grid, arguments: list[Any]) -> None:
        pointers = [tensor.data_ptr() for tensor in tree_leaves(arguments) if isinstance(tensor, torch.Tensor)]
        assert not any(pointer % 16 for pointer in pointers)
        real(binary, grid, arguments)

    monkeypatch.setattr(launch, "again", noticing)
    module = LSTM(8, 16, backend="triton", **options).half()
    x, state = torch.randn(2, 3, 8).half(), (torch.randn(1, 3, 16).half(), torch.randn(1, 3, 16).half())

    def run(move) -> list[torch.Tensor]:
        given = [move(tensor).requires_grad_() for tensor in (x, *state)]
        out, (h_n, c_n) = module(given[0], (given[1], given[2]))
        pairs = [move(tensor.detach()) for tensor in (out, h_n, c_n)]
        return [out, *torch.autograd.grad((out, h_n, c_n), [*given, *module.parameters()], pairs)]

    with engine():
        want = run(torch.clone)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unaligned):
            found = run(unaligned)
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)


def test_a_gradient_is_kept_for_when_it_is_asked_for() -> None:
    module, x = LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    with torch.no_grad():
        assert not module(x)[0].requires_grad
    out = module(x)[0]
    out.sum().backward()
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    assert module(x.requires_grad_())[0].requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("marks", [dict(return_states=["gates"]), dict(lengths=torch.tensor([2, 1]))], ids=str)
def test_training_after_validation(backend: str, marks: dict) -> None:
    """Where no gradient is recorded a cell without one is a plain cell."""
    module = LSTM(3, 4, recurrent_grad_clip=1e-4, backend=backend)
    with torch.no_grad():
        module(torch.ones(2, 2, 3), **marks)
    module(torch.ones(2, 2, 3), **marks)[0].sum().backward()
    assert module.weight_hh_l0.grad.abs().max() < 1e-3


ERRORS = {
    "no pair": (RuntimeError, lambda module, x: module(x, (torch.zeros(1, 2, 4),) * 3)),
    "no tensors": (Exception, lambda module, x: module(x, (None, None))),
    "one tensor": (TypeError, lambda module, x: module(x, torch.zeros(2, 1, 2, 4))),
    "no names": (ValueError, lambda module, x: module(x, return_states=[["c"]])),
    "nothing": (Exception, lambda module, x: module(x, ())),
    "size": (RuntimeError, lambda module, x: module(x, (torch.zeros(1, 3, 4),) * 2)),
    "inputs": (RuntimeError, lambda module, x: module(torch.randn(2, 2, 5))),
    "no steps": (RuntimeError, lambda module, x: module(x[:0])),
    "list": (TypeError, lambda module, x: module(x, lengths=[1, 2])),
    "too long": (RuntimeError, lambda module, x: module(x, lengths=torch.tensor([1, 3]))),
}


@pytest.mark.parametrize(("error", "call"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_an_error_each_time(error: type[Exception], call) -> None:
    module, x = LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    module(x)
    module(x, (torch.zeros(1, 2, 4),) * 2)
    module(x, lengths=torch.tensor([1, 2]))
    for _ in range(2):
        with pytest.raises(error):
            call(module, x)
    module(x)


def test_who_observes_sees_every_call() -> None:
    module, x = LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    module(x)
    with torch.profiler.profile() as profile:
        module(x)
    assert any("lstm_triton::layer" in event.key for event in profile.key_averages())
    with torch.autocast("cpu", dtype=torch.float16):
        assert module(x)[0].dtype == torch.float16
    out = torch.func.vmap(module)(torch.stack((x, x)))[0]
    assert torch.allclose(out[0], module(x)[0])
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))


def test_what_surrounds_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = memory.memory()
    assert memory.memory() is now
    for variable in settings.VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(variable.name, "another")
            assert memory.memory() is not now, variable.name
        assert memory.memory() is now
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", object())
        assert memory.memory() is not now
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        assert memory.memory() is not now
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert memory.memory() is not now


FORGETTING = {
    "a table": lambda: store.using(NO_TABLE, INTERPRETER).__enter__(),
    "a wrong config": lambda: route.leave_out(
        Problem("forward", 4, 1, 1, "float32", "ieee"), INTERPRETER, Config.decode(LOCAL), "wrong"
    ),
    "a refused launch": lambda: route.without_waiting(torch.device("cpu"), LaunchRefused("no")),
}
LOCAL = (
    "placement=local protocol=none resident=True units_first=False split_k=1 block_b=16 block_h=16 block_k=16 "
    "num_warps=4 num_stages=1 max_batch_tiles=0"
)


@pytest.mark.parametrize("happens", FORGETTING.values(), ids=FORGETTING)
def test_everything_is_forgotten(happens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "_wrong", {})
    monkeypatch.setattr(store, "_IN_USE", {})
    monkeypatch.setattr("lstm_triton.planning.device._refused", set())
    now = memory.memory()
    assert now.stands
    happens()
    assert not now.stands
    assert memory.memory() is not now


def test_a_backward_pass_is_decided_anew_where_that_has_changed(decided: list[str]) -> None:
    module, x = LSTM(3, 4, backend="triton"), torch.randn(2, 2, 3)
    step(module, x)
    out = module(x)[0]
    decided.clear()
    memory.forget()
    out.sum().backward()
    assert decided == ["pass_of"]


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST", 8)
    module = LSTM(3, 4, backend="triton")
    with torch.no_grad():
        for seq_len in range(1, 20):
            module(torch.randn(seq_len, 1, 3))
    assert len(memory.memory()) <= 11, "a call adds less than four"


def test_functional_calls_too(decided: list[str]) -> None:
    x, weights = torch.randn(2, 2, 3), [torch.randn(16, 3), torch.randn(16, 4)]
    results = [functional.lstm(x, None, weights, bias=False, backend="triton")[0] for _ in range(2)]
    assert decided == ["decide", "pass_of"]
    assert torch.equal(*results)
    functional.lstm(x, None, [weight.as_subclass(Labelled) for weight in weights], bias=False, backend="triton")
    assert decided == ["decide", "pass_of", "decide", "pass_of"]
    assert not eager.unobserved([x.as_subclass(Labelled)])


class Labelled(torch.Tensor):
    pass
