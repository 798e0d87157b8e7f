"""Layers past the dispatcher: the same bits as the operator, and the operator wherever somebody looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import INPUTS, Case, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM
from lstm_triton.layer import eager
from lstm_triton.layer import op as ops
from lstm_triton.layer.records import Choices, Inputs, LayerResult, read

CASES = {
    "plain": Case(),
    "everything": Case(directions=2, lengths=True, reset=True, batch_first=True, peephole=True),
    "no-state": Case(state=False, seq_len=1),
}


def leaves_of(case: Case) -> dict[str, Tensor]:
    given = case.tensors()
    return {name: given[name].to(case.dtype).requires_grad_() for name in INPUTS if given[name] is not None}


def past_the_dispatcher(*arguments: Any) -> LayerResult:
    return eager.layer(*read(arguments, Inputs, Choices))


@pytest.mark.parametrize("keep", ["all", "cells", "chunk:2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_bits_as_the_operator(case: Case, keep: str) -> None:
    leaves, results = leaves_of(case), []
    for run in (past_the_dispatcher, ops.layer):
        out, h_n, c_n, *_ = run(*arguments(case, leaves, keep))
        assert out.requires_grad
        grads = torch.autograd.grad(out.square().sum() + (h_n * c_n).sum(), list(leaves.values()))
        results.append([out, h_n, c_n, *grads])
    for a, b in zip(*results):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_only_one_of_them_makes_a_graph() -> None:
    case = Case()
    inputs = arguments(case, leaves_of(case), "nothing")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not past_the_dispatcher(*inputs)[0].requires_grad
    detached = [one.detach() if isinstance(one, Tensor) else one for one in inputs]
    assert not past_the_dispatcher(*detached)[0].requires_grad
    with pytest.raises(RuntimeError, match="there is nothing to go back through"):
        past_the_dispatcher(*inputs)[0].sum().backward()


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators() -> None:
    module = LSTM(3, 4, backend="triton", precision="ieee")
    with Names() as names:
        out, _ = module(torch.randn(2, 2, 3))
        out.sum().backward()
    assert {"lstm_triton.layer.default", "lstm_triton.layer_backward.default"} <= set(names.seen)
    out, _ = module(torch.randn(2, 2, 3))
    with Names() as names:  # one that begins between the passes too
        out.sum().backward()
    assert "lstm_triton.layer_backward.default" in names.seen


def test_a_profiler_sees_the_operators() -> None:
    module = LSTM(3, 4, backend="triton", precision="ieee")
    with torch.profiler.profile() as profile:
        module(torch.randn(2, 2, 3))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"lstm_triton::layer", "lstm_triton::layer_backward"} <= names


def test_jacobians_at_once() -> None:
    module, x = LSTM(3, 4, backend="triton", precision="ieee"), torch.randn(2, 2, 3)
    found = [torch.autograd.functional.jacobian(lambda x: module(x)[0], x, vectorize=each) for each in (False, True)]
    torch.testing.assert_close(*found)


def test_a_lazily_negated_tensor_is_what_it_says() -> None:
    module = LSTM(3, 4, backend="triton", precision="ieee")
    x, h_0, c_0 = torch.randn(2, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    want = module(x, (h_0, c_0))[0]
    assert torch.equal(module(x, (torch._neg_view(-h_0), torch._neg_view(-c_0)))[0], want)
    zeros = torch._efficientzerotensor(want.shape)
    (grad,) = torch.autograd.grad(want, module.weight_hh_l0, zeros)
    assert not grad.any()


class Subclass(Tensor):
    pass


def test_who_looks_gets_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 2)
    assert eager.unobserved([x, None, torch.nn.Parameter(x)])
    assert not eager.unobserved([x.as_subclass(Subclass)])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not eager.unobserved([x])
    assert not eager.unobserved([fake])
    with Names():
        assert not eager.unobserved([x])
    with torch.overrides.TorchFunctionMode():
        assert not eager.unobserved([x])
    seen = []
    torch.func.vmap(lambda row: seen.append(eager.unobserved([x])) or row)(x)
    assert seen == [False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not eager.unobserved([x])


def test_a_traced_module_keeps_its_operator() -> None:
    """make_fx, as compilers and exporters call it, by proxies and fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module = LSTM(3, 4, backend="triton", precision="ieee").requires_grad_(False)
    graph = make_fx(lambda x: module(x)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(2, 2, 3))
    assert "lstm_triton.layer" in graph.code


@pytest.mark.parametrize("kept", ["all", "chunk:2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_many_backward_passes_at_once(case: Case, kept: str) -> None:
    """is_grads_batched=True, past the dispatcher and through the operator: what the passes give one by one."""
    for run in (past_the_dispatcher, ops.layer):
        leaves = leaves_of(case)
        out = run(*arguments(case, leaves, kept))[0]
        basis = torch.randn(3, *out.shape)
        given = list(leaves.values())
        found = torch.autograd.grad(out, given, basis, is_grads_batched=True, retain_graph=True, materialize_grads=True)
        for index, one in enumerate(basis):
            want = torch.autograd.grad(out, given, one, retain_graph=True, materialize_grads=True)
            for got, gradient in zip(found, want):
                torch.testing.assert_close(got[index], gradient, rtol=1e-4, atol=1e-5)
