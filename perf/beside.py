"""Two machines beside each other: the speed-ups over nn.LSTM that were recorded, and those measured here.

    python perf/sweep.py --set cpu --mode train --out here.csv
    python perf/beside.py --recorded perf/results/cpu-amd-epyc/rows.csv --here here.csv --out beside.png

Only ratios within one run are compared: milliseconds of two machines say nothing about either program.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from figures import BASELINE, PASS, Rows, geometric_mean, providers_in, speedups, style
from matplotlib.figure import Figure
from rows import RowsError, read_rows

from lstm_triton.recipes.shared.command import write_atomically


def common(recorded: Rows, here: Rows, provider: str, mode: str) -> list[tuple[float, float]]:
    """(recorded, here) speed-up over nn.LSTM for every shape that both have."""
    first, second = (speedups(rows, provider, mode) for rows in (recorded, here))
    return [(first[shape], second[shape]) for shape in first if shape in second]


def beside(recorded: Rows, here: Rows, mode: str = "train") -> Figure | None:
    """A point for every shape and provider; on the line both machines agree. None if nothing is common."""
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    everything: list[float] = []
    for provider in providers_in(here):
        points = common(recorded, here, provider, mode)
        if provider == BASELINE or not points:
            continue
        name, colour = style(provider)
        means = [geometric_mean(values) for values in zip(*points)]
        axes.scatter(*zip(*points), color=colour, label=f"{name}: {means[0]:.2f} recorded, {means[1]:.2f} here")
        everything += [value for point in points for value in point]
    if not everything:
        plt.close(figure)
        return None
    ends = min(everything) / 1.2, max(everything) * 1.2
    axes.plot(ends, ends, color="grey", linestyle="--")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"recorded: {recorded[-1].device}",
             ylabel=f"here: {here[-1].device}", title=f"nn.LSTM's time over theirs, {PASS[mode]}")  # fmt: skip
    axes.legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, required=True, metavar="FILE")
    parser.add_argument("--here", type=Path, required=True, metavar="FILE")
    parser.add_argument("--mode", choices=tuple(PASS), default="train", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        figure = beside(read_rows(options.recorded), read_rows(options.here), options.mode)
        if figure is None:
            raise RowsError("the two files have no shape and provider in common")
        write_atomically(options.out, lambda part: figure.savefig(part, dpi=110))
    except (OSError, RowsError, ValueError) as error:
        print(f"beside: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
