"""Every usual trouble of training an LSTM, provoked and diagnosed.

    python -m lstm_triton.recipes.debugging --out debugging

Each symptom is made on purpose in a small model, and `lstm_triton.diagnostics` has to name it; then the cure that it
advises is tried. The task is to say the mean of a noisy sequence.
Writes to --out: symptoms.csv, losses.png, and NAME.png, the inside of the model, for each symptom that shows there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import LSTM, init
from ..diagnostics import Finding, Seen, of_losses, watch
from ..diagnostics.drawing import panels
from ..diagnostics.figure import inside_figure
from .shared.command import Parser, ready, run, save_table, whole
from .shared.drawing import save


class Averager(nn.Module):
    """The last h of an LSTM, and a linear layer on it."""

    def __init__(self, hidden_size: int = 16, layers: int = 1, backend: str = "auto") -> None:
        super().__init__()
        self.lstm = LSTM(1, hidden_size, layers, backend=backend)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, 1] -> [B]."""
        return self.head(self.lstm(x)[1][0][-1]).squeeze(-1)


def draw(seq_len: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T, B, 1] of noise around a level per row, and the levels [B]."""
    levels = torch.randn(batch, generator=generator)
    return levels[None, :, None] + torch.randn(seq_len, batch, 1, generator=generator), levels


class Trouble(NamedTuple):
    """A symptom that was provoked, what was found with it and after its cure, the losses of both, and the inside."""

    name: str
    kind: str  # of the finding that is expected
    cause: str
    cure: str
    found: list[Finding]
    cured: list[Finding]
    losses: dict[str, list[float]]
    seen: Seen | None

    @property
    def diagnosed(self) -> bool:
        return self.kind in {finding.kind for finding in self.found}

    @property
    def gone(self) -> bool:
        return self.kind not in {finding.kind for finding in self.cured}


class Clinic:
    """Makes the troubles, all from one seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = ready(options, LSTM(1, 1, backend=options.backend))

    def model(self, **sizes: int) -> Averager:
        torch.manual_seed(self.options.seed)
        return Averager(backend=self.options.backend, **sizes).to(self.device)

    def batch(self, seq_len: int = 30) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.options.seed)
        x, levels = draw(seq_len, 32, generator)
        return x.to(self.device), levels.to(self.device)

    def look(self, model: nn.Module, run: Callable[[], Tensor]) -> Seen:
        """One forward and backward pass, watched."""
        model.zero_grad()
        with watch(model) as seen:
            run().backward()
        return seen

    def train(
        self, learning_rate: float, clip: float | None = None, hidden_size: int = 16, scale: float = 1.0
    ) -> list[float]:
        """Losses of gradient descent on 64 sequences, while they are finite; `scale` multiplies what is to be said."""
        model = self.model(hidden_size=hidden_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
        x, levels = (
            tensor.to(self.device) for tensor in draw(10, 64, torch.Generator().manual_seed(self.options.seed))
        )
        losses: list[float] = []
        while len(losses) < self.options.steps and (not losses or losses[-1] < float("inf")):
            loss = F.mse_loss(model(x), scale * levels)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def of_losses(self, name: str, kind: str, cause: str, cure: str, ill: dict, well: dict) -> Trouble:
        losses = {"ill": self.train(**ill), "cured": self.train(**well)}
        found, cured = (of_losses(curve) for curve in losses.values())
        return Trouble(name, kind, cause, cure, found, cured, losses, None)

    def of_pass(
        self, name: str, kind: str, cause: str, cure: str, ill: Callable[[], Seen], well: Callable[[], Seen]
    ) -> Trouble:
        seen = ill()
        return Trouble(name, kind, cause, cure, seen.findings(), well().findings(), {}, seen)

    def troubles(self) -> list[Trouble]:
        """All of them, in the order of the notebook."""
        return [
            self.of_losses("flat", "flat loss", "learning rate 0.000001", "0.1", dict(learning_rate=1e-6),
                           dict(learning_rate=0.1)),
            self.of_losses("oscillating", "oscillating loss", "learning rate 3, clipped", "0.1, clipped",
                           dict(learning_rate=3.0, clip=1.0), dict(learning_rate=0.1, clip=1.0)),
            self.of_losses("not_finite", "not finite", "learning rate 3", "0.1, clipped",
                           dict(learning_rate=3.0), dict(learning_rate=0.1, clip=1.0)),
            self.of_losses("plateau", "plateau", "one unit", "16 units",
                           dict(learning_rate=0.05, hidden_size=1, scale=5.0),
                           dict(learning_rate=0.05, hidden_size=16, scale=5.0)),
            self.of_pass("vanishing", "gradient lost over time", "300 steps, forget gates about 0.1",
                         "chrono initialisation", lambda: self._over_time(False), lambda: self._over_time(True)),
            self.of_pass("growing", "gradient grown over time", "recurrent weights of norm 6", "of norm 1 (orthogonal)",
                         lambda: self._recurrent(6.0), lambda: self._recurrent(1.0)),
            self.of_pass("tiny", "vanishing gradient", "a loss scaled by 1e-7", "the loss as it is",
                         lambda: self._scaled(1.0, 1e-7), lambda: self._scaled(1.0)),
            self.of_pass("exploding", "exploding gradient", "targets a million times too large", "normalised targets",
                         lambda: self._scaled(1e6), lambda: self._scaled(1.0)),
            self.of_pass("saturated", "saturated gate", "inputs 100 times too large", "normalised inputs",
                         lambda: self._inputs(100.0), lambda: self._inputs(1.0)),
            self.of_pass("dead", "dead units", "output gates closed by their biases", "default biases",
                         lambda: self._closed(True), lambda: self._closed(False)),
            self.of_pass("leak", "state not detached", "the state of the last window as it is", "detached",
                         lambda: self._windows(False), lambda: self._windows(True)),
        ]  # fmt: skip

    def _over_time(self, cured: bool) -> Seen:
        model, (x, levels) = self.model(), self.batch(300)
        with torch.no_grad():
            if cured:
                init.chrono_(model.lstm, max_time=300)
            else:
                dict(model.lstm.named_parameters())["bias_ih_l0"][16:32] = -2.0
        return self.look(model, lambda: F.mse_loss(model(x), levels))

    def _recurrent(self, norm: float) -> Seen:
        model, (x, levels) = self.model(), self.batch(60)
        with torch.no_grad():
            for of_gate in dict(model.lstm.named_parameters())["weight_hh_l0"].split(16):
                nn.init.orthogonal_(of_gate, norm)
        return self.look(model, lambda: F.mse_loss(model(x), levels))

    def _scaled(self, scale: float, of_loss: float = 1.0) -> Seen:
        model, (x, levels) = self.model(), self.batch()
        return self.look(model, lambda: of_loss * F.mse_loss(model(x), scale * levels))

    def _inputs(self, scale: float) -> Seen:
        model, (x, levels) = self.model(), self.batch()
        return self.look(model, lambda: F.mse_loss(model(scale * x), levels))

    def _closed(self, closed: bool) -> Seen:
        model, (x, levels) = self.model(), self.batch()
        if closed:
            with torch.no_grad():
                dict(model.lstm.named_parameters())["bias_ih_l0"][48:] = -12.0
        return self.look(model, lambda: F.mse_loss(model(x), levels))

    def _windows(self, detached: bool) -> Seen:
        model, (x, _) = self.model(), self.batch()
        state = None
        with watch(model) as seen:
            for window in x.split(10):
                output, state = model.lstm(window, state)
                output.square().mean().backward(retain_graph=not detached)
                if detached:
                    state = (state[0].detach(), state[1].detach())
        return seen


def loss_figure(troubles: Sequence[Trouble]) -> Figure:
    """The curves of the troubles that show in the loss, each with that of its cure."""
    shown = [trouble for trouble in troubles if trouble.losses]
    figure, axes = panels(1, len(shown), 3.2 * len(shown), 3.2)
    for axis, trouble in zip(axes, shown):
        for name, losses in trouble.losses.items():
            axis.semilogy(losses, label=f"{trouble.cause if name == 'ill' else trouble.cure}", linewidth=1)
        axis.set(title=trouble.kind, xlabel="step")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("loss")
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("debugging", __doc__)
    parser.option("steps", 400, whole(80), "of the models whose losses are looked at", small=240)
    parser.common("debugging", bar=False)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("debugging", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    troubles = Clinic(options).troubles()
    rows = []
    for trouble in troubles:
        said = next((finding for finding in trouble.found if finding.kind == trouble.kind), None)
        print(f"{trouble.name} ({trouble.cause}): {said or 'not diagnosed'}")
        print(f"    with the cure ({trouble.cure}): {'gone' if trouble.gone else 'still there'}")
        rows.append((trouble.name, trouble.kind, trouble.cause, trouble.cure, trouble.diagnosed, trouble.gone))
        if trouble.seen:
            save(inside_figure(trouble.seen), options.out / f"{trouble.name}.png")
    save(loss_figure(troubles), options.out / "losses.png")
    columns = ("name", "symptom", "cause", "cure", "diagnosed", "gone")
    print(f"written: {save_table(options.out / 'symptoms.csv', columns, rows)} and the figures beside it")


if __name__ == "__main__":
    sys.exit(main())
