"""A step of the recurrence alone, measured beside what the model of a step predicts for the same binary.

    python perf/steps.py --out steps.csv             the default plans
    python perf/steps.py --out steps.csv --best 4    the four configs of each problem that the planner likes most

Each config is compiled ahead, checked against fp64, and timed on random tensors over up to 512 steps, the reset of its
exchange included. Two rows for each: provider "kernel", what was measured, and "model", what
`perf/compile_report.py --predict` prints. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

import compile_report
import torch
from compile_report import TYPES, Job, compile_job
from rows import Row, bound_said, digits, host_bound, needs_gpu, provenance, start, write_rows
from tqdm import tqdm

from lstm_triton.layer import op
from lstm_triton.planning.cost import Step, microseconds_per_step
from lstm_triton.planning.device import Device, device_of
from lstm_triton.planning.planner import admissible, refusal
from lstm_triton.planning.problem import PASSES, Problem
from lstm_triton.tuning.clock import Times
from lstm_triton.tuning.search import Scratch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIDDEN_SIZES = (64, 128, 256, 512, 1024, 2048)
BATCHES = (16, 128)
COLOURS = {"forward": "#2a6fbb", "backward": "#c8453b"}


def jobs(
    hidden_sizes: Iterable[int], batches: Iterable[int], types: Iterable[tuple[str, str]], device: Device, best: int
) -> Iterator[Job]:
    """The `best` configs of every problem by the planner's estimate; the first is the default plan."""
    for (dtype, precision), hidden_size, batch, which in itertools.product(types, hidden_sizes, batches, PASSES):
        if refusal(device, dtype, precision) is None:
            problem = Problem(which, hidden_size, batch, 1, dtype, precision)
            order = sorted(admissible(problem, device), key=lambda c, p=problem: microseconds_per_step(c, p, device))
            for config in order[:best]:
                yield Job(problem, device, config, "plain")


def rows_of(job: Job, steps: int, step: Step | None, measured: Times | str, where: dict[str, str]) -> list[Row]:
    """The measured row, and the predicted one where there is a prediction. measured: microseconds, or an error."""
    problem = job.problem
    dtype = problem.dtype if problem.dtype != "float32" else f"float32-{problem.precision}"
    blank = Row(
        "steps", job.config.placement, "", str(problem.hidden_size), str(problem.batch), str(steps), "1", "1", dtype,
        "kernel", problem.which, "us", "", config=job.config.encode(), **where,
    )  # fmt: skip
    if isinstance(measured, str):
        found = [replace(blank, error=measured)]
    else:
        spread = {"p20": digits(measured.p20), "p80": digits(measured.p80), "repeat": str(measured.repeat)}
        found = [replace(blank, value=digits(measured.median), **spread, host_bound=host_bound(measured))]
    return found if step is None else [*found, replace(blank, provider="model", value=digits(step.total))]


def measure(scratch: Scratch, job: Job) -> Times | str:
    """Microseconds of a step, or why there are none."""
    try:
        return scratch.complaint(job.config) or scratch.times_per_step(job.config)
    except Exception as error:  # a config that does not run is a finding
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def line(row: Row, predicted: Row | None) -> str:
    head = f"{row.mode:8} {row.dtype:13} H={row.hidden_size:<5} B={row.batch:<4} "
    if row.error:
        return f"{head} {row.error}"
    model = "" if predicted is None else f"  predicted {float(predicted.value):7.2f}"
    return f"{head} {float(row.value):7.2f} us ({row.p20} to {row.p80}){bound_said(row)}{model}  {row.config}"


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """(measured, predicted) of every config that has both."""
    predicted = {_what(row): row for row in rows if row.provider == "model"}
    measured = (row for row in rows if row.provider == "kernel" and row.value)
    return [(row, predicted[_what(row)]) for row in measured if _what(row) in predicted]


def _what(row: Row) -> tuple[str, ...]:
    return (row.mode, row.dtype, row.hidden_size, row.batch, row.config)


def predicted_against_measured(rows: list[Row]) -> Figure | None:
    """A point for every config: on the line the model is right, above it too low."""
    found = pairs(rows)
    if not found:
        return None
    # Here: a machine that only measures need not have Matplotlib.
    import matplotlib.pyplot as plt
    from figures import titled

    figure, axis = plt.subplots(figsize=(6, 5.2), layout="constrained")
    for which, colour in COLOURS.items():
        of_pass = [(float(b.value), float(a.value), a) for a, b in found if a.mode == which]
        if of_pass:
            mean = geometric_mean(m / p for p, m, _ in of_pass)
            axis.plot(
                *list(zip(*of_pass))[:2],
                "o",
                color=colour,
                alpha=0.7,
                label=f"{which}: measured / predicted {mean:.2f}",
            )
            for p, m, row in of_pass:
                if abs(math.log2(m / p)) > 0.5:
                    axis.annotate(f"{row.hidden_size}x{row.batch} {row.dtype}", (p, m), fontsize=6)
    ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
    ends[0] = max(ends[0], 0.1)
    axis.plot(ends, ends, color="grey", linestyle="--", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="predicted, us a step", ylabel="measured, us a step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return titled(
        figure,
        rows,
        "a step of the recurrence: model and measurement\n(named, H x B: off by a factor of more than 1.4)",
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = {f"{dtype}-{precision}" if dtype == "float32" else dtype: (dtype, precision) for dtype, precision in TYPES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--hidden-size", nargs="+", type=int, default=HIDDEN_SIZES)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=names, default=["bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--best", type=int, default=1, help="configs of each problem (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile kernels ahead")
    options = parser.parse_args(arguments)
    if min(*options.hidden_size, *options.batch, options.best, options.workers) < 1:
        parser.error("sizes and counts must be at least 1")
    options.types = [names[name] for name in options.dtype]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if needs_gpu():
        return 2
    try:
        start(options.out)
    except OSError as error:
        print(f"steps: {error}", file=sys.stderr)
        return 2
    where = torch.device("cuda")
    work = list(jobs(options.hidden_size, options.batch, options.types, device_of(where), options.best))
    rows: list[Row] = []
    source, scratch = provenance(where), None
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        compiled = pool.map(compile_job, work)
        for job, report in tqdm(zip(work, compiled), total=len(work), unit="config", disable=None):
            if scratch is None or scratch.problem != job.problem:
                scratch = None  # before there is another
                scratch = Scratch(job.problem, job.device, where, op.layer)
            measured = measure(scratch, job) if report.ok else _complaint(report)
            new = rows_of(job, scratch.layout.seq_len, report.step(), measured, source)
            rows += new
            write_rows(options.out, rows)
            tqdm.write(line(new[0], new[1] if len(new) > 1 else None))
    found = pairs(rows)
    if found:
        ratios = sorted(float(a.value) / float(b.value) for a, b in found)
        print(f"measured / predicted: {ratios[0]:.2f} to {ratios[-1]:.2f}, geometric mean {geometric_mean(ratios):.2f}")
    return 0


def _complaint(report: compile_report.Row) -> str:
    if report.report is None:
        return report.error
    return f"spills {report.report.spills} bytes, takes {report.report.shared} bytes of shared memory"


if __name__ == "__main__":
    sys.exit(main())
