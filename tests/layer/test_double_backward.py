"""Gradients of gradients: by plain PyTorch, chosen where create_graph=True asks for them, never silently wrong."""

from __future__ import annotations

import pytest
import torch

from lstm_triton import LSTM

OPTIONS = {
    "plain": ({}, {}),
    "everything": (
        dict(bidirectional=True, batch_first=True),
        dict(lengths=torch.tensor([3, 2]), reset=torch.tensor([[False, True, False], [True, False, False]])),
    ),
    "projection": (dict(proj_size=2, bias=False), {}),
    "layers": (dict(num_layers=2, bias=False), {}),
}


def module_and_inputs(options: dict) -> tuple[LSTM, list[torch.Tensor]]:
    torch.manual_seed(0)
    module = LSTM(2, 3, **options, backend="triton", precision="ieee").double()
    steps = (2, 3) if options.get("batch_first") else (3, 2)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = ((*steps, 2), (count, 2, options.get("proj_size", 3)), (count, 2, 3))
    return module, [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize(("options", "call"), OPTIONS.values(), ids=OPTIONS)
def test_gradgradcheck(options: dict, call: dict) -> None:
    module, inputs = module_and_inputs(options)
    names, parameters = zip(*module.named_parameters())

    def run(x, h, c, *weights):
        out, state = torch.func.functional_call(module, dict(zip(names, weights)), (x, (h, c)), call)
        return out, *state

    leaves = [*inputs, *(parameter.detach().requires_grad_() for parameter in parameters)]
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("options", "call"), OPTIONS.values(), ids=OPTIONS)
def test_the_first_gradient_is_the_same_with_a_graph(options: dict, call: dict) -> None:
    module, (x, h, c) = module_and_inputs(options)
    leaves = [x, h, c, *module.parameters()]
    by_kernels, with_graph = (
        torch.autograd.grad(module(x, (h, c), **call)[0].square().sum(), leaves, create_graph=graph)
        for graph in (False, True)
    )
    for a, b in zip(by_kernels, with_graph):
        torch.testing.assert_close(a, b)
        assert b.requires_grad
        assert not a.requires_grad


def test_a_gradient_penalty_trains() -> None:
    """The use: the norm of the input's gradient is part of the loss (WGAN-GP)."""
    module, (x, _, _) = module_and_inputs({})
    out, _ = module(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (out.mean() + (gradient.norm() - 1).square()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
