"""Which config runs a pass: a pure function of the problem, the device and a tuned table.

`candidates` derives every config that fits the device's shared memory and a register budget. `plan`
takes the table's entry for the problem's bucket, if there is one and it is among what fits, else
the candidate with the smallest estimated time of a step (`cost.py`).

T is no part of a problem, and B only as the power of two above it: no batch size and no sequence
length leads to a new plan once its bucket is known, nor to a new binary once its plan is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..kernels.config import Config
from .cost import microseconds_per_step, shared_bytes
from .device import Device
from .problem import ELEMENT_SIZE, Problem, bucket_of, bucket_of_batch, ceil_div, power_of_two
from .table import NO_TABLE, Table

LARGEST_HIDDEN_SIZE = 16_384  # offsets inside W_hh [4H, H] are 32-bit
UNITS, FEWEST_UNITS = (16, 32, 64, 128), 8  # of one program
LARGEST_TILE = 128  # units of one program that waits for nobody
SINGLE_BATCH = 64  # rows of the largest batch whose single step is one launch; not measured yet


@dataclass(frozen=True)
class Plan:
    """A config and where it came from: "heuristic", or the table's name."""

    config: Config
    source: str


@dataclass(frozen=True)
class NoPlan:
    """Why the kernels do not run a problem on a device."""

    reason: str


def refusal(device: Device, dtype: str, precision: str) -> NoPlan | None:
    """Why no problem of this type runs on this device, whatever its shape; None if some do."""
    if dtype not in ELEMENT_SIZE:
        return NoPlan(f"the kernels compute in float16, bfloat16 and float32, not in {dtype}")
    if device.arch == "interpreter":
        if dtype == "bfloat16":
            return NoPlan("Triton's interpreter multiplies the bit patterns of bfloat16, not their values")
        return None
    if dtype == "float64":
        return NoPlan("float64 runs through the kernels in Triton's interpreter only, and by PyTorch elsewhere")
    if not device.is_nvidia and device.arch != "gfx942":
        return NoPlan(f"of AMD's GPUs the kernels have been compiled for gfx942 only, {device.name} is {device.arch}")
    if dtype == "float32" and precision == "tf32x3" and not device.is_nvidia:
        return NoPlan(f"Triton does not compile tf32x3 for {device.arch}")
    if device.is_nvidia and int(device.arch[3:]) < 80:
        return NoPlan(f"the kernels need compute capability 8.0, {device.name} has {device.arch}")
    return None


def plan(
    problem: Problem, device: Device, table: Table = NO_TABLE, without: frozenset[Config] = frozenset()
) -> Plan | NoPlan:
    """The config for a problem on a device, or the reason why there is none. without: configs found to be wrong."""
    bucket = bucket_of_batch(problem.batch)
    return _plan(problem if problem.batch == bucket else replace(problem, batch=bucket), device, table, without)


@lru_cache(maxsize=4096)
def _plan(problem: Problem, device: Device, table: Table, without: frozenset[Config]) -> Plan | NoPlan:
    none = refusal(device, problem.dtype, problem.precision)
    if none is not None:
        return none
    if problem.norm and problem.hidden_size == 1 and problem.element_size == 2:
        return NoPlan(
            "the layer normalisation of a single unit makes rounding errors of 16-bit cells some hundred times larger"
        )
    if problem.hidden_size > LARGEST_HIDDEN_SIZE:
        return NoPlan(f"hidden_size is at most {LARGEST_HIDDEN_SIZE} in the kernels, got {problem.hidden_size}")
    found = admissible(problem, device)
    entry = table.entries.get(bucket_of(problem))
    tuned = None if entry is None else placed(entry.config, problem, device)
    if found and without:
        found = [config for config in found if config not in without]
        if not found:
            return NoPlan(
                f"every config for the {problem.which} pass of hidden_size {problem.hidden_size} in {problem.dtype} "
                f'was wrong on {device.name} when it was checked: backend="torch" does without, and '
                "LSTM_TRITON_CHECK=off does not ask"
            )
    if tuned in found:
        return Plan(tuned, table.name)
    if not found and problem.norm and not device.cooperative:
        return NoPlan(
            f"layer normalisation spans programs from H = {LARGEST_TILE + 1} on, and then needs a cooperative launch"
        )
    if not found and device.is_amd:
        return NoPlan(
            f"on {device.name} the kernels run only where W_hh fits one program: Triton's AMD backend drops the "
            "exchange's volatile loads, and fails on row pointers that are chosen at run time"
        )
    if not found:
        return NoPlan(f"no config for {problem} fits the shared memory of {device.name} ({device.shared_memory} bytes)")
    return Plan(min(found, key=lambda config: microseconds_per_step(config, problem, device)), "heuristic")


def plan_single(problem: Problem, device: Device) -> Config | None:
    """The config for one forward step in one launch, its input's projection included; None where there is none.

    Every program reads its slices of both weight matrices once, whatever the batch: a wide batch is left to a GEMM.
    The tiles are small, for many programs to share the reading; with larger ones the compiler spills on some targets.
    """
    if device.is_amd or problem.batch > SINGLE_BATCH or problem.hidden_size > LARGEST_HIDDEN_SIZE:
        return None
    if refusal(device, problem.dtype, problem.precision) is not None:
        return None
    return Config("single", "none", False, device.has_wgmma, 1, 16, 16, 32, 8 if device.is_nvidia else 4, 2)


def admissible(problem: Problem, device: Device) -> list[Config]:
    """What a plan may be: the candidates, those of one launch a step only where there are no others.

    Whether one launch a step is needed depends on H alone, never on the batch: route relies on it.
    """
    found = list(candidates(problem, device))
    return [config for config in found if config.placement != "stepwise"] or found


def placed(config: Config, problem: Problem, device: Device) -> Config | None:
    """The config with as many batch tiles a launch as can wait for each other; None if not even one can."""
    if config.placement != "grid":
        return config
    # One program per multiprocessor is always resident, whatever registers it takes.
    tiles = device.multiprocessors // (ceil_div(problem.hidden_size, config.block_h) * problem.directions)
    return replace(config, max_batch_tiles=tiles) if device.cooperative and tiles else None


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Every config that fits the device, in no order of merit; on AMD those without an exchange."""
    yield from _local(problem, device)
    if device.is_amd:
        return
    found = [*_stepwise_and_grid(problem, device, UNITS)]
    yield from found
    if not any(config.resident and config.placement == "grid" for config in found):
        # Half as many units a program, on twice as many multiprocessors: W_hh may then stay on chip.
        for config in _stepwise_and_grid(problem, device, (FEWEST_UNITS,)):
            # So narrow a product of 32 rows takes twice the estimate forward, or spills.
            rows = 16 if problem.which == "forward" else 64
            if config.resident and config.placement == "grid" and config.block_b <= rows:
                yield config


def _stepwise_and_grid(problem: Problem, device: Device, units: tuple[int, ...]) -> Iterator[Config]:
    for config in _tiles(problem, device, units):
        if not fits(config, problem, device):
            continue  # then neither does it when it waits
        if not problem.norm or config.block_h >= problem.hidden_size:
            yield config
        for protocol in ("mailbox", "flags"):
            whole = placed(replace(config, placement="grid", protocol=protocol), problem, device)
            if whole is not None and fits(whole, problem, device):
                yield whole


def _local(problem: Problem, device: Device) -> Iterator[Config]:
    block = max(16, power_of_two(problem.hidden_size))
    if problem.without_tensor_cores and device.arch != "interpreter":
        return  # without tensor cores a resident W_hh would have to sit in registers, and does not fit
    rows = (16, 32, 64) if device.is_amd else (8, 16, 32, 64)
    for block_b, warps in itertools.product(rows, (4, 8) if block > 32 and device.is_nvidia else (4,)):
        split_k = warps if problem.which == "backward" else 1
        units_first = _units_first(block_b, problem, device)
        config = Config("local", "none", True, units_first, split_k, block_b, block, block, warps)
        if fits(config, problem, device):
            yield config


def _units_first(block_b: int, problem: Problem, device: Device) -> bool:
    """Which operand the weights are: 8 rows fit the narrow side of mma.sync only, and wgmma is wide on one side."""
    return block_b == 8 or (problem.which == "forward" and device.has_wgmma)


def _tiles(problem: Problem, device: Device, units: tuple[int, ...]) -> Iterator[Config]:
    """Every config in which a program owns a slice of the units, as `stepwise`."""
    without, warps = problem.without_tensor_cores, (4, 8) if device.is_nvidia else (4,)
    rows = (16,) if without else (8, 16, 32, 64)
    depths = (32,) if without else (32, 64, 128, 256, 512, 1024, 2048)
    for block_b, block_h, block_k, num_warps in itertools.product(rows, units, depths, warps):
        if block_h > max(16, power_of_two(problem.hidden_size)) or block_k > max(128, power_of_two(problem.depth)):
            continue
        if without:
            ways: tuple[bool, int, tuple[bool, ...]] = (False, 1, (False,))
        else:
            split_k = 1 if problem.which == "forward" and block_b > 8 else num_warps
            ways = (_units_first(block_b, problem, device), split_k, (True, False))
        units_first, split_k, residence = ways
        if split_k == 1 or block_k >= 16 * split_k:
            for resident in residence:
                blocks_of = (units_first, split_k, block_b, block_h, block_k)
                # Two stages: the next chunk of streamed weights is on its way during a product.
                yield Config("stepwise", "none", resident, *blocks_of, num_warps, 1 if resident else 2)


def fits(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a config is expected to compile without spilling and within shared memory.

    The budgets count 4-byte registers per thread: for the tile on its way to the dot, a streamed
    chunk of weights, the dot's result and the state tile. They were drawn from
    `python perf/compile_report.py --all`, and the tests compile the default plans they admit.
    """
    if shared_bytes(config, problem) > device.shared_memory:
        return False
    threads = config.num_warps * (32 if device.is_nvidia else 64)
    words = problem.element_size / 4
    width = problem.width(config.block_h)
    state = config.block_b * config.block_h / threads
    split_precision = problem.precision == "tf32x3" and problem.dtype == "float32"
    forward = problem.which == "forward"
    if config.placement == "local":
        everything = 4 if forward else 2
        return state <= (2 if split_precision else everything if problem.kind == "norm+" else 8)
    tile = config.block_b * config.block_k * words / threads
    row_block = config.block_b * problem.depth * words / threads
    weights = 0.0 if config.resident else width * config.block_k * words / threads
    product = config.block_b * width * config.split_k / threads
    flags = config.protocol == "flags"
    budget, most_state, most_row = 32.0, 4.0, 32.0 if forward and flags else 64.0
    if config.block_b == 8:
        most_state = 2.0
    if config.split_k > 1 and forward:
        budget = 16.0
    elif config.split_k > 1 and config.resident and not flags:
        budget = 64.0
    if not problem.aligned:
        # No wide load can start on such rows: more loads, more addresses.
        budget, most_state, most_row = 8.0, min(most_state, 2.0), 16.0
    if split_precision:
        budget, most_state = 8.0, most_state / 2  # three products, operands in two parts
        most_row = min(most_row, 24.0) if forward and flags else most_row
    elif not config.resident or (forward and config.block_b == 64):
        budget = max(8.0, budget / 2)
    if flags and not config.resident:
        return False  # the compiler pipelines the tile's loads too, on top of the weights'
    if problem.norm:
        most_state = min(most_state, 2.0 if problem.kind == "norm" else 1.0)
    if forward and config.split_k == 1 and width > 16 * config.num_warps:
        # Every warp has several tiles of the product. H counts in whole chunks here.
        row_block = config.block_b * ceil_div(problem.depth, config.block_k) * config.block_k * words / threads
        most_row = min(most_row, 40.0)
    # The addresses of all resident chunks are alive at once; under flags so are their loads, which
    # no polling loop keeps apart.
    if config.resident and row_block > most_row and (forward or flags):
        return False
    return tile <= budget and weights <= budget and product <= 32 and state <= most_state
