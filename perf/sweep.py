"""Every provider on every shape: one CSV, from which `plot.py` draws.

    python perf/sweep.py --set home users --out rows.csv
    python perf/sweep.py --set home users --out rows.csv --resume

A provider is timed on a shape only after its results were found to be as close to fp64 as twice
nn.LSTM's (`check.py`); an error is a row that says so. Medians with the 20th and 80th percentile, after
warm-up, inputs outside the timer, gradients cleared; the L2 cache is not flushed. TF32 is the same for
all. The file is whole after every shape and provider: Ctrl-C keeps what is done, --resume goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from check import Truth
from floor import Ceilings, rows_of
from floor import measure as measure_ceilings
from measure import Measurement, cold_ms, once
from providers import PROVIDERS, Unsupported
from rows import Row, RowsError, bound_said, device_here, digits, host_bound, provenance, start, write_rows
from shapes import SETS, Shape
from tqdm import tqdm

from lstm_triton import LSTM, explain
from lstm_triton.kernels.compile import compile_pass
from lstm_triton.planning.device import Device, device_of
from lstm_triton.planning.planner import NoPlan
from lstm_triton.planning.problem import PASSES, Problem
from lstm_triton.planning.route import plan_for
from lstm_triton.tuning.clock import Times

MODES = ("forward", "train", "step", "memory", "cold")
FIRST = {shapes[0] for shapes in SETS.values()}
METRIC = {"forward": "ms", "train": "ms", "step": "ms", "memory": "", "cold": "ms"}
GPU_ONLY = ("ours_kernels", "flashrnn", "torchrl")
DEFAULTS = {  # what fits the machine: sets, providers, modes
    "cuda": (
        ["small", "home", "open", "users"],
        ["nn_lstm", "ours", "ours_kernels"],
        list(MODES),
    ),
    "cpu": (["scratch", "cpu"], [name for name in PROVIDERS if name not in GPU_ONLY and "autocast" not in name],
            list(MODES)),
}  # fmt: skip


def blank(shape: Shape, provider: str, mode: str, metric: str) -> Row:
    sizes = (shape.input_size, shape.hidden_size, shape.batch, shape.seq_len, shape.layers, shape.directions)
    return Row(shape.region, shape.label, *map(str, sizes), shape.dtype, provider, mode, metric, "")


def modes_of(shape: Shape, modes: list[str]) -> list[str]:
    """A cold start hardly depends on the shape and takes seconds: only the first shape of a set has one."""
    return [mode for mode in modes if mode != "cold" or shape in FIRST]


def expected(shape: Shape, provider: str, modes: list[str], device: torch.device) -> list[Row]:
    """The rows that will be there when the shape and the provider are done, without values."""
    rows = []
    for mode in modes_of(shape, modes):
        metrics = [METRIC[mode]] if METRIC[mode] else ["saved_mib", *["peak_mib"] * (device.type == "cuda")]
        rows += [blank(shape, provider, mode, metric) for metric in metrics]
    return rows


def configs_of(measurement: Measurement, provider: str) -> str:
    """What our layers run by in training, for the row."""
    lstm, x = getattr(measurement.module, "lstm", None), measurement.x
    if not isinstance(lstm, LSTM) or not x.is_cuda:
        return ""
    layer = explain(lstm, x).layers[0]
    return " | ".join(f"{one.source}: {one.config.encode()}" for one in layer.passes) or f"nn.LSTM: {layer.reason}"


def problems_of(shape: Shape) -> list[Problem]:
    sizes = (shape.hidden_size, shape.batch, shape.directions, shape.torch_dtype, shape.precision)
    return [Problem(which, *sizes) for which in PASSES]


def rows_for(
    shape: Shape, truth: Truth | str, provider: str, modes: list[str], ceilings: Ceilings, repeat: int
) -> list[Row]:
    """All rows of one provider on one shape; truth may be the reason why there is none."""
    device = device_here()
    wanted = expected(shape, provider, modes, device)
    if isinstance(truth, str):
        return [replace(row, error=truth) for row in wanted]
    try:
        measurement = Measurement(truth, provider, repeat)
        config = configs_of(measurement, provider)
    except Exception as error:  # whatever a provider raises is its result
        return [replace(row, error=_said(error)) for row in wanted]
    found: dict[tuple[str, str], Times | str] = {}
    for mode in modes_of(shape, modes):
        try:
            if mode == "cold":
                found[mode, "ms"] = once(cold_ms(shape, provider, device))
            else:
                found |= {(mode, metric): times for metric, times in measurement.metrics(mode)}
        except Exception as error:
            found |= {(mode, row.metric): _said(error) for row in wanted if row.mode == mode}
    rows = []
    for row in wanted:
        times = found[row.mode, row.metric]
        if isinstance(times, str):
            rows.append(replace(row, error=times))
            continue
        floor = ""
        if row.metric == "ms" and row.mode in ("forward", "train"):
            floor = digits(ceilings.floor_ms(shape, row.mode))
        values = dict(value=digits(times.median), p20=digits(times.p20), p80=digits(times.p80))
        values |= dict(repeat=str(times.repeat), host_bound=host_bound(times))
        rows.append(replace(row, **values, floor=floor, config=config))
    return rows


def _said(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.provider:24} {row.mode:8}"
    if row.error:
        return f"{head} {row.error}"
    text = f"{head} {row.value:>9} {row.metric:9} ({row.p20} to {row.p80}){bound_said(row)}"
    return f"{text}  floor/measured {float(row.floor) / float(row.value):.2f}" if row.floor else text


def compile_ahead(shapes: list[Shape], device: Device, workers: int) -> None:
    """Fill Triton's cache for the plans of all shapes, in parallel: a sweep is for measuring."""
    jobs = set()
    for shape in shapes:
        for problem in problems_of(shape):
            chosen = plan_for(problem, device)
            if not isinstance(chosen, NoPlan):
                saves = (True, False) if problem.which == "forward" else (True,)
                # How many batch tiles share a launch is no part of the binary.
                config = replace(chosen.config, max_batch_tiles=0)
                sizes = (shape.hidden_size, shape.torch_dtype, shape.precision, shape.directions)
                jobs |= {(problem.which, config, sizes, save) for save in saves}
    # Ctrl-C is for this process; and what fails here will be met, and recorded, where the kernel is launched.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with (
        contextlib.suppress(BrokenExecutor),
        ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore) as pool,
    ):
        futures = [pool.submit(_compile, job, device.arch) for job in jobs]
        for future in tqdm(futures, desc="compiling", unit="kernel", disable=None):
            future.exception()


def _compile(job: tuple, arch: str) -> None:
    which, config, (hidden_size, dtype, precision, directions), save = job
    compile_pass(which, config, arch, hidden_size, getattr(torch, dtype), precision, directions, save=save, state=False)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets, providers, modes = DEFAULTS[device_here().type]
    parser.add_argument("--set", nargs="+", choices=SETS, default=sets, help="(default: %(default)s)")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=providers, help="(default: %(default)s)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=modes, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="go on with the file: measure what it lacks")
    parser.add_argument("--repeat", type=positive, default=20 if device_here().type == "cuda" else 7)
    parser.add_argument("--threads", type=positive, default=1, help="on a CPU; more need cores that nobody shares")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes that compile kernels ahead")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        rows = start(options.out, options.resume)
    except (OSError, RowsError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    device = device_here()
    where = provenance(device)
    others = {row.device for row in rows} - {where["device"]}
    if others:
        print(f"sweep: {options.out} has rows of {', '.join(others)}, this is {where['device']}", file=sys.stderr)
        return 2
    # An error is tried again; the ceilings are those of the last run.
    rows = [row for row in rows if row.value and row.provider != "ceiling"]
    done = {row.key() for row in rows}
    work = []
    for shape in dict.fromkeys(shape for name in options.set for shape in SETS[name]):
        providers = [
            name for name in dict.fromkeys(options.provider)
            if any(row.key() not in done for row in expected(shape, name, options.mode, device))
        ]  # fmt: skip
        if providers:
            work.append((shape, providers))
    if not work:
        print("nothing is left to measure")
        return 0
    bar = tqdm(total=sum(len(providers) for _, providers in work), unit="provider", disable=None)
    try:
        ceilings, found = measure_ceilings(device, sorted({shape.dtype for shape, _ in work}))
        rows += rows_of(found, where)
        if device.type == "cuda" and any(name.startswith("ours") for name in options.provider):
            compile_ahead([shape for shape, _ in work], device_of(device), options.workers)
        for shape, providers in work:
            tqdm.write(str(shape))
            truth = _truth(shape, device)
            for provider in providers:
                bar.set_postfix_str(provider)
                new = rows_for(shape, truth, provider, options.mode, ceilings, options.repeat)
                rows += [replace(row, **where) for row in new if row.key() not in done]
                write_rows(options.out, rows)
                tqdm.write("\n".join("  " + line(row) for row in new))
                bar.update()
                if device.type == "cuda":
                    torch.cuda.synchronize()  # after an error that the GPU does not recover from, this raises
    except torch.AcceleratorError as error:
        print(f"sweep: the GPU is lost, --resume goes on in a new process: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {len(rows)} rows are in {options.out}, --resume goes on", file=sys.stderr)
        return 130
    finally:
        bar.close()
    failed = sum(bool(row.error) for row in rows)
    print(f"{len(rows)} rows in {options.out}, {failed} of them errors")
    return 0


def _truth(shape: Shape, device: torch.device) -> Truth | str:
    try:
        return Truth(shape, device)
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return f"no fp64 truth to check against: {_said(error)}"


if __name__ == "__main__":
    sys.exit(main())
