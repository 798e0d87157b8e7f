"""What GPU tests are made with, where there is no GPU: that they test what they say."""

from __future__ import annotations

import layers
import pytest
import torch
from layers import assert_like, away_from_clips, use_configs, with_exact_products
from torch.utils._pytree import tree_leaves

from lstm_triton import LSTM
from lstm_triton.kernels.config import Config

STEPWISE = Config("stepwise", "none", True, False, 1, 16, 16, 16, 4)


def test_both_passes_take_the_configs_that_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"forward": Config("stepwise", "none", False, False, 1, 16, 16, 16, 4), "backward": STEPWISE}
    module = LSTM(3, 20, backend="triton", precision="ieee")
    with monkeypatch.context() as patch:
        noted = use_configs(patch, configs)
        module(torch.randn(3, 2, 3))[0].sum().backward()
    assert noted == list(configs.items())
    module(torch.randn(3, 2, 3))[0].sum().backward()
    assert len(noted) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_that_are_exact_in_any_order(dtype: torch.dtype) -> None:
    module = LSTM(64, 40, bidirectional=True).to(dtype)
    x = with_exact_products(module, 5, 9, 64)
    for suffix in ("l0", "l0_reverse"):
        w_ih, b_ih, b_hh = (
            getattr(module, f"{name}_{suffix}").detach() for name in ("weight_ih", "bias_ih", "bias_hh")
        )
        want = x.double() @ w_ih.double().t() + b_ih.double() + b_hh.double()
        for slices in (1, 2, 8, 64):  # each rounded to the type
            sums = b_ih + b_hh
            for a, b in zip(x.chunk(slices, -1), w_ih.chunk(slices, -1)):
                sums = sums + a @ b.t()
            assert torch.equal(sums.double(), want)
        assert want.unique().numel() > 20


def test_bits_first_then_a_few_roundings() -> None:
    one = torch.randn(8, dtype=torch.bfloat16)
    off = torch.nextafter(one, one + 1)
    assert_like([one, off], [one, one], bits=1)
    with pytest.raises(AssertionError, match="result 0"):
        assert_like([off], [one])
    with pytest.raises(AssertionError, match="not close"):
        assert_like([1.1 * one], [one], bits=0)


def test_inputs_away_from_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is drawn first has states near it; the one that is found has none, though many are clipped."""
    monkeypatch.setattr(layers, "NEAR", 1e-3)
    exact = LSTM(4, 64, cell_clip=0.05, zoneout=(0.2, 0.2), backend="torch").double()
    lengths = torch.tensor([9, 3, 7] * 7)
    x = away_from_clips(exact, 9, 21, 4, lengths=lengths)
    first = torch.randn(9, 21, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(x, first), "else nothing was looked for"
    assert exact.variant.cell_clip == 0.05
    torch.manual_seed(1)
    *_, states = exact(x.double(), lengths=lengths, return_states=("c",))
    cells = tree_leaves(states)[0].abs()
    assert (cells == 0.05).float().mean() > 0.01
    assert not ((cells - 0.05).abs() < 1e-5).logical_and(cells != 0.05).any()
    assert torch.equal(away_from_clips(LSTM(4, 8).double(), 9, 21, 4), first)
