"""What backward computes outside the recurrence: the recurrent weights' gradient without a copy of every h_{t-1}."""

from __future__ import annotations

import pytest
import torch

from lstm_triton.layer.sequence import previous_hidden, recurrent_weight_gradient


@pytest.mark.parametrize("order", ["forward", "reverse", "both"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 3]])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("seq_len", [1, 5])
def test_as_from_what_every_step_has_read(order: str, lengths: list | None, state: bool, seq_len: int) -> None:
    generator, sets, batch, hidden_size = torch.Generator().manual_seed(0), 4, 4, 3

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dgates, out = draw(seq_len, batch, sets, 4 * hidden_size), draw(seq_len, batch, sets, hidden_size)
    h_0 = draw(sets, batch, hidden_size) if state else None
    within = None if lengths is None else torch.tensor(lengths).clamp(max=seq_len)
    if within is not None:
        beyond = (torch.arange(seq_len)[:, None] >= within)[..., None, None]
        dgates, out = dgates.masked_fill(beyond, 0), out.masked_fill(beyond, 0)
    before = previous_hidden(out.flatten(2), h_0, within, None, None, sets, order, False)
    want = torch.einsum("rsg,rsh->sgh", dgates.flatten(0, 1), before)
    torch.testing.assert_close(recurrent_weight_gradient(dgates, out, h_0, within, order), want)
