"""python -m lstm_triton tune: measure every admissible config of a list of shapes, and nn.LSTM, on this GPU.

A shape is HxB or HxBxD: hidden size, batch and directions. The table is written after every
problem, so nothing measured is lost by an interruption, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from ..kernels.compile import compile_pass
from ..layer import op
from ..planning import store
from ..planning.device import Device, gpu_here, on_gpu
from ..planning.padding import padded_size
from ..planning.planner import NoPlan, plan
from ..planning.problem import PASSES, Bucket, Problem, bucket_of
from ..planning.route import bout_of, kernel_device
from ..planning.table import Entry, Table, TableError, load
from ..tuning.search import Interrupted, Progress, search
from . import contest

# Sizes that users run, one of every bucket that a placement or cuDNN's choice turns on.
DEFAULT_SHAPES = "64x32 128x64 128x256 256x32 256x256 512x16 512x64 512x256 640x32 768x16 1024x16 1024x64 1024x128"
HOST_BOUND = " (host-bound)"  # see `clock.Times`
TYPES = {
    "float16": ("float16", "tf32"),
    "bfloat16": ("bfloat16", "tf32"),
    "float32-tf32": ("float32", "tf32"),
    "float32-tf32x3": ("float32", "tf32x3"),
    "float32-ieee": ("float32", "ieee"),
}


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    batch: int
    directions: int
    dtype: str
    precision: str

    def problems(self, device: Device) -> list[Problem]:
        """Of both passes, by the hidden size that the kernels compute a layer by."""
        size = padded_size(self.hidden_size, self.directions, self.dtype, self.precision, device)
        return [Problem(which, *vars(replace(self, hidden_size=size)).values()) for which in PASSES]


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = __doc__
    command.add_argument("--shapes", nargs="+", default=DEFAULT_SHAPES.split(), metavar="SHAPE",
                         help="shapes HxB or HxBxD, or files with such words (default: %(default)s)")  # fmt: skip
    command.add_argument("--dtype", nargs="+", choices=TYPES, default=["bfloat16", "float16", "float32-tf32"])
    command.add_argument(
        "--budget", type=_positive(float), metavar="SECONDS", help="stop after this long (default: when done)"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="the table (default: the user's cache folder)")
    command.add_argument("--again", action="store_true", help="measure what the table has, too")
    command.add_argument(
        "--workers", type=_positive(int), default=os.cpu_count() or 1, help="processes that compile ahead"
    )


def _positive(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    return read


def parse_shapes(words: list[str], types: list[str]) -> list[Shape]:
    """ValueError says which word is neither a shape nor a file of shapes."""
    sizes = []
    for word in words:
        if Path(word).is_file():
            lines = (line.partition("#")[0] for line in Path(word).read_text().splitlines())
            sizes += [_sizes(part, f" in {word}") for line in lines for part in line.split()]
        else:
            sizes.append(_sizes(word, ", and no such file"))
    if not sizes:
        raise ValueError("no shapes to tune")
    return [Shape(*one, *TYPES[name]) for one in dict.fromkeys(sizes) for name in dict.fromkeys(types)]


def _sizes(word: str, where: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)(?:x([12]))?", word)
    if match is None or min(int(match[1]), int(match[2])) < 1:
        raise ValueError(f"{word!r} is no shape HxB or HxBxD (D is 1 or 2){where}")
    return int(match[1]), int(match[2]), int(match[3] or 1)


def run(options: argparse.Namespace) -> int:
    """ValueError, RuntimeError and OSError are the user's to read; nothing is written then."""
    shapes = parse_shapes(options.shapes, options.dtype)
    where = gpu_here() or torch.device("cpu")
    device = kernel_device(where)
    if isinstance(device, NoPlan):
        here = device.reason if on_gpu(where) else "there is none here"
        raise RuntimeError(f"tuning measures on a GPU: {here}")
    for shape in shapes:
        for problem in shape.problems(device):
            chosen = plan(problem, device)
            if isinstance(chosen, NoPlan):
                raise RuntimeError(chosen.reason)
    path = options.out or store.user_path(device)
    tuner = Tuner(_start(path, device), path, device, where, options.again)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass  # better now than after the measurements
    logging.getLogger("lstm_triton").addHandler(logging.StreamHandler())
    deadline = time.monotonic() + (options.budget if options.budget is not None else float("inf"))
    try:
        with _pool(options.workers, device) as pool:
            tuner.tune(shapes, deadline, pool)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is in {path}, the same command goes on", file=sys.stderr)
        return 130
    _summary(tuner.table, path)
    return 0


@dataclass
class Tuner:
    """A table on its way, saved after every problem and every contest."""

    table: Table
    path: Path
    device: Device
    where: torch.device
    again: bool

    def tune(self, shapes: list[Shape], deadline: float, pool: Executor | None) -> None:
        """Shape by shape: both passes, then the contest, so that what is done is done whole."""
        done: set[Bucket] = set()
        with tqdm(total=len(shapes), unit="shape", disable=None) as bar:
            for index, shape in enumerate(shapes):
                for problem in shape.problems(self.device):
                    left = (deadline - time.monotonic()) / (len(shapes) - index)
                    if left > 0 and bucket_of(problem) not in done:
                        bar.set_postfix_str(
                            f"{problem.which} H={problem.hidden_size} B={problem.batch} {problem.dtype}"
                        )
                        # A third of the time for each pass, the rest for the contest.
                        self._search(problem, time.monotonic() + left / 3, pool, bar)
                    done.add(bucket_of(problem))
                if on_gpu(self.where) and time.monotonic() < deadline:
                    bar.set_postfix_str(f"against nn.LSTM H={shape.hidden_size} B={shape.batch} {shape.dtype}")
                    self._contest(shape, pool)
                bar.update()

    def _search(self, problem: Problem, deadline: float, pool: Executor | None, bar: tqdm) -> None:
        bucket = bucket_of(problem)
        known = None if self.again else self.table.entries.get(bucket)
        if known is not None and known.complete:
            return
        try:
            entry = search(
                problem,
                self.device,
                self.where,
                op.layer,
                deadline,
                known,
                pool,
                lambda p: bar.set_description(_said(p)),
            )
        except Interrupted as interrupted:
            self._keep(bucket, interrupted.entry)
            raise
        self._keep(bucket, entry)

    def _keep(self, bucket: Bucket, entry: Entry | None) -> None:
        if entry is not None:
            self.table = replace(self.table, entries={**self.table.entries, bucket: entry})
            self._save()

    def _contest(self, shape: Shape, pool: Executor | None) -> None:
        if pool is not None:
            with contextlib.suppress(BrokenExecutor):  # then they compile as they are launched
                self._compile_ahead(shape, pool)
        with store.using(self.table, self.device):
            results = dict(self.table.contests)
            for call in contest.calls_of(shape.hidden_size, shape.batch, shape.directions, shape.dtype, self.device):
                if self.again or bout_of(call, shape.precision, True, False, self.device) not in results:
                    results.update(contest.hold(call, shape.precision, self.device, self.where))
        self.table = replace(self.table, contests=results)
        self._save()

    def _compile_ahead(self, shape: Shape, pool: Executor) -> None:
        """The binaries of a call without an initial state, which the contest makes."""
        futures = []
        for problem in shape.problems(self.device):
            chosen = plan(problem, self.device, self.table)
            assert not isinstance(chosen, NoPlan)
            for save in (True, False) if problem.which == "forward" else (True,):
                options = {"save": save, "state": False}
                sizes = (problem.hidden_size, getattr(torch, shape.dtype), shape.precision, shape.directions)
                given = (problem.which, chosen.config, self.device.arch, *sizes)
                futures.append(pool.submit(_compile, *given, **options))
        for future in futures:
            future.exception()  # it will be met where the kernel is launched

    def _save(self) -> None:
        """With what another process may have added to the file."""
        if self.path.exists():
            self.table = self.table.over(load(self.path))
        self.table.save(self.path)


def _start(path: Path, device: Device) -> Table:
    """The table to go on with. One that does not belong here is not overwritten."""
    made = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    new = store.new_table(device, made)
    if not path.exists():
        return new
    try:
        table = load(path)
    except TableError as error:
        raise RuntimeError(f"{path} is no table ({error}); move it away first") from None
    problem = table.mismatch(device)
    if problem:
        raise RuntimeError(f"{path} is of no use here, {problem}; move it away first")
    return replace(table, made=made)


def _compile(*arguments: Any, **options: Any) -> None:
    compile_pass(*arguments, **options)  # for the cache on disk: a binary cannot be sent


@contextlib.contextmanager
def _pool(workers: int, device: Device) -> Iterator[Executor | None]:
    if workers < 1 or device.arch == "interpreter":
        yield None
        return
    # Ctrl-C is for this process; the others end with it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore) as pool:
        yield pool


def _said(progress: Progress) -> str:
    if isinstance(progress.result, str):
        return progress.result
    return f"{progress.result:.2f} us a step" + HOST_BOUND * progress.host_bound


def _summary(table: Table, path: Path) -> None:
    for bucket, entry in table.entries.items():
        best = entry.measured[entry.config.encode()]
        assert not isinstance(best, str)
        failed = sum(isinstance(value, str) for value in entry.measured.values())
        configs = f"of {len(entry.measured)} configs" + ("" if entry.complete else ", not all")
        bound = HOST_BOUND * (entry.config.encode() in entry.host_bound)
        print(
            f"{bucket.which:8} H<={bucket.hidden_size:<5} B<={bucket.batch:<5} D={bucket.directions} {bucket.dtype:8} "
            f"{bucket.precision:6} {best:8.2f} us a step{bound}, {configs} ({failed} left out)"
        )
    for bout, result in table.contests.items():
        length = "T=1" if bout.single_step else f"T={contest.STEPS}"
        print(
            f"{bout.mode:9} {length:5} H<={bout.hidden_size:<5} B<={bout.batch:<5} D={bout.directions} {bout.dtype:8} "
            f"against cuDNN {bout.algorithm:16} {result.speedup:5.2f}x"
            + "".join(
                f", {name} host-bound"
                for name, bound in (("ours", result.ours_host_bound), ("nn.LSTM", result.torch_host_bound))
                if bound
            )
        )
    print(f"table: {path}", file=sys.stderr)
