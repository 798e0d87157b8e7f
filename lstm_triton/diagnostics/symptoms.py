"""What can be wrong with the training of an LSTM, what helps, and what a curve of losses says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ADVICE = {
    "not finite": "lower the learning rate, clip gradients (norm 1 to 5), look for NaN or Inf in the data",
    "vanishing gradient": "forget bias 1 or init.chrono_, shorter sequences, a loss at more steps; "
    "if the loss is flat too, a higher learning rate",
    "exploding gradient": "clip gradients (norm 1 to 5), lower the learning rate",
    "no gradient": "the loss does not depend on it, or it was detached on the way",
    "gradient lost over time": "the first steps learn nothing: forget bias 1 or init.chrono_, shorter sequences",
    "gradient grown over time": "the first steps outweigh all others: clip gradients, recurrent_grad_clip=, "
    "orthogonal recurrent weights (init.xavier_orthogonal_)",
    "saturated gate": "smaller weights or inputs (normalise them), a lower learning rate, layer_norm=True",
    "dead units": "they say the same at every step: smaller inputs, another initialisation, a smaller hidden_size",
    "cell state grows": "it counts without end: cell_clip=, coupled_gates=True, or a smaller forget bias",
    "state not detached": "detach h and c between windows, else the graph and its memory grow with every step",
    "flat loss": "a learning rate ten times as high, if there is a gradient at all",
    "oscillating loss": "a learning rate ten times as low, gradients clipped, larger batches",
    "rising loss": "a lower learning rate, gradients clipped; in validation: early stopping, dropout",
    "plateau": "more layers or a larger hidden_size, a falling learning rate, dropout lower",
}


@dataclass(frozen=True)
class Finding:
    """One symptom: what, where, how much of it, and what helps."""

    kind: str
    where: str
    value: float

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}: {self.where} ({self.value:.3g}); what helps: {self.advice}"


def of_losses(losses: Sequence[float]) -> list[Finding]:
    """What a curve of training losses looks like: not finite, flat, oscillating, rising, or on a plateau
    after it had fallen.

    Quarters of the curve are compared by their means; a curve of fewer than 8 losses says nothing.
    """
    bad = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        return [Finding("not finite", f"loss at evaluation {bad + 1}", losses[bad])]
    if len(losses) < 8:
        return []
    quarter = len(losses) // 4
    values = torch.tensor(losses, dtype=torch.float64)
    first, third, last = (
        float(part.mean()) for part in (values[:quarter], values[-2 * quarter : -quarter], values[-quarter:])
    )
    tail = values[len(values) // 2 :]
    changes = tail.diff()
    to_and_fro = float((changes.abs().sum() - changes.sum().abs()) / len(changes))  # a steady fall or rise has none
    roughness = to_and_fro / max(float(tail.abs().mean()), 1e-12)
    if roughness > 0.2:
        return [Finding("oscillating loss", "change to and fro between evaluations over the loss", roughness)]
    if abs(first - last) < 0.02 * abs(first):
        return [Finding("flat loss", "fall from the first to the last quarter, relative", (first - last) / abs(first))]
    if last > 1.05 * third:
        return [Finding("rising loss", "last quarter over the third", last / third)]
    if last < first and third - last < 0.05 * abs(third):
        return [Finding("plateau", "fall from the third to the last quarter, relative", (third - last) / abs(third))]
    return []
