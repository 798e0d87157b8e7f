"""How long a plain RNN and an LSTM remember: the copy task, and gradients through 100 steps.

    python -m lstm_triton.recipes.copy_task --out copy_task
    python -m lstm_triton.recipes.copy_task --delays 20 40 --kinds lstm --steps 500

The network reads a few random bits, waits for `delay` steps, and must then say them in order: a binary form of the
copy task (Hochreiter and Schmidhuber, 1997; Arjovsky, Shah and Bengio, 2016). One model is trained per delay and kind.
Writes to --out: accuracy.png (accuracy against delay); gradients.png (gradients of the state at every step, and the
decays that a rule of thumb predicts: 0.85 a step for an RNN whose recurrent matrix has that norm, 0.98 for an LSTM
whose forget gate has that value); results.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import LSTM, LSTMCell, functional, init
from ..diagnostics.drawing import BLUE, RED, canvas
from .shared.command import Parser, number, ready, require_memory, run, save_table, whole
from .shared.drawing import save
from .shared.training import Curve, fit

KINDS = {"rnn": ("plain RNN", RED), "lstm": ("LSTM", BLUE)}
CHANCE = 0.5  # of a bit
NORM, FORGET = 0.85, 0.98  # the rule of thumb's norm of the RNN's recurrent matrix, and value of the forget gate


class Memoriser(nn.Module):
    """A recurrent layer and a linear one that says a bit, as a logit, at each of the last `bits` steps."""

    def __init__(self, kind: str, hidden_size: int, bits: int, delay: int, backend: str = "auto") -> None:
        super().__init__()
        self.bits = bits
        self.recurrent: nn.Module
        if kind == "lstm":
            self.recurrent = LSTM(3, hidden_size, backend=backend)
            init.chrono_(self.recurrent, max_time=2 * bits + delay)  # biases for memories of up to that many steps
        else:
            self.recurrent = nn.RNN(3, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, 3] -> logits [bits, B]."""
        return self.head(self.recurrent(x)[0][-self.bits :]).squeeze(-1)


def draw(generator: torch.Generator, batch: int, bits: int, delay: int) -> tuple[Tensor, Tensor]:
    """x [2 bits + delay, batch, 3] of bit (-1 or 1), "a bit", "say one now"; and bits [bits, batch] in {0, 1}."""
    said = torch.randint(0, 2, (bits, batch), generator=generator).float()
    x = torch.zeros(2 * bits + delay, batch, 3)
    x[:bits, :, 0] = 2 * said - 1
    x[:bits, :, 1] = 1
    x[-bits:, :, 2] = 1
    return x, said


class Result(NamedTuple):
    """One trained model: share of the bits of 512 rows, drawn apart, that are right, in [0, 1]."""

    kind: str
    delay: int
    accuracy: float
    curve: Curve


def remember(kind: str, delay: int, options: argparse.Namespace) -> Result:
    """Train a network of this kind on this delay, for options.steps, or until the loss is options.enough."""
    torch.manual_seed(options.seed)
    model = Memoriser(kind, options.hidden_size, options.bits, delay, options.backend)
    device = torch.device(options.device)
    model.to(device)
    generator = torch.Generator().manual_seed(options.seed)
    drawn, answers = (tensor.to(device) for tensor in draw(generator, 512, options.bits, delay))

    def loss_of(_: int) -> Tensor:
        x, bits = draw(generator, options.batch, options.bits, delay)
        return F.binary_cross_entropy_with_logits(model(x.to(device)), bits.to(device))

    def measure() -> float:
        return float(F.binary_cross_entropy_with_logits(model(drawn), answers))

    curve = fit(model, loss_of, measure, options, enough=options.enough, name=f"{KINDS[kind][0]}, delay {delay}")
    with torch.no_grad():
        accuracy = float(((model(drawn) > 0) == (answers > 0)).float().mean())
    return Result(kind, delay, accuracy, curve)


def accuracy_figure(results: Sequence[Result]) -> Figure:
    figure, axes = canvas()
    for kind, (name, colour) in KINDS.items():
        mine = sorted((result.delay, 100 * result.accuracy) for result in results if result.kind == kind)
        if mine:
            axes.plot(*zip(*mine), marker="o", color=colour, label=name)
    axes.axhline(100 * CHANCE, color="grey", linestyle="--", label="chance")
    axes.set(xlabel="delay (steps)", ylabel="bits remembered (%)", ylim=(40, 103), title="Copy task")
    axes.legend()
    return figure


class Decay(NamedTuple):
    """|dL/dstate| at steps T-1, T-2 ... 0 relative to the last one, [T]; predicted: the factor a step, if any.

    forget: mean of the forget gates over all steps; None for a plain network.
    """

    kind: str
    name: str
    norms: Tensor
    predicted: float | None
    forget: float | None

    @property
    def factor(self) -> float:
        """Of a step, on average."""
        return float(self.norms[-1]) ** (1 / (len(self.norms) - 1))


def state_gradients(cell: nn.Module, x: Tensor) -> Tensor:
    """Norm of the gradient of sum(h_T^2) / 2 for the state that carries memory (c, or h), last step first, [T]."""
    recurrent = isinstance(cell, LSTMCell)
    state: Any = None
    states = []
    for x_t in x:
        state = cell(x_t, state)
        h, carried = state if recurrent else (state, state)
        carried.retain_grad()
        states.append(carried)
    (h.square().sum() / 2).backward()
    return torch.stack([carried.grad.norm() for carried in reversed(states)])


@torch.no_grad()
def mean_forget(cell: LSTMCell, x: Tensor) -> float:
    """Mean forget gate over a sequence x [T, B, I]."""
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    *_, states = functional.lstm(x, None, weights, return_states=("gates",))
    return float(states.gates[0][..., 1, :].mean())


def decays(hidden_size: int, steps: int, seed: int = 0) -> list[Decay]:
    """Both kinds as the rule of thumb has them, and as they are initialised by default, on random input.

    By the rule: the plain network's recurrent matrix is orthogonal times NORM; the LSTM has no recurrent weights, and
    forget gates of FORGET.
    """
    torch.manual_seed(seed)
    x = 0.1 * torch.randn(steps + 1, 16, 3, dtype=torch.float64)
    found = []
    for ruled in (True, False):
        rnn = nn.RNNCell(3, hidden_size, dtype=torch.float64)
        lstm = LSTMCell(3, hidden_size, dtype=torch.float64)
        if ruled:
            with torch.no_grad():
                nn.init.orthogonal_(rnn.weight_hh).mul_(NORM)
                lstm.weight_hh.zero_()
                lstm.bias_ih[hidden_size : 2 * hidden_size] = math.log(FORGET / (1 - FORGET))
                lstm.weight_ih[hidden_size : 2 * hidden_size] = 0
                lstm.bias_hh.zero_()
        for kind, cell, factor in (("rnn", rnn, NORM), ("lstm", lstm, FORGET)):
            norms = state_gradients(cell, x)
            name = f"{KINDS[kind][0]}, {'by the rule' if ruled else 'default weights'}"
            forget = mean_forget(cell, x) if isinstance(cell, LSTMCell) else None
            found.append(Decay(kind, name, norms / norms[0], factor if ruled else None, forget))
    return found


def gradient_figure(found: Sequence[Decay]) -> Figure:
    figure, axes = canvas()
    for decay in found:
        steps = torch.arange(len(decay.norms))
        colour = KINDS[decay.kind][1]
        axes.semilogy(steps, decay.norms, color=colour, linewidth=2 if decay.predicted else 1, label=decay.name)
        if decay.predicted:
            label = f"{decay.predicted:g}^k: {decay.predicted ** (len(steps) - 1):.2g} at the end"
            axes.semilogy(steps, decay.predicted**steps, "--", color="black", linewidth=1, label=label)
    axes.axhline(1e-6, color="grey", linestyle=":", label="vanished (1e-6)")
    axes.set(xlabel="steps back from the loss (k)", ylabel="gradient of the state, relative", ylim=(1e-25, 10))
    axes.set_title("How a gradient survives the way back")
    axes.legend(fontsize=8)
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("copy_task", __doc__)
    parser.option("delays", [10, 50, 100, 200], whole(0), "steps to wait", small=[5, 20], nargs="+", metavar="N")
    parser.option("kinds", list(KINDS), str, "what is trained", nargs="+", choices=tuple(KINDS), metavar="rnn|lstm")
    parser.option("bits", 5, whole(), "to remember", small=2)
    parser.option("hidden_size", 32, whole())
    parser.option("gradient_steps", 100, whole(most=100_000), "steps that gradients are followed back")
    parser.option("enough", 0.002, number(), "validation loss, in nats a bit, at which training ends")
    parser.training(steps=4000, small_steps=300, batch=64, learning_rate=0.01, evaluations=80)
    parser.common("copy_task")
    return parser.parse(arguments)


def train(options: argparse.Namespace) -> list[Result]:
    """One model per kind and delay. Raises Refused."""
    device = ready(options, LSTM(1, 1, backend=options.backend))
    steps = max(options.delays) + 2 * options.bits
    require_memory(4 * 6 * steps * max(options.batch, 512) * options.hidden_size, device, f"{steps} steps")
    return [remember(kind, delay, options) for kind in options.kinds for delay in options.delays]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("copy_task", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    kept = 8 * 16 * 4 * 12 * options.gradient_steps * options.hidden_size  # fp64, of four networks, by autograd
    require_memory(kept, torch.device("cpu"), f"following gradients back {options.gradient_steps} steps")
    results = train(options)
    for result in results:
        steps = result.curve.steps[-1]
        print(f"{KINDS[result.kind][0]:9}  delay {result.delay:4}  {result.accuracy:7.1%} of bits, {steps} steps")
    files = [
        save(accuracy_figure(results), options.out / "accuracy.png"),
        save_table(
            options.out / "results.csv",
            ("kind", "delay", "accuracy", "steps"),
            [(result.kind, result.delay, result.accuracy, result.curve.steps[-1]) for result in results],
        ),
    ]
    found = decays(options.hidden_size, options.gradient_steps, options.seed)
    for decay in found:
        predicted = f", predicted {decay.predicted ** (len(decay.norms) - 1):.1e}" if decay.predicted else ""
        print(f"{decay.name:26} gradient after {len(decay.norms) - 1} steps back {decay.norms[-1]:.1e}{predicted}")
    files.append(save(gradient_figure(found), options.out / "gradients.png"))
    print(f"written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
