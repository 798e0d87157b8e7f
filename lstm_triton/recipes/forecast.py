"""A forecast of a time series, several steps ahead, against the seasonal-naive one.

    python -m lstm_triton.recipes.forecast --out forecast
    python -m lstm_triton.recipes.forecast --csv load.csv --column megawatts --period 24 --horizon 24

Without --csv the series is the yearly number of sunspots from 1700 to 2008, which ships with statsmodels; its period is
about 11 years. At every step the network reads the value and names the next --horizon ones, as a change against the
value now. The seasonal-naive forecast repeats what was a period ago (Hyndman and Athanasopoulos, Forecasting:
Principles and Practice, 5.2). The last fifth of the series is held out, the fifth before it chooses the weights.
Seasons differ in height more than in form, so training windows are scaled at random.
Writes to --out: forecast.png, errors.png (mean absolute error against steps ahead), errors.csv, best.pt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from statsmodels.datasets import sunspots
from torch import Tensor, nn
from torch.nn import functional as F

from .. import LSTM
from ..diagnostics.drawing import BLUE, GREY, ORANGE, canvas, panels
from .shared.command import Parser, Refused, number, ready, require_memory, run, save_table, whole
from .shared.drawing import save
from .shared.tables import numbers
from .shared.training import Curve, evaluation, fit, save_checkpoint


class Series(NamedTuple):
    """values [N] in the series' own unit; times: the number of the first step (a year, say); ends: of the parts."""

    values: Tensor
    first: int
    ends: tuple[int, int]  # training is before the first, choosing before the second, testing after it

    def scale(self, values: Tensor) -> Tensor:
        """Mean 0, deviation 1 in training; first the roots of counts, which vary more where they are large."""
        seen = self.root(self.values[: self.ends[0]])
        return (self.root(values) - seen.mean()) / seen.std()

    def unscale(self, scaled: Tensor) -> Tensor:
        seen = self.root(self.values[: self.ends[0]])
        values = scaled * seen.std() + seen.mean()
        return values.clamp(min=0).square() if self.counts else values

    def root(self, values: Tensor) -> Tensor:
        return values.clamp(min=0).sqrt() if self.counts else values

    @property
    def counts(self) -> bool:
        return bool((self.values[: self.ends[1]] >= 0).all())


def load(options: argparse.Namespace) -> Series:
    """The series of --csv, or the sunspots. Raises Refused."""
    if options.csv is not None:
        found = numbers(options.csv, options.column)
        if max(map(abs, found)) > 1e30:
            raise Refused(f"{options.csv}: {max(found, key=abs):g} is too large for float32; choose a larger unit")
        values, first = torch.tensor(found, dtype=torch.float32), 0
    else:
        table = sunspots.load_pandas().data
        values, first = torch.tensor(table["SUNACTIVITY"].to_numpy(), dtype=torch.float32), int(table["YEAR"].iloc[0])
    count = len(values)
    needed = 5 * (options.period + options.horizon)
    if count < needed:
        raise Refused(f"the series has {count} values; {needed} are needed: five times --period and --horizon together")
    if values[: count * 3 // 5].std() == 0:
        raise Refused("the series does not vary")
    return Series(values, first, (count * 3 // 5, count * 4 // 5))


class Forecaster(nn.Module):
    """LSTM over the value and its change; a linear layer that names the changes to come."""

    def __init__(self, hidden_size: int, horizon: int, dropout: float, backend: str = "auto") -> None:
        super().__init__()
        self.lstm = LSTM(2, hidden_size, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, horizon)
        nn.init.zeros_(self.head.weight)  # so that training begins at "as it is now"

    def forward(self, values: Tensor) -> Tensor:
        """values [T, B] -> what is to come after every step, [T, B, horizon], in the same unit."""
        changes = torch.diff(values, dim=0, prepend=values[:1])
        h, _ = self.lstm(torch.stack((values, changes), dim=-1))
        return values.unsqueeze(-1) + self.head(self.dropout(h))


def targets_of(values: Tensor, horizon: int) -> Tensor:
    """values [T, B] -> the values 1 ... horizon steps after every step that has them, [T - horizon, B, horizon]."""
    return values.unfold(0, horizon, 1)[1:]


def errors(forecast: Tensor, series: Series, start: int, end: int) -> Tensor:
    """Mean absolute error of each step ahead, [horizon], in the series' unit.

    forecast [N, horizon]: made after each step, for the steps after it. Counted are those made at start ... end - 1,
    as far as all their targets are known.
    """
    horizon = forecast.shape[1]
    wanted = targets_of(series.values.unsqueeze(1), horizon)[:, 0]
    made = slice(start, min(end, len(wanted)))
    return (forecast[made] - wanted[made]).abs().mean(0)


def seasonal_naive(series: Series, period: int, horizon: int) -> Tensor:
    """After step t, t + k will be as t + k - period was, by as many whole periods back as are known: [N, horizon]."""
    now = torch.arange(len(series.values)).unsqueeze(1)
    ahead = torch.arange(1, horizon + 1)
    back = now + ahead - period * ((ahead + period - 1) // period)
    return series.values[back.clamp(min=0)]


class Outcome(NamedTuple):
    """forecast, naive, last [N, horizon]: after every step; the last is "as it is now"; curve: of training."""

    series: Series
    forecast: Tensor
    naive: Tensor
    last: Tensor
    curve: Curve

    def test_errors(self) -> dict[str, Tensor]:
        """Mean absolute error on the held-out fifth by steps ahead, [horizon] each."""
        start, end = self.series.ends[1] - 1, len(self.series.values)
        named = {"LSTM": self.forecast, "seasonal naive": self.naive, "as it is now": self.last}
        return {name: errors(values, self.series, start, end) for name, values in named.items()}


def train(options: argparse.Namespace) -> Outcome:
    """Train on windows of the first three fifths, choose on the fourth, forecast everything."""
    series = load(options)
    torch.manual_seed(options.seed)
    model = Forecaster(options.hidden_size, options.horizon, options.dropout, options.backend)
    device = ready(options, model.lstm)
    model.to(device)
    scaled = series.scale(series.values).unsqueeze(1).to(device)
    window = min(options.seq_len, series.ends[0])
    require_memory(24 * options.hidden_size * max(window * options.batch, len(scaled)), device, f"{len(scaled)} values")
    generator = torch.Generator().manual_seed(options.seed)
    steps = torch.arange(window)
    nothing = float(series.scale(torch.zeros(1))) if series.counts else 0.0

    def loss_of(_: int) -> Tensor:
        begin = torch.randint(series.ends[0] - window + 1, (options.batch,), generator=generator)
        louder = torch.exp(options.spread * (2 * torch.rand(options.batch, generator=generator) - 1)).to(device)
        values = nothing + louder * (scaled[(begin + steps.unsqueeze(1)).to(device), 0] - nothing)
        said = model(values)[: -options.horizon]
        return F.l1_loss(
            said[window // 4 :], targets_of(values, options.horizon)[window // 4 :]
        )  # once it has seen some

    def measure() -> float:
        said, first = model(scaled[: series.ends[1]])[: -options.horizon], series.ends[0] - 1
        return float(F.l1_loss(said[first:], targets_of(scaled[: series.ends[1]], options.horizon)[first:]))

    path = options.out / "best.pt"
    sizes = dict(hidden_size=options.hidden_size, horizon=options.horizon, dropout=options.dropout)
    curve = fit(model, loss_of, measure, options, keep=lambda *_: save_checkpoint(path, model, sizes=sizes))
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    with evaluation(model):
        forecast = series.unscale(model(scaled)[:, 0].cpu())
    last = series.values.unsqueeze(1).expand_as(forecast)
    return Outcome(series, forecast, seasonal_naive(series, options.period, options.horizon), last, curve)


def series_figure(series: Series) -> Figure:
    """The whole series, and what each part of it is for."""
    figure, axes = canvas(9, 2.6)
    start = 0
    for name, end in zip(("training", "chooses the weights", "held out"), (*series.ends, len(series.values))):
        axes.plot(range(series.first + start, series.first + end), series.values[start:end], label=name)
        start = end
    axes.set(xlabel="step", ylabel="value")
    axes.legend(ncols=3)
    return figure


def forecast_figure(outcome: Outcome, ahead: Sequence[int] = (1, 5)) -> Figure:
    """The held-out fifth, and what had been said of each step so many steps before."""
    series, start = outcome.series, outcome.series.ends[1]
    shown = [k for k in ahead if k <= outcome.forecast.shape[1]]
    figure, axes = panels(len(shown), 1, 8, 2.8 * len(shown), sharex=True)
    times = torch.arange(start, len(series.values))
    for axis, k in zip(axes, shown):
        axis.plot(times + series.first, series.values[start:], color="black", label="observed")
        axis.plot(times + series.first, outcome.forecast[start - k : -k, k - 1], color=BLUE, label="LSTM")
        naive = outcome.naive[start - k : -k, k - 1]
        axis.plot(times + series.first, naive, color=ORANGE, linewidth=1, linestyle="--", label="seasonal naive")
        axis.set_title(f"{k} step{'s' * (k > 1)} ahead", fontsize=10)
        axis.set_ylabel("value")
    axes[-1].set_xlabel("step")
    axes[0].legend(fontsize=8, ncols=3)
    return figure


def error_figure(outcome: Outcome) -> Figure:
    figure, axes = canvas()
    for (name, found), colour in zip(outcome.test_errors().items(), (BLUE, ORANGE, GREY)):
        label = f"{name}: {found.mean():.3g} on average"
        axes.plot(range(1, len(found) + 1), found, marker="o", markersize=4, color=colour, label=label)
    axes.set(xlabel="steps ahead", ylabel="mean absolute error", title="Held-out fifth", ylim=(0, None))
    axes.legend()
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("forecast", __doc__)
    parser.add_argument("--csv", metavar="FILE", help="a series of your own, a row for every step")
    parser.option("column", "value", str, "of --csv", only_with="csv", metavar="NAME")
    parser.option("period", 11, whole(), "of the seasons, in steps")
    parser.option("horizon", 11, whole(), "steps ahead")
    parser.option("hidden_size", 32, whole())
    parser.option("seq_len", 66, whole(4), "steps of a training window")
    parser.option("spread", 0.4, number(least=0), "windows are made larger or smaller by up to e to the power of it")
    parser.option("dropout", 0.2, number(least=0, below=1))
    parser.training(steps=400, small_steps=120, batch=32, learning_rate=3e-3, evaluations=20)
    parser.common("forecast")
    options = parser.parse(arguments)
    if options.seq_len < 2 * options.horizon:
        parser.error(f"argument --seq-len: must be at least twice --horizon, got {options.seq_len}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("forecast", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    outcome = train(options)
    found = outcome.test_errors()
    for name, by_step in found.items():
        print(f"{name:15} mean absolute error {by_step.mean():8.3g}; 1 step ahead {by_step[0]:8.3g}")
    rows = [(k + 1, *(float(by_step[k]) for by_step in found.values())) for k in range(options.horizon)]
    files = [
        save(forecast_figure(outcome), options.out / "forecast.png"),
        save(error_figure(outcome), options.out / "errors.png"),
        save_table(options.out / "errors.csv", ("steps_ahead", *found), rows),
    ]
    print(f"written: {', '.join(map(str, files))}, {options.out / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(main())
