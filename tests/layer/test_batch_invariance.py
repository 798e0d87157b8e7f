"""batch_invariant=True: the same bits whatever the other rows, however many, and wherever the sequence is cut."""

from __future__ import annotations

import pytest
import torch

from lstm_triton import LSTM
from lstm_triton.kernels.matmul import matmul
from lstm_triton.layer import choice as layer
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.problem import Problem
from lstm_triton.testing.interpreter import ordered_dots

ROWS, STEPS = 33, 3


def build(dtype: torch.dtype, **options) -> LSTM:
    return LSTM(5, 20, 2, backend="triton", precision="ieee", batch_invariant=True, **options).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(bidirectional=True), dict(proj_size=6), dict(recompute="gates"), dict(recompute="chunk:2")],
    ids=str,
)
def test_company_does_not_matter(dtype: torch.dtype, options: dict) -> None:
    module = build(dtype, **options)
    x = torch.randn(STEPS, ROWS, 5).to(dtype).requires_grad_()
    with ordered_dots():
        out, (h_n, c_n) = module(x)
        grad = torch.autograd.grad(out.sum(), x)[0]
        for rows in ([20], [32, 20, 1], list(range(20, 33))):
            some = x.detach()[:, rows].requires_grad_()
            own, (h, c) = module(some)
            place = rows.index(20)
            assert torch.equal(own[:, place], out[:, 20])
            assert torch.equal(h[:, place], h_n[:, 20])
            assert torch.equal(c[:, place], c_n[:, 20])
            assert torch.equal(torch.autograd.grad(own.sum(), some)[0][:, place], grad[:, 20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sequence_can_be_cut_anywhere(dtype: torch.dtype) -> None:
    module = build(dtype)
    x = torch.randn(STEPS, 3, 5).to(dtype)
    with ordered_dots(), torch.no_grad():
        whole, (h_n, c_n) = module(x)
        assert c_n.dtype == torch.float32
        assert h_n.dtype == dtype
        for cut in (1, 2):
            first, state = module(x[:cut])
            second, (h, c) = module(x[cut:], state)
            assert torch.equal(torch.cat((first, second)), whole)
            assert torch.equal(h, h_n)
            assert torch.equal(c, c_n)


def test_one_config_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the planner has several: on an H100."""
    monkeypatch.setattr(layer, "kernel_device", lambda device: KNOWN["sm_90"])
    w_hh = torch.empty(1, 4096, 1024, device="meta", dtype=torch.bfloat16)
    options = layer.Options(batch_invariant=True, precision="tf32")
    inputs = [layer.Inputs(x=w_hh.new_empty(2, batch, 8), w_ih=w_hh, w_hh=w_hh) for batch in (1, 16, 100, 1000)]
    invariant = {layer.choose_plan("forward", v, options).config for v in inputs}
    assert len(invariant) == 1
    plans = {
        layer.plan_for(Problem("forward", 1024, batch, 1, "bfloat16", "tf32"), KNOWN["sm_90"]).config
        for batch in (1, 16, 100, 1000)
    }
    assert len(plans) > 1, "else there is nothing to prove"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 33, 70), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_matmul(dtype: torch.dtype, sizes: tuple[int, int, int], bias: bool) -> None:
    rows, depth, width = sizes
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(width, depth).to(dtype).t()
    c = torch.randn(width).to(dtype) if bias else None
    want = a.double() @ b.double() + (0 if c is None else c.double())
    own = (a @ b + (0 if c is None else c)).double() - want
    ours = matmul(a, b, c).double() - want
    assert ours.abs().max() <= 2 * own.abs().max() + torch.finfo(dtype).eps * want.abs().max()


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="batch_invariant is asked for, and the kernels do not run: the tensors are"):
        LSTM(3, 4, batch_invariant=True)(torch.randn(2, 2, 3))
    assert "batch_invariant=True" in repr(LSTM(3, 4, batch_invariant=True))
