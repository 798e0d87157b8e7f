"""Figures of the recipes: one look, and files that are whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .command import write_atomically


def heat(
    axes: Axes,
    values: Any,
    limits: tuple[float, float] = (0.0, 1.0),
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    colours: str = "viridis",
    numbers: bool = False,
) -> Any:
    """A matrix [rows, columns] as colours, with labels, and its numbers written in."""
    axes.grid(False)
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=Normalize(*limits), interpolation="nearest")
    for labels, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        if labels is not None:
            axis.set_ticks(range(len(labels)), labels, parse_math=False)
    if numbers:
        middle = (limits[0] + limits[1]) / 2
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                dark = abs(float(value) - middle) < 0.3 * (limits[1] - limits[0])
                ink = ("black" if dark else "white") if limits[0] < 0 else ("white" if value < middle else "black")
                axes.text(column, row, f"{float(value):.3g}", ha="center", va="center", color=ink, fontsize=8)
    return image


def visible(units: Iterable[str]) -> list[str]:
    """Labels of characters or words, with signs for spaces and ends of lines."""
    signs = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"}
    return [signs.get(unit, unit) for unit in units]


def shorten(text: str, most: int) -> str:
    """A title of `most` characters at the most."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whole; the path, for the report."""
    write_atomically(path, lambda part: figure.savefig(part, dpi=130))
    return path
