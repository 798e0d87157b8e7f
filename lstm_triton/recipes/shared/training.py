"""The training loop of the recipes: Adam, clipped gradients, evaluations, the best model kept."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ...diagnostics.drawing import canvas
from .command import Diverged, write_atomically


@dataclass
class Curve:
    """What was measured at every evaluation: the step, the mean training loss since the last one, the measure."""

    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.valid, default=math.inf)

    def figure(self, title: str, unit: str, baselines: dict[str, float] | None = None) -> Figure:
        """Both losses against steps, with a dashed line for every baseline."""
        figure, axes = canvas()
        axes.plot(self.steps, self.train, marker="o", markersize=3, label="training")
        axes.plot(self.steps, self.valid, marker="o", markersize=3, label="validation")
        for i, (name, value) in enumerate((baselines or {}).items()):
            axes.axhline(value, color="grey", linestyle=("--", ":", "-.")[i % 3], label=name)
        axes.set(xlabel="optimiser steps", ylabel=f"loss ({unit})", title=title)
        axes.legend()
        return figure


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> float:
    """One step of the optimiser along the clipped gradient of `loss`, whose value is returned."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    measure: Callable[[], float],
    options: argparse.Namespace,
    *,
    keep: Callable[[int, float], None] | None = None,
    curve: Curve | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    unit: str = "step",
    per_step: int = 1,
    enough: float = -math.inf,
    name: str | None = None,
) -> Curve:
    """Train `model` on the losses loss_of(1), loss_of(2) ... for options.steps steps.

    options: steps, evaluations, learning_rate, clip, quiet.
    measure(): what is to become small, computed without gradients in evaluation mode, the same on all processes.
    keep(step, measured): called when the measure is the smallest so far.
    curve: filled as training goes on, so that an interrupted one can be drawn.
    schedule(optimizer): a scheduler that is told every measure.
    per_step: how many `unit` a step has, for the progress bar. name: of the model, for the bar and the lines under it.
    enough: the measure at which training ends early. Raises Diverged.
    """
    curve = Curve() if curve is None else curve
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    scheduler = schedule(optimizer) if schedule else None
    every = -(-options.steps // options.evaluations)
    losses: list[float] = []
    with tqdm(
        total=options.steps * per_step, unit=unit, unit_scale=per_step > 1, desc=name, disable=options.quiet
    ) as bar:
        for step in range(1, options.steps + 1):
            losses.append(descend(model, optimizer, loss_of(step), options.clip))
            if not dist.is_initialized():  # else one process would leave while others wait for its gradients
                finite(losses[-1], "loss", step)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update(per_step)
            if step % every and step != options.steps:
                continue
            with evaluation(model):
                measured = finite(measure(), "validation loss", step)
            if scheduler:
                scheduler.step(measured)
            better = measured < curve.best
            curve.steps.append(step)
            curve.train.append(sum(losses) / len(losses))
            curve.valid.append(measured)
            losses = []
            if not options.quiet:
                losses_now = f"loss {curve.train[-1]:.4f}, in validation {measured:.4f}"
                bar.write(f"{f'{name}, ' if name else ''}step {step}: {losses_now}", file=sys.stdout)
            if better and keep:
                keep(step, measured)
            if measured <= enough:
                break
    return curve


def finite(value: float, name: str, step: int) -> float:
    if not math.isfinite(value):
        raise Diverged(f"the {name} is {value} at step {step}; try a lower --learning-rate")
    return value


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards the mode that was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def save_checkpoint(path: Path, model: nn.Module, **more: Any) -> None:
    """Weights and what rebuilds the model, written whole."""
    buffer = io.BytesIO()  # torch.save's own errors of writing are no OSError
    torch.save({"model": model.state_dict(), **more}, buffer)
    write_atomically(path, lambda part: part.write_bytes(buffer.getbuffer()))
