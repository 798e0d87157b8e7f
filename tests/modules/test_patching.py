"""patch(model): the same objects, parameters, results and checkpoints; and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import LSTM, LSTMCell, patch, unpatch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 6, 2, bidirectional=True))
        self.decoder = nn.LSTM(12, 4, batch_first=True)
        self.cell = nn.LSTMCell(4, 4)
        self.gru = nn.GRU(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.encoder(x)
        out, _ = self.decoder(out)
        return self.cell(out[0])[0]


def test_the_same_model_with_another_lstm() -> None:
    model, x = Model(), torch.randn(7, 2, 3)
    want, state, parameters = model(x), copy.deepcopy(model.state_dict()), list(model.parameters())
    before = dict(model.named_modules())
    changes = patch(model)
    assert [(change.name, change.kind, change.left) for change in changes] == [
        ("encoder.1", "LSTM", ""),
        ("decoder", "LSTM", ""),
        ("cell", "LSTMCell", ""),
    ]
    assert [type(m) for m in (model.encoder[1], model.decoder, model.cell, model.gru)] == [LSTM, LSTM, LSTMCell, nn.GRU]
    assert all(module is before[name] for name, module in model.named_modules())
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert torch.equal(model(x), want)
    model.load_state_dict(state)
    assert patch(model) == [], "nothing is left to patch"
    assert [change.name for change in unpatch(model)] == ["encoder.1", "decoder", "cell"]
    assert type(model.decoder) is nn.LSTM
    assert vars(model.decoder).keys() == vars(nn.LSTM(12, 4)).keys()
    assert torch.equal(model(x), want)
    assert unpatch(model) == []


def test_the_kernels_run_after_patching() -> None:
    model, x = Model(), torch.randn(4, 2, 3)
    want = model(x)
    patch(model, backend="triton", precision="ieee")
    assert model.decoder.backend == "triton"
    assert "triton" in str(lstm_triton.explain(model.decoder, torch.randn(2, 4, 12)))
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    model(x).sum().backward()
    assert model.encoder[1].weight_hh_l1_reverse.grad is not None


def test_a_model_that_is_an_lstm_itself() -> None:
    model = nn.LSTM(3, 4)
    (change,) = patch(model)
    assert str(change) == "(the model): LSTM"
    assert type(model) is LSTM


def test_include_exclude_and_dry_run() -> None:
    model = Model()
    changes = patch(model, include=["encoder.*", "decoder"], exclude="decoder", dry_run=True)
    assert [change.left for change in changes] == ["", "excluded", "not included"]
    assert type(model.encoder[1]) is nn.LSTM
    patch(model, include=["encoder.*", "decoder"], exclude="decoder")
    assert [type(m) for m in (model.encoder[1], model.decoder, model.cell)] == [LSTM, nn.LSTM, nn.LSTMCell]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(include="enkoder.*"), "no LSTM's name matches 'enkoder.*'; there are 'encoder.1', 'decoder', 'cell'"),
        (dict(exclude=["gru"]), "no LSTM's name matches 'gru'"),
        (dict(backend="cuda"), "backend should be one of"),
        (dict(precision="bf16"), "precision should be one of"),
    ],
)
def test_wrong_arguments_change_nothing(options: dict, complaint: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=complaint.replace("*", r"\*")):
        patch(model, **options)
    assert type(model.decoder) is nn.LSTM


def test_subclasses_and_parametrized_modules_are_left_and_named() -> None:
    class Special(nn.LSTM):
        pass

    weighted = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    model = nn.ModuleList([Special(3, 4), weighted, nn.LSTM(3, 4)])
    lefts = [change.left for change in patch(model)]
    assert lefts[0] == "a subclass may do more than PyTorch's forward"
    assert lefts[1] == "it is parametrized: patch first, parametrize afterwards"
    assert lefts[2] == ""
    assert type(model[0]) is Special


def test_hooks_optimizers_and_checkpoints_survive(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.decoder.register_forward_hook(lambda *_: seen.append(1))
    patch(model)
    before = model.decoder.weight_hh_l0.clone()
    model(torch.randn(3, 2, 3)).sum().backward()
    optimizer.step()
    assert seen == [1]
    assert not torch.equal(model.decoder.weight_hh_l0, before)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    Model().load_state_dict(torch.load(tmp_path / "model.pt"))
    again = copy.deepcopy(model)
    assert type(again.decoder) is LSTM


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell])
def test_a_replaced_forward_is_said_to_be_in_the_way(kind: type[nn.Module]) -> None:
    """As hooks leave it that wrap the forward of an instance: it would go on calling PyTorch's."""
    model = nn.Sequential(kind(4, 4), kind(4, 4))
    theirs = model[0].forward
    model[0].forward = lambda *arguments: theirs(*arguments)
    changes = patch(model)
    assert "something has replaced its own forward" in str(changes[0])
    assert [type(module) is kind for module in model] == [True, False]
