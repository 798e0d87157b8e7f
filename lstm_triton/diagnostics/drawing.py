"""One look of all figures: colours, and grids of axes."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, ORANGE, GREEN, GREY = "#2a6fbb", "#c8453b", "#d98a1f", "#4f9d57", "#666666"
GATES = {"i": ("input gate", ORANGE), "f": ("forget gate", BLUE), "g": ("candidate", GREEN), "o": ("output gate", RED)}


def canvas(width: float = 7.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """A figure with one grid of axes, independent of pyplot and its backends."""
    figure, axes = panels(1, 1, width, height)
    return figure, axes[0]


def panels(rows: int, columns: int, width: float = 7.0, height: float = 4.5, **more: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **more).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
