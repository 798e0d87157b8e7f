"""`watch` sees what is there, names every provoked symptom, and leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import LSTM, diagnostics
from lstm_triton.diagnostics import watch
from lstm_triton.recipes import debugging


@pytest.fixture(scope="module")
def troubles(tmp_path_factory) -> list[debugging.Trouble]:
    out = str(tmp_path_factory.mktemp("out"))
    return debugging.Clinic(debugging.parse(["--small", "--quiet", "--out", out])).troubles()


def test_every_symptom_is_diagnosed_and_gone_with_its_cure(troubles) -> None:
    assert {trouble.kind for trouble in troubles} == {
        "flat loss", "oscillating loss", "not finite", "plateau", "gradient lost over time", "exploding gradient",
        "saturated gate", "dead units", "state not detached",
    }  # fmt: skip
    for trouble in troubles:
        assert trouble.diagnosed, trouble.name
        assert trouble.gone, trouble.name


def test_advice_for_every_finding(troubles) -> None:
    for trouble in troubles:
        for finding in trouble.found:
            assert finding.advice
            assert finding.kind in str(finding)


def loss_of(result) -> torch.Tensor:
    output, (h_n, c_n) = result
    output = getattr(output, "data", output)
    return output.square().mean() + h_n.sum() + c_n.sum()


LENGTHS = torch.tensor([5, 2, 4])
FORMS = {
    "padded": lambda x: dict(input=x),
    "lengths": lambda x: dict(input=x, lengths=LENGTHS),
    "unbatched": lambda x: dict(input=x[0]),
    "packed": lambda x: dict(input=pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)),
    "state": lambda x: dict(input=x, hx=(torch.ones(4, 3, 4), torch.ones(4, 3, 4))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_results_and_gradients_are_the_same(form: str, wants_gradient: bool) -> None:
    torch.manual_seed(0)
    lstm = LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    found = []
    for watched in (False, True):
        x = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(wants_gradient)
        lstm.zero_grad()
        if watched:
            with watch(lstm) as seen:
                result = lstm(**FORMS[form](x))
                loss_of(result).backward()
        else:
            result = lstm(**FORMS[form](x))
            loss_of(result).backward()
        assert len(result) == 2
        found.append(
            [loss_of(result).detach(), *([x.grad] if wants_gradient else []), *(p.grad for p in lstm.parameters())]
        )
    torch.testing.assert_close(*found)
    assert set(seen.layers) == {"[0]", "[1]"}
    assert seen.layers["[1]"].saturation.shape == (2, 4, 4)
    assert seen.input_gradients[""].shape == (5,)
    assert not lstm._forward_hooks
    assert not lstm._forward_pre_hooks


def test_gradients_by_step_and_by_parameter() -> None:
    torch.manual_seed(0)
    lstm = LSTM(3, 4)
    x = torch.randn(6, 2, 3, requires_grad=True)
    with watch(lstm) as seen:
        loss_of(lstm(x)).backward()
    torch.testing.assert_close(seen.input_gradients[""], x.grad.flatten(1).norm(dim=1))
    for name, parameter in lstm.named_parameters():
        torch.testing.assert_close(seen.parameters[name], parameter.grad.norm())


def test_statistics_leave_padding_out() -> None:
    """A row by itself, and the same row twice, one of them padded with a long tail."""
    torch.manual_seed(0)
    lstm, x = LSTM(3, 4, batch_first=True), 5 * torch.randn(1, 4, 3)
    found = []
    for given in (dict(input=x), dict(input=torch.cat((x, torch.zeros(1, 9, 3)), 1), lengths=torch.tensor([4]))):
        with watch(lstm) as seen, torch.no_grad():
            lstm(**given)
        found.append(seen.layers["[0]"])
    torch.testing.assert_close(found[0].saturation, found[1].saturation)
    torch.testing.assert_close(found[0].spread, found[1].spread)
    torch.testing.assert_close(found[0].c, found[1].c[:4])
    _, _, states = lstm(x, return_states=("c", "gates"))
    gates = states.gates[0][0, :, 0].detach()  # [T, 4, H]
    share = ((gates[:, 1] < diagnostics.CLOSED) | (gates[:, 1] > diagnostics.OPEN)).float().mean(0)
    torch.testing.assert_close(found[0].saturation[0, 1], share)
    torch.testing.assert_close(found[0].c[:, 0], states.c[0][0].detach().square().mean(1).sqrt())


def test_states_that_were_asked_for_are_given() -> None:
    lstm = LSTM(3, 4)
    with watch(lstm):
        for asked in ("c", ("layers",)):
            _, _, states = lstm(torch.randn(2, 1, 3), return_states=asked)
            assert states._asdict()[asked if isinstance(asked, str) else asked[0]]


def test_nn_lstm_is_watched_and_stays_what_it_is() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 4), "ours": LSTM(4, 4, recompute="gates")})
    before = model["encoder"](torch.ones(2, 1, 3))[0]
    with watch(model) as seen:
        output, _ = model["ours"](model["encoder"](torch.ones(2, 1, 3))[0])
        output.sum().backward()
    assert type(model["encoder"]) is nn.LSTM
    assert model["ours"].recompute == "gates"
    assert set(seen.layers) == {"encoder[0]", "ours[0]"}
    torch.testing.assert_close(model["encoder"](torch.ones(2, 1, 3))[0], before)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(ZeroDivisionError), watch(model):
        raise ZeroDivisionError
    assert type(model[0]) is nn.LSTM
    assert not model[0]._forward_hooks


class Own(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(1, 1), ValueError, "no LSTM in Linear"),
        (nn.Sequential(Own(1, 1)), TypeError, "0 is a Own, a subclass"),
    ],
)
def test_what_cannot_be_watched(model: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message), watch(model):
        pass
    with pytest.raises(TypeError):
        watch(LSTM(1, 1), vanishng=1)


def test_a_detached_state_and_a_decoder_are_no_leak() -> None:
    """A state with a graph is a fault only once that graph has been through a backward pass."""
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4)])
    x = torch.randn(4, 2, 3)
    with watch(model) as seen:
        for _ in range(2):
            _, state = model[0](x)
            model[1](x, state)[0].sum().backward()
    assert not seen.loose
    with watch(model[0]) as seen:
        _, state = model[0](x)
        state[0].sum().backward(retain_graph=True)
        model[0](x, state)
    assert [finding.kind for finding in seen.findings() if finding.kind == "state not detached"]


def test_a_parameter_without_a_gradient_and_one_that_is_nan() -> None:
    model = nn.ModuleDict(
        {"lstm": LSTM(3, 4), "unused": nn.Linear(1, 1), "frozen": nn.Linear(1, 1).requires_grad_(False)}
    )
    with watch(model) as seen:
        (model["lstm"](torch.full((2, 1, 3), math.nan))[0].sum()).backward()
    kinds = {(finding.kind, finding.where) for finding in seen.findings()}
    assert ("no gradient", "unused.weight") in kinds
    assert ("not finite", "gradient of lstm.weight_hh_l0") in kinds
    assert ("not finite", "cell state of lstm[0]") in kinds
    assert not any("frozen" in where for _, where in kinds)


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([1.0] * 20, "flat loss"),
        ([1.0, 0.1] * 10, "oscillating loss"),
        ([4.0 * 0.5**k for k in range(6)] + [0.12] * 30, "plateau"),
        ([1.0, 2.0, math.nan], "not finite"),
        ([1.0, math.inf] + [1.0] * 9, "not finite"),
        ([0.95**k for k in range(60)], None),
        ([3.0, 2.0], None),
        ([], None),
    ],
)
def test_curves_of_losses(losses: list[float], kind: str | None) -> None:
    assert [finding.kind for finding in diagnostics.of_losses(losses)] == ([kind] if kind else [])


def test_kept_bytes_are_those_of_the_readme() -> None:
    lstm = LSTM(8, 16, num_layers=2, bidirectional=True)
    kept = diagnostics.kept_bytes(lstm, seq_len=25, batch=4)
    rows = 25 * 4 * 2 * 2 * 16 * 4
    assert kept == {"none": 6 * rows, "gates": 2 * rows, "chunk:5": rows + 5 * 4 * 2 * 2 * 16 * 8}


def test_report_and_figure() -> None:
    torch.manual_seed(0)
    model = debugging.Averager(layers=2)
    x, levels = debugging.draw(6, 4, torch.Generator().manual_seed(0))
    with watch(model) as seen:
        (model(x) - levels).square().mean().backward()
    report = seen.report()
    assert report.startswith("nothing suspicious")
    assert "lstm[1]" in report
    assert "lstm.weight_hh_l1" in report
    figure = seen.figure()
    assert [axis.get_title() for axis in figure.axes] == [
        "gradient norm by parameter", "gradient of the input, by step", "saturated values of each gate",
        "root mean square of the states",
    ]  # fmt: skip
