"""The variants of the cell on a CUDA device: against PyTorch's path, in graphs, in every memory mode."""

from __future__ import annotations

import pytest
import torch
from layers import away_from_clips
from torch import Tensor

from lstm_triton import LSTM

pytestmark = pytest.mark.gpu
VARIANTS = {
    "peephole": dict(peephole=True),
    "layer_norm": dict(layer_norm=True),
    "zoneout": dict(zoneout=(0.2, 0.3)),
    "recurrent_dropout": dict(recurrent_dropout=0.3),
    "variational_dropout": dict(variational_dropout=0.3),
    "coupled_gates": dict(coupled_gates=True),
    "clips": dict(cell_clip=0.2, recurrent_grad_clip=0.1),
}
VARIANTS["everything"] = {name: value for variant in VARIANTS.values() for name, value in variant.items()}
del VARIANTS["everything"]["coupled_gates"]


def results(module: LSTM, x: Tensor, **marks: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    out, (h_n, c_n) = module(x, **marks)
    return [out, h_n, c_n, *torch.autograd.grad(out.square().sum() + (h_n * c_n).sum(), [x, *module.parameters()])]


def pair(variant: dict, hidden_size: int, **options) -> tuple[LSTM, LSTM]:
    torch.manual_seed(0)
    ours = LSTM(32, hidden_size, bidirectional=True, backend="triton", precision="ieee", **variant, **options).cuda()
    theirs = LSTM(32, hidden_size, bidirectional=True, backend="torch", **variant).double().cuda()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("hidden_size", [40, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_against_fp64(variant: str, hidden_size: int) -> None:
    """The same masks on both paths; the tolerance is plain PyTorch's own error in fp32, as everywhere."""
    ours, theirs = pair(VARIANTS[variant], hidden_size)
    plain = LSTM(32, hidden_size, bidirectional=True, backend="torch", **VARIANTS[variant]).cuda()
    plain.load_state_dict(ours.state_dict())
    marks = {
        "lengths": torch.randint(0, 10, (20,), device="cuda"),
        "reset": torch.rand(9, 20, device="cuda") < 0.2,
    }
    x = away_from_clips(theirs, 9, 20, 32, **marks)
    truth = results(theirs, x.double(), **marks)
    for want, own, found in zip(truth, results(plain, x, **marks), results(ours, x, **marks)):
        scale = want.square().mean().sqrt()
        error, allowed = ((got.double() - want).square().mean().sqrt() / scale for got in (found, own))
        assert error <= 2 * max(float(allowed), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("recompute", ["gates", "chunk:4"])
def test_memory_modes_draw_the_same_masks(recompute: str) -> None:
    plain, exact = pair(VARIANTS["everything"], 300)
    frugal, _ = pair(VARIANTS["everything"], 300, recompute=recompute)
    x = away_from_clips(exact, 9, 20, 32)
    for a, b in zip(results(frugal, x), results(plain, x)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("hidden_size", [64, 512])
def test_graphs_draw_new_masks(hidden_size: int) -> None:
    module, _ = pair(VARIANTS["everything"], hidden_size)
    x = torch.randn(7, 9, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module(x)[0].sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)[0]
    graph.replay()
    first = out.clone()
    graph.replay()
    assert torch.isfinite(out).all()
    assert not torch.equal(first, out)
