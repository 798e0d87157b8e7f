"""Compile what the stages `doctor` and `first` of perf/on_gpu.sh launch into Triton's cache; needs no GPU.

    TRITON_CACHE_DIR=FOLDER python perf/ahead.py --arch sm_90

With the same Triton a machine with such a GPU finds the binaries there; what it does not find it compiles. Without
--arch they are for the GPU that is here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import launches
import steps
import torch
import triton
from host_overhead import HIDDEN as HIDDEN_OF_HOST
from shapes import SETS
from tqdm import tqdm

from lstm_triton.kernels.compile import compile_pass
from lstm_triton.kernels.config import Config
from lstm_triton.planning.device import KNOWN, Device, device_of
from lstm_triton.planning.planner import NoPlan, plan
from lstm_triton.planning.problem import PASSES, Problem

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_gpu

STAGES = ("doctor", "first")
NVIDIA = [arch for arch, device in KNOWN.items() if device.is_nvidia]


@dataclass(frozen=True)
class Binary:
    """state, save: whether an initial state is given, and what backward reads kept; as for `compile_pass`."""

    which: str
    config: Config
    hidden_size: int
    dtype: str
    precision: str
    directions: int
    state: bool
    save: bool = True


def of_config(problem: Problem, config: Config, state: bool, save: bool = True) -> Binary:
    sizes = (problem.hidden_size, problem.dtype, problem.precision, problem.directions)
    # Neither how many batch tiles share a launch is part of the binary, nor of other types a precision.
    binary = Binary(problem.which, replace(config, max_batch_tiles=0), *sizes, state, save)
    return binary if problem.dtype == "float32" else replace(binary, precision="ieee")


def of_call(
    device: Device, hidden_size: int, batch: int, dtype: str, precision: str = "ieee", directions: int = 1,
    state: bool = False, modes: tuple[str, ...] = ("training",),
) -> Iterator[Binary]:  # fmt: skip
    """By default plans: those of training, and of inference where that is among the modes."""
    for which in PASSES:
        problem = Problem(which, hidden_size, batch, directions, dtype, precision)
        chosen = plan(problem, device)
        if not isinstance(chosen, NoPlan):
            if "training" in modes:
                yield of_config(problem, chosen.config, state)
            if "inference" in modes and which == "forward":
                yield of_config(problem, chosen.config, state, save=False)


def of_doctor(device: Device) -> Iterator[Binary]:
    for case in launches.cases(device):
        for which, config in case.configs.items():
            problem = Problem(which, launches.HIDDEN, launches.BATCH, 1, case.dtype, "ieee")
            yield of_config(problem, config, state=True)
    yield from of_call(device, 64, 5, "float32")  # `python -m lstm_triton doctor`


def of_first(device: Device) -> Iterator[Binary]:
    """Of the tests of tests/test_gpu.py nearly all, then what is measured."""
    both = ("training", "inference")
    yield from of_call(device, 1024, 128, "bfloat16", modes=("inference",))  # launches that fill the device
    yield from of_call(device, 512, 16, "bfloat16", state=True, modes=both)  # streams
    for hidden_size in (64, 512):  # NaN and Inf
        yield from of_call(device, hidden_size, 20, "float16", directions=2)
    for (dtype, precision), shape in itertools.product(test_gpu.TYPES.values(), test_gpu.SHAPES.values()):
        name, directions = str(dtype).removeprefix("torch."), 2 if shape.get("bidirectional") else 1
        yield from of_call(device, shape["sizes"][1], shape["batch"], name, precision or "ieee", directions, state=True)
    for kind, which in itertools.product(test_gpu.SMALL_KINDS, PASSES):
        dtype, precision = test_gpu.TYPES[kind]
        for configs, pass_ in itertools.product(test_gpu.small_launches(kind, which, device), PASSES):
            sizes = (test_gpu.SMALL["sizes"][1], test_gpu.SMALL["batch"], 1)
            problem = Problem(pass_, *sizes, str(dtype).removeprefix("torch."), precision or "ieee")
            yield of_config(problem, configs[pass_], state=True)
    for batch in (8, 16, 32, 64):  # no batch and no length compiles anew
        yield from of_call(device, 96, batch, "float16")
    for job in steps.jobs(steps.HIDDEN_SIZES, steps.BATCHES, [("bfloat16", "tf32")], device, best=1):
        yield of_config(job.problem, job.config, state=True)
    yield from of_call(device, HIDDEN_OF_HOST, 1, "bfloat16", modes=both)
    for shape in SETS["first"]:
        sizes = (shape.hidden_size, shape.batch, shape.torch_dtype, shape.precision, shape.directions)
        yield from of_call(device, *sizes, modes=both)


def binaries(stages: list[str], device: Device) -> list[Binary]:
    found = itertools.chain.from_iterable({"doctor": of_doctor, "first": of_first}[stage](device) for stage in stages)
    return list(dict.fromkeys(found))


def compile_binary(binary: Binary, arch: str) -> None:
    sizes = (binary.hidden_size, getattr(torch, binary.dtype), binary.precision, binary.directions)
    compile_pass(binary.which, binary.config, arch, *sizes, state=binary.state, save=binary.save)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--arch", choices=NVIDIA, help="of a GPU that need not be here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("it takes a worker at least")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.arch is None and not torch.cuda.is_available():
        print("ahead: there is no GPU here, --arch says for which one to compile", file=sys.stderr)
        return 2
    device = KNOWN[options.arch] if options.arch else device_of(torch.device("cuda"))
    if not device.is_nvidia:
        print(f"ahead: nothing is compiled ahead for {device.name}")
        return 0
    work = binaries(options.stage, device)
    print(f"{len(work)} kernels for {device.name} ({device.arch}), Triton {triton.__version__}", flush=True)
    failed = 0
    # Ctrl-C, and the end of the time that there is, are for this process; the others end with it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(options.workers, get_context("spawn"), signal.signal, ignore) as pool:
        try:
            futures = [pool.submit(compile_binary, binary, device.arch) for binary in work]
            for binary, future in tqdm(zip(work, futures), total=len(work), unit="kernel", disable=None):
                error = future.exception()
                if error is not None:
                    failed += 1
                    line = (str(error).strip() or "no message").splitlines()[0][:200]
                    tqdm.write(f"FAILED: {binary}: {type(error).__name__}: {line}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print("interrupted: what is compiled is in the cache, the rest is compiled when it is launched")
            return 130
    print(
        f"{len(work) - failed} of {len(work)} kernels are in {os.environ.get('TRITON_CACHE_DIR', 'the default cache')}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
