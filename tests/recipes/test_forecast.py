"""The forecast: nothing from the future, the seasonal-naive baseline, and what is reached on the sunspots."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lstm_triton.recipes import forecast


def test_it_beats_the_seasonal_naive_forecast(tmp_path: Path) -> None:
    """On the held-out fifth of the sunspots: on average, and one year ahead also "as it is now"."""
    outcome = forecast.train(forecast.parse(["--small", "--quiet", "--out", str(tmp_path)]))
    found = {name: (float(errors.mean()), float(errors[0])) for name, errors in outcome.test_errors().items()}
    assert found["LSTM"][0] < found["seasonal naive"][0] < found["as it is now"][0]
    assert found["LSTM"][1] < 0.75 * min(found["seasonal naive"][1], found["as it is now"][1])
    assert len(forecast.error_figure(outcome).axes[0].lines) == 3
    assert len(forecast.forecast_figure(outcome).axes) == 2


def test_the_future_does_not_matter() -> None:
    torch.manual_seed(0)
    model, values = forecast.Forecaster(4, 3, 0.0), torch.randn(20, 2)
    torch.nn.init.normal_(model.head.weight)
    changed = values.clone()
    changed[12:] += 1
    assert torch.equal(model(values)[:12], model(changed)[:12])
    assert not torch.equal(model(values)[12:], model(changed)[12:])


def series(values: list[float]) -> forecast.Series:
    return forecast.Series(torch.tensor(values), 0, (len(values) * 3 // 5, len(values) * 4 // 5))


def test_the_parts_of_a_series_are_drawn(tmp_path: Path) -> None:
    series = forecast.load(forecast.parse(["--quiet", "--out", str(tmp_path)]))
    lines = forecast.series_figure(series).axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [
        end - start for start, end in zip((0, *series.ends), (*series.ends, len(series.values)))
    ]
    assert lines[0].get_xdata()[0] == series.first


def test_targets_and_errors() -> None:
    values = torch.arange(6.0)
    targets = forecast.targets_of(values[:, None], 2)[:, 0]
    assert targets.tolist() == [[1, 2], [2, 3], [3, 4], [4, 5]]
    perfect = torch.stack([values + 1, values + 2], 1)
    assert forecast.errors(perfect, series(values.tolist()), 0, 6).tolist() == [0, 0]
    assert forecast.errors(perfect + torch.tensor([1.0, -2.0]), series(values.tolist()), 2, 6).tolist() == [1, 2]


def test_seasonal_naive_is_perfect_on_a_period() -> None:
    values = [float(t % 4) for t in range(40)]
    naive = forecast.seasonal_naive(series(values), period=4, horizon=7)
    assert forecast.errors(naive, series(values), 8, 40).tolist() == [0.0] * 7
    assert naive[10, 3] == values[10]  # a whole period ahead is as it is now


@pytest.mark.parametrize("values", [[1.0, 4.0, 9.0, 16.0, 25.0] * 4, [-3.0, 2.0, 5.0, 0.0, 1.0] * 4])
def test_scaling_and_back(values: list[float]) -> None:
    found = series(values)
    scaled = found.scale(found.values)
    torch.testing.assert_close(found.unscale(scaled), found.values, rtol=1e-4, atol=1e-4)
    assert abs(float(scaled[: found.ends[0]].mean())) < 1e-5
    changed = series([*values[:16], 100.0, 100.0, 100.0, 100.0])
    torch.testing.assert_close(changed.scale(found.values), scaled)  # the held-out part does not show


def write(path: Path, values) -> Path:
    path.write_text("value\n" + "".join(f"{value}\n" for value in values))
    return path


def test_a_series_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", [math.sin(2 * math.pi * t / 6) for t in range(120)])
    arguments = ["--csv", str(path), "--period", "6", "--horizon", "3", "--seq-len", "24", "--small", "--quiet"]
    outcome = forecast.train(forecast.parse([*arguments, "--dropout", "0", "--out", str(tmp_path / "out")]))
    assert not outcome.series.counts
    assert float(outcome.test_errors()["LSTM"].mean()) < float(outcome.test_errors()["as it is now"].mean()) / 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("value\n1\n2\n", "the series has 2 values; 110 are needed"),
        ("value\n" + "3\n" * 200, "the series does not vary"),
        ("value\n1\nx\n", "row 2: 'value' is 'x', not a number"),
        ("other\n1\n", "has no column 'value'"),
        ("value\n" + "1\n2e39\n" * 99, "2e+39 is too large for float32"),
    ],
)
def test_wrong_series_are_one_line_and_status_2(tmp_path: Path, content: str | None, message: str, capsys) -> None:
    if content is not None:
        (tmp_path / "s.csv").write_text(content)
    assert forecast.main(["--csv", str(tmp_path / "s.csv"), "--quiet", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_windows_must_hold_the_horizon(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        forecast.parse(["--seq-len", "20", "--horizon", "11"])
    assert end.value.code == 2
    assert "--seq-len: must be at least twice --horizon" in capsys.readouterr().err
