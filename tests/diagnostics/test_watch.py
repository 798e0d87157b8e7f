"""`watch` sees what is there, names every provoked symptom, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import LSTM, diagnostics
from lstm_triton.diagnostics import statistics, watch
from lstm_triton.recipes import debugging


@pytest.fixture(scope="module")
def troubles(tmp_path_factory) -> list[debugging.Trouble]:
    out = str(tmp_path_factory.mktemp("out"))
    return debugging.Clinic(debugging.parse(["--small", "--out", out])).troubles()


def test_every_symptom_is_diagnosed_and_gone_with_its_cure(troubles) -> None:
    assert {trouble.kind for trouble in troubles} == {
        "flat loss", "oscillating loss", "not finite", "plateau", "gradient lost over time", "gradient grown over time",
        "vanishing gradient", "exploding gradient", "saturated gate", "dead units", "state not detached",
    }  # fmt: skip
    for trouble in troubles:
        assert trouble.diagnosed, trouble.name
        assert trouble.gone, trouble.name


@pytest.mark.parametrize(
    ("norm", "kind"), [(0.9e-6, "vanishing gradient"), (1.1e-6, ""), (0.9e3, ""), (1.1e3, "exploding gradient")]
)
def test_norms_of_parameters_on_either_side_of_the_limits(norm: float, kind: str) -> None:
    lstm = LSTM(2, 3)
    seen = diagnostics.Seen(lstm, diagnostics.Thresholds())
    seen.parameters = {name: torch.tensor(norm) for name, _ in lstm.named_parameters()}
    assert {finding.kind for finding in seen.findings()} == ({kind} if kind else set())
    assert len(seen.findings()) == (4 if kind else 0)


@pytest.mark.parametrize(
    ("norms", "kind"),
    [
        ([0.9e-6, 0.5, 1.0], "gradient lost over time"),
        ([1.1e-6, 0.5, 1.0], ""),
        ([1.1e3, 5.0, 1.0], "gradient grown over time"),
        ([0.9e3, 5.0, 1.0], ""),
    ],
)
def test_norms_by_step_on_either_side_of_the_limits(norms: list[float], kind: str) -> None:
    seen = diagnostics.Seen(LSTM(2, 3), diagnostics.Thresholds())
    seen.input_gradients, seen.both_ways = {"": torch.tensor(norms)}, {"": False}
    assert [finding.kind for finding in seen.findings()] == ([kind] if kind else [])


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
    lstm, x = LSTM(3, 4, batch_first=True), 5 * torch.randn(1, 9, 3)
    found = []
    for given in (dict(input=x), dict(input=torch.cat((x, torch.zeros(1, 9, 3)), 1), lengths=torch.tensor([9]))):
        with watch(lstm) as seen, torch.no_grad():
            lstm(**given)
        found.append(seen.layers["[0]"])
    torch.testing.assert_close(found[0].saturation, found[1].saturation)
    torch.testing.assert_close(found[0].spread, found[1].spread)
    torch.testing.assert_close(found[0].c, found[1].c)
    _, _, states = lstm(x, return_states=("c", "gates"))
    gates = states.gates[0][0, :, 0].detach()  # [T, 4, H]
    share = ((gates[:, 1] < statistics.CLOSED) | (gates[:, 1] > statistics.OPEN)).float().mean(0)
    torch.testing.assert_close(found[0].saturation[0, 1], share)
    torch.testing.assert_close(found[0].c[:, 0], states.c[0][0].detach().square().mean(1).sqrt())


def test_states_that_were_asked_for_are_given() -> None:
    lstm = LSTM(3, 4)
    with watch(lstm):
        for asked in ("c", ("layers",)):
            _, _, states = lstm(torch.randn(2, 1, 3), return_states=asked)
            names = {name for name, found in states._asdict().items() if found is not None}
            assert names == {asked if isinstance(asked, str) else asked[0]}
        with pytest.raises(TypeError):
            lstm(torch.randn(2, 1, 3), None, torch.tensor([2]))  # as without a watch


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
        ([0.5**k for k in range(16)], None),
        (
            [1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1, 0.12, 0.14, 0.17, 0.2, 0.24, 0.28, 0.33, 0.38, 0.42, 0.45],
            "rising loss",
        ),
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
        "gradient norm by parameter", "gradient of the input, by step (zeros left out)", "saturated values of each gate",
        "root mean square of the states",
    ]  # fmt: skip


def test_nothing_is_kept_when_it_is_over() -> None:
    """Neither the watch nor a graph, also after forward passes without a backward pass."""
    watches = []
    for _ in range(3):
        lstm = LSTM(3, 4)
        watcher = watch(lstm)
        with watcher:
            output, _ = lstm(torch.randn(5, 2, 3))
        watches.append(weakref.ref(watcher))
        del watcher, output, _
    gc.collect()
    assert not [one for one in watches if one() is not None]


def test_one_watch_at_a_time() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    with watch(model):
        with pytest.raises(RuntimeError, match="is being watched already"), watch(model[0]):
            pass
        assert len(model[0](torch.ones(2, 1, 3))) == 2
    assert type(model[0]) is nn.LSTM
    with watch(model):
        pass


def test_hooks_of_others_see_what_they_always_see() -> None:
    lstm, seen = nn.LSTM(3, 4), []
    lstm.register_forward_hook(lambda _, given, result: seen.append((len(given), len(result))))
    lstm.register_full_backward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    for watched in (False, True):
        x = torch.randn(5, 2, 3, requires_grad=True)
        with watch(lstm) if watched else contextlib.nullcontext():
            lstm(x)[0].sum().backward()
    assert seen[:2] == seen[2:] == [(1, 2), (5, 2, 3)]


def test_a_frozen_layer_stays_without_gradients() -> None:
    lstm = LSTM(3, 4).requires_grad_(False)
    with watch(lstm):
        assert not lstm(torch.randn(2, 1, 3))[0].requires_grad


@pytest.mark.parametrize("options", [dict(zoneout=(0.5, 0.5)), dict(layer_norm=True), dict(proj_size=3)], ids=str)
def test_h_is_what_the_layer_says(options: dict) -> None:
    torch.manual_seed(0)
    lstm, x = LSTM(3, 4, bidirectional=True, **options).eval(), torch.randn(6, 3, 3)
    with watch(lstm) as seen, torch.no_grad():
        output, _ = lstm(x)
    layer, h = seen.layers["[0]"], output.unflatten(-1, (2, -1))
    torch.testing.assert_close(layer.h[:, 0], h[:, :, 0].square().mean((1, 2)).sqrt())
    torch.testing.assert_close(layer.h[:, 1], h[:, :, 1].square().mean((1, 2)).sqrt().flip(0))
    torch.testing.assert_close(layer.spread, h.flatten(0, 1).std(0, correction=0))


def test_a_reverse_direction_ends_at_the_start() -> None:
    """Its cell state grows towards step 0, also of rows that end early."""
    lstm = nn.LSTM(1, 4, bidirectional=True)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            parameter.zero_()
            if name == "bias_ih_l0_reverse":
                parameter.fill_(20.0)
    patched = LSTM(1, 4, bidirectional=True)
    patched.load_state_dict(lstm.state_dict())
    for given, longest in ((dict(), 200), (dict(lengths=torch.tensor([150, 90])), 150)):
        with watch(patched) as seen:
            patched(torch.zeros(200, 2, 1), **given)
        assert len(seen.layers["[0]"].c) == longest
        assert float(seen.layers["[0]"].c[-1, 1]) == pytest.approx(longest, rel=1e-3)
        assert "cell state grows" in {finding.kind for finding in seen.findings()}


def test_lost_at_either_end_of_two_directions() -> None:
    lstm = nn.LSTM(1, 4, bidirectional=True)
    with torch.no_grad():
        for name in ("bias_ih_l0", "bias_ih_l0_reverse"):
            dict(lstm.named_parameters())[name][4:8] = -4.0
    with watch(lstm) as seen:
        lstm(torch.randn(300, 2, 1))[1][0][1].sum().backward()
    assert "gradient lost over time" in {finding.kind for finding in seen.findings()}


def test_two_calls_in_one_pass_and_few_samples() -> None:
    """What is shown is of the last call; one step of one row says nothing of dead units; no row, nothing at all."""
    lstm = LSTM(3, 4)
    with watch(lstm) as seen:
        output, _ = lstm(torch.randn(7, 2, 3))
        (output.sum() + lstm(torch.randn(3, 2, 3))[0].sum()).backward()
    assert len(seen.layers["[0]"].c) == len(seen.input_gradients[""]) == 3
    with watch(lstm) as seen:
        lstm(torch.randn(1, 1, 3))
    assert seen.layers["[0]"].spread.isnan().all()
    assert not seen.findings()
    with watch(lstm) as seen:
        lstm(torch.randn(2, 0, 3))
    assert not seen.layers
    assert "nothing suspicious" in seen.report()


def test_a_state_from_before_a_backward_pass_of_others_is_no_leak() -> None:
    model = nn.ModuleDict({"lstm": LSTM(3, 4), "head": nn.Linear(3, 1)})
    x = torch.randn(4, 2, 3)
    with watch(model) as seen:
        _, state = model["lstm"](x)
        model["head"](x).sum().backward()
        model["lstm"](x, state)[0].sum().backward()
    assert not seen.loose
    with watch(model) as seen:
        output, (h, c) = model["lstm"](x)
        output.sum().backward(retain_graph=True)
        model["lstm"](x, (h * 0.5, c * 0.5))
    assert seen.loose == ["lstm"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    lstm = nn.LSTM(4, 64).to(dtype)
    with watch(lstm) as seen:
        (lstm(torch.randn(7, 3, 4, dtype=dtype))[0].sum() * 3000).backward()
    assert all(norm.isfinite() for norm in seen.parameters.values())
    assert len(seen.figure().axes) == 4
    seen.parameters["weight_ih_l0"] = torch.tensor(math.inf)
    seen.figure().savefig(io.BytesIO())
