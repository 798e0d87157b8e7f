"""Draw every figure of the measured rows, and their summary, from the CSV files alone.

    python perf/plot.py                       # every folder of perf/results, figures beside the rows
    python perf/plot.py --rows rows.csv --out figures

Figures: speed-up over nn.LSTM by region (losses in their own colour), time against each size with the
floor, the LSTMs of tutorials next to nn.LSTM, memory, and the roofline. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from figures import BASELINE, PASS, Rows, figures, geometric_mean, providers_in, speedups, style
from rows import RowsError, read_rows
from steps import predicted_against_measured

RESULTS = Path(__file__).parent / "results"


def summary(rows: Rows) -> str:
    """Geometric means by region, with wins and losses, as Markdown."""
    where = rows[-1]
    lines = [
        f"# {where.device}",
        "",
        f"torch {where.torch}, triton {where.triton}, cuDNN {where.cudnn or 'none'}, driver {where.driver or 'none'}, "
        f"commit {where.commit}, {where.date}. Speed-up: nn.LSTM's time over the provider's, geometric mean over the "
        "shapes where both were measured.",
        "",
        "| region | provider | mode | shapes | speed-up | worst | best | losses | floor / measured | errors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for region in dict.fromkeys(row.region for row in rows if row.provider != "ceiling"):
        of_region = [row for row in rows if row.region == region]
        for provider in providers_in(of_region):
            for mode in PASS:
                found = list(speedups(of_region, provider, mode).values())
                mine = [row for row in of_region if (row.provider, row.mode, row.metric) == (provider, mode, "ms")]
                if not found or provider == BASELINE:
                    continue
                floors = [float(row.floor) / float(row.value) for row in mine if row.floor and row.value]
                lines.append(
                    f"| {region} | {style(provider)[0]} | {PASS[mode]} | {len(found)} | {geometric_mean(found):.2f} | "
                    f"{min(found):.2f} | {max(found):.2f} | {sum(value < 1 for value in found)} | "
                    f"{geometric_mean(floors):.2f} | {sum(bool(row.error) for row in mine)} |"
                )
    return "\n".join(lines) + "\n"


def draw(rows: Rows, out: Path) -> list[Path]:
    """Write the figures and the summary; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    drawn = figures(rows) | {"steps": lambda: predicted_against_measured(rows)}
    for name, make in drawn.items():
        figure = make()
        if figure is not None:
            figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            written.append(out / f"{name}.png")
    (out / "summary.md").write_text(summary(rows))
    return [*written, out / "summary.md"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="with --rows (default: beside the first file)")
    options = parser.parse_args(arguments)
    groups = [(options.rows, options.out or options.rows[0].parent)] if options.rows else [
        (sorted(folder.glob("*.csv")), folder) for folder in sorted(RESULTS.iterdir()) if any(folder.glob("*.csv"))
    ]  # fmt: skip
    try:
        for files, out in groups:
            rows = [row for file in files for row in read_rows(file)]
            if not any(row.value and row.provider != "ceiling" for row in rows):
                raise RowsError(f"{files[0]}: no measurement to draw")
            for path in draw(rows, out):
                print(path)
    except (OSError, RowsError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    if not groups:
        print("plot: no recorded results", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
