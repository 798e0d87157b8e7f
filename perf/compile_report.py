"""What the plans become on each target, compiled ahead of time: no GPU is needed.

    python perf/compile_report.py                  the default plans
    python perf/compile_report.py --all            every candidate config (hours; narrow it down)
    python perf/compile_report.py --all --layouts --inputs every
                                                   the same with all optional inputs, only as far as layouts
    python perf/compile_report.py --arch sm_90 --hidden-size 1024 --dtype bfloat16 --batch 16
    python perf/compile_report.py --variant every  the default plans of every variant of the cell
    python perf/compile_report.py --predict        what a step should cost by the model of lstm_triton/planning/cost.py

Prints registers, spills, shared memory, matrix instructions and the machine instructions in the
time loop of every config, with a state only and with marks (see INPUTS), and exits with status 1 if one that a plan
uses by default spills, does not fit its device, has threads load copies of a tile that others publish, or operands that
the matrix unit misreads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from step_model import predict
from tqdm import tqdm

from lstm_triton.kernels.compile import Report, compile_pass, report_of
from lstm_triton.kernels.config import Config
from lstm_triton.planning.cost import MACHINES, Step
from lstm_triton.planning.device import KNOWN, Device
from lstm_triton.planning.planner import NoPlan, candidates, plan, refusal
from lstm_triton.planning.problem import PASSES, Problem, bucket_of_batch
from lstm_triton.variant import Variant

HIDDEN_SIZES = (20, 64, 128, 256, 512, 650, 1024, 2048)
BATCHES = (16, 128)
TYPES = (("bfloat16", "tf32"), ("float16", "tf32"), ("float32", "tf32"), ("float32", "tf32x3"), ("float32", "ieee"))
VARIANTS = {
    "plain": Variant(),
    "peephole": Variant(peephole=True),
    "coupled_gates": Variant(coupled_gates=True),
    "cell_clip": Variant(cell_clip=3.0),
    "recurrent_grad_clip": Variant(recurrent_grad_clip=10.0),
    "recurrent_dropout": Variant(recurrent_dropout=0.25),
    "variational_dropout": Variant(variational_dropout=0.25),
    "zoneout": Variant(zoneout=(0.1, 0.1)),
    "layer_norm": Variant(layer_norm=True),
}
# Optional inputs of a call. A call with more of them keeps more registers and has narrower loads behind its operands.
INPUTS = {
    "none": {"state": False},
    "state": {},
    "lengths": {"lengths": True},
    "reset": {"reset": True},
    "marks": {"lengths": True, "reset": True, "reset_state": True},
    "all": {"lengths": True, "reset": True, "reset_state": True, "states": True},
}
_all = {name: value for variant in VARIANTS.values() for name, value in variant.asked().items()}
VARIANTS["all_but_layer_norm"] = Variant(**(_all | {"coupled_gates": False, "layer_norm": False}))
VARIANTS["everything"] = Variant(**(_all | {"coupled_gates": False}))  # with four gates there is more of it


@dataclass(frozen=True)
class Job:
    """One config on one target; problem is the first of those that share it."""

    problem: Problem
    device: Device
    config: Config
    variant: str
    inputs: str = "state"
    layouts: bool = False


@dataclass(frozen=True)
class Row:
    job: Job
    report: Report | None
    error: str = ""

    @property
    def ok(self) -> bool:
        report = self.report
        if report is None or report.spills or report.copied_tiles or report.misread_operands:
            return False
        return report.shared <= self.job.device.shared_memory

    def line(self) -> str:
        problem, config, report = self.job.problem, self.job.config, self.report
        head = (
            f"{self.job.device.arch:7} {problem.which:8} {problem.dtype:8} {problem.precision:6} "
            f"H={problem.hidden_size:<5} B<={problem.batch:<5} {config.placement:8} {config.protocol:7} "
            f"{'resident' if config.resident else 'streamed'} weights-{'first' if config.units_first else 'second'} "
            f"split_k={config.split_k} B{config.block_b} H{config.block_h} K{config.block_k} warps={config.num_warps}"
        )
        if self.job.variant != "plain":
            head = f"{self.job.variant:19} {head}"
        if self.job.inputs != "state":
            head += f" inputs={self.job.inputs}"
        if report is None:
            return f"{head}  FAILED: {self.error}"
        found = " tiles loaded in copies" * bool(report.copied_tiles) + " operands misread" * bool(
            report.misread_operands
        )
        if self.job.layouts:
            return head + found
        matrix = " ".join(f"{kind}={count}" for kind, count in report.matrix_instructions.items()) or "none"
        return (
            f"{head}  registers={report.registers} spills={report.spills} "
            f"shared={report.shared}/{self.job.device.shared_memory} loop={report.loop.instructions} matrix: {matrix}"
            + found
        )

    def record(self) -> dict:
        report = None if self.report is None else {**asdict(self.report), "asm": None}
        step = self.step()
        predicted = None if step is None else asdict(step) | {"total": step.total, "binding": step.binding}
        return {**asdict(self.job), "report": report, "predicted": predicted, "error": self.error, "ok": self.ok}

    def step(self) -> Step | None:
        """The model's prediction; None without a report or constants of the target."""
        job = self.job
        if self.report is None or job.layouts or job.device.arch not in MACHINES:
            return None
        return predict(self.report.loop, job.config, job.problem, job.device)


def jobs(
    archs, hidden_sizes, batches, types, every: bool, variants: Sequence[str] = ("plain",),
    inputs: Sequence[str] = ("state",), layouts: bool = False,
) -> Iterator[Job]:  # fmt: skip
    """The distinct configs of the default plans (or of all candidates) over a set of problems, with any of `inputs`."""
    seen = set()
    for arch in archs:
        device = KNOWN[arch]
        for dtype, precision in types:
            if refusal(device, dtype, precision) is not None:
                continue
            for hidden_size in hidden_sizes:
                for batch in batches:
                    for which, variant in itertools.product(PASSES, variants):
                        kind, bucket = VARIANTS[variant].kind(training=True), bucket_of_batch(batch)
                        problem = Problem(which, hidden_size, bucket, 1, dtype, precision, kind)
                        for config in candidates(problem, device) if every else default_configs(problem, device):
                            # How many batch tiles share a launch is no part of the binary.
                            tiles = config.encode().rpartition(" ")[0]
                            key = (arch, which, dtype, precision, hidden_size, variant, tiles)
                            if key not in seen:
                                seen.add(key)
                                yield from (Job(problem, device, config, variant, given, layouts) for given in inputs)


def default_configs(problem: Problem, device: Device) -> list[Config]:
    """The plan's config, if there is one."""
    chosen = plan(problem, device)
    return [] if isinstance(chosen, NoPlan) else [chosen.config]


def compile_job(job: Job) -> Row:
    problem = job.problem
    dtype, variant = getattr(torch, problem.dtype), VARIANTS[job.variant]
    try:
        binary = compile_pass(
            problem.which,
            job.config,
            job.device.arch,
            problem.hidden_size,
            dtype,
            problem.precision,
            problem.directions,
            cell=variant.cell(training=True),
            peephole=bool(variant.peephole),
            norm=variant.layer_norm,
            layouts_only=job.layouts,
            **INPUTS[job.inputs],
        )
        report = report_of(binary)
    except Exception as error:  # a compiler failure is a finding: it becomes a row, and fails the run
        return Row(job, None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    return Row(job, report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every candidate config, not only the plans")
    parser.add_argument("--arch", nargs="+", choices=sorted(KNOWN), default=list(KNOWN))
    parser.add_argument("--hidden-size", nargs="+", type=int, default=HIDDEN_SIZES)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    names = [f"{dtype}-{precision}" if dtype == "float32" else dtype for dtype, precision in TYPES]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--variant", nargs="+", choices=[*VARIANTS, "every"], default=["plain"])
    parser.add_argument("--inputs", nargs="+", choices=[*INPUTS, "every"], default=["state", "marks"])
    parser.add_argument("--layouts", action="store_true", help="stop at layouts: no registers, in half of the time")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="a sample of the configs, drawn by name")
    parser.add_argument("--predict", action="store_true", help="print the model's time of a step, by term")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    if min(*options.hidden_size, *options.batch, options.one_in) < 1:
        parser.error("hidden sizes, batches and N must be at least 1")
    options.inputs = list(INPUTS) if "every" in options.inputs else options.inputs
    options.variants = list(VARIANTS) if "every" in options.variant else options.variant
    options.types = [pair for name, pair in zip(names, TYPES) if name in options.dtype]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    problems = options.arch, options.hidden_size, options.batch, options.types
    work = list(jobs(*problems, options.all, options.variants, options.inputs, options.layouts))
    work = [job for job in work if zlib.crc32(repr(job).encode()) % options.one_in == 0]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(tqdm(pool.map(compile_job, work), total=len(work), unit="config", disable=None))
    for row in rows:
        print(row.line() + ("" if row.ok else "  <-- not fit"))
        if options.predict and (step := row.step()) is not None:
            print(f"        {step}")
    bad = sum(not row.ok for row in rows)
    print(f"{len(rows)} configs, {bad} that fail, spill, do not fit, load copies or misread operands")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([row.record() for row in rows], file, indent=1)
    return 1 if bad and not options.all else 0


if __name__ == "__main__":
    sys.exit(main())
