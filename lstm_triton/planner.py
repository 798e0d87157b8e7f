"""Which config runs a pass: a pure function of the problem and the device.

`candidates` derives every config that fits the device's shared memory and a register budget;
`plan` takes the one with the smallest estimated time of a step. The estimate is a coarse sum of
published latencies and bandwidths: it ranks, it does not predict.

T is no part of a problem, and B only as the power of two above it: no batch size and no sequence
length leads to a new plan once its bucket is known, nor to a new binary once its plan is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from .device import Device
from .kernels.config import Config

PASSES = ("forward", "backward")
LARGEST_HIDDEN_SIZE = 16_384  # offsets inside W_hh [4H, H] are 32-bit
ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Problem:
    """One pass over one layer. batch is only a bucket: see `bucket`."""

    which: str
    hidden_size: int
    batch: int
    directions: int
    dtype: str
    precision: str

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZE[self.dtype]

    @property
    def depth(self) -> int:
        """K of the recurrent product."""
        return self.hidden_size if self.which == "forward" else 4 * self.hidden_size

    def width(self, block_h: int) -> int:
        """N of the recurrent product of a program with block_h units."""
        return 4 * block_h if self.which == "forward" else block_h

    @property
    def without_tensor_cores(self) -> bool:
        return self.dtype == "float32" and self.precision == "ieee"


@dataclass(frozen=True)
class Plan:
    """A config and where it came from ("heuristic" or "argument")."""

    config: Config
    source: str


@dataclass(frozen=True)
class NoPlan:
    """Why the kernels do not run a problem on a device."""

    reason: str


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def bucket(batch: int) -> int:
    return min(power_of_two(batch), 4096)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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


def plan(problem: Problem, device: Device) -> Plan | NoPlan:
    """The config for a problem on a device, or the reason why there is none."""
    return _plan(replace(problem, batch=bucket(problem.batch)), device)


@lru_cache(maxsize=4096)
def _plan(problem: Problem, device: Device) -> Plan | NoPlan:
    none = refusal(device, problem.dtype, problem.precision)
    if none is not None:
        return none
    if problem.hidden_size > LARGEST_HIDDEN_SIZE:
        return NoPlan(f"hidden_size is at most {LARGEST_HIDDEN_SIZE} in the kernels, got {problem.hidden_size}")
    found = list(candidates(problem, device))
    # One launch a step is for what cannot run otherwise: whether it is needed depends on H alone.
    found = [config for config in found if config.placement != "stepwise"] or found
    if not found:
        return NoPlan(f"no config for {problem} fits the shared memory of {device.name} ({device.shared_memory} bytes)")
    return Plan(min(found, key=lambda config: microseconds_per_step(config, problem, device)), "heuristic")


def candidates(problem: Problem, device: Device) -> Iterator[Config]:
    """Every config that fits the device, in no order of merit."""
    yield from _local(problem, device)
    for config in _tiles(problem, 8 if device.is_nvidia else 4):
        programs = ceil_div(problem.hidden_size, config.block_h) * problem.directions
        # One program per multiprocessor is always resident, whatever registers it takes.
        tiles = device.multiprocessors // programs
        variants = [config]
        if device.cooperative and tiles > 0:
            for protocol in ("mailbox", "flags"):
                variants.append(replace(config, placement="grid", protocol=protocol, max_batch_tiles=tiles))
        yield from (variant for variant in variants if fits(variant, problem, device))


def _local(problem: Problem, device: Device) -> Iterator[Config]:
    block = max(16, power_of_two(problem.hidden_size))
    if problem.without_tensor_cores and device.arch != "interpreter":
        return  # without tensor cores a resident W_hh would have to sit in registers, and does not fit
    for block_b in (16, 32, 64):
        warps = 8 if block > 32 and device.is_nvidia else 4
        config = Config("local", "none", True, device.has_wgmma, 1, block_b, block, block, warps)
        if fits(config, problem, device):
            yield config


def _tiles(problem: Problem, num_warps: int) -> Iterator[Config]:
    """Every config in which a program owns a slice of the units, as `stepwise`."""
    blocks = itertools.product((16, 32, 64), (16, 32, 64, 128), (32, 64, 128, 256, 512, 1024))
    for block_b, block_h, block_k in blocks:
        if block_h > max(16, power_of_two(problem.hidden_size)) or block_k > max(128, power_of_two(problem.depth)):
            continue
        for units_first, split_k in ((True, 1), (False, 1), (False, num_warps)):
            if split_k == 1 or block_k >= 16 * split_k:
                for resident in (True, False):
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
    if config.placement == "local":
        return state <= (2 if split_precision else 8)
    forward = problem.which == "forward"
    tile = config.block_b * config.block_k * words / threads
    row_block = config.block_b * problem.depth * words / threads
    weights = 0.0 if config.resident else width * config.block_k * words / threads
    product = config.block_b * width * config.split_k / threads
    flags = config.protocol == "flags"
    budget, most_state, most_row = 32.0, 4.0, 32.0 if forward and flags else 64.0
    aligned = problem.hidden_size * problem.element_size % 16 == 0
    if not aligned:
        # No wide load can start on such rows: more loads, more addresses.
        budget, most_state, most_row = 8.0, 2.0, 16.0
    if problem.without_tensor_cores:
        if config.resident or config.split_k > 1 or config.units_first or config.block_k > 32 or config.block_b > 16:
            return False
    elif forward != (config.split_k == 1) or config.units_first != (forward and device.has_wgmma):
        return False
    if split_precision:
        budget, most_state = 8.0, most_state / 2  # three products, operands in two parts
    elif not config.resident or (forward and config.block_b == 64):
        budget = max(8.0, budget / 2)
    if flags and not config.resident:
        return False  # the compiler pipelines the tile's loads too, on top of the weights'
    # The addresses of all resident chunks are alive at once; under flags so are their loads, which
    # no polling loop keeps apart.
    if config.resident and row_block > most_row and (forward or flags):
        return False
    return tile <= budget and weights <= budget and product <= 32 and state <= most_state


def shared_bytes(config: Config, problem: Problem) -> int:
    """Estimate, from above, of a program's shared memory."""
    size, width = problem.element_size, problem.width(config.block_h)
    copies = 2 if problem.dtype == "float32" and problem.precision == "tf32x3" else 1  # high and low parts
    if config.placement == "local":
        return copies * 4 * config.block_h * config.block_h * size + (4 * size + 8) * config.block_b * config.block_h
    chunks = ceil_div(problem.depth, config.block_k) if config.resident else 1
    weights = chunks * config.block_k * width * size * config.num_stages
    tile = config.block_b * config.block_k * size * config.num_stages
    sums = 4 * config.split_k * config.block_b * width
    return copies * weights + max(copies * tile, sums) + 6144


def microseconds_per_step(config: Config, problem: Problem, device: Device) -> float:
    """Coarse time of one step of the whole batch; see the module's docstring.

    Sources: a hop between SMs 0.65 us by flags, L2 about 5.5 TB/s and 64 B/clock per SM, shared
    memory 128 B/clock (H100; clock 1.7 GHz); a launch from Python about 20 us.
    """
    clock, l2, size = 1.7e3, 5.5e6, problem.element_size
    depth, width = ceil_div(problem.depth, config.block_k) * config.block_k, problem.width(config.block_h)
    hidden_tiles = ceil_div(problem.hidden_size, config.block_h) if config.placement != "local" else 1
    batch_tiles = ceil_div(problem.batch, config.block_b)
    programs = hidden_tiles * batch_tiles * problem.directions
    waves = ceil_div(programs, device.multiprocessors)
    if config.max_batch_tiles:
        waves = max(waves, ceil_div(batch_tiles, config.max_batch_tiles))
    weights, tile = depth * width * size, config.block_b * depth * size
    macs = config.block_b * depth * width
    if config.placement == "local":
        weights, tile, macs = 4 * config.block_h**2 * size, 0, 4 * config.block_b * config.block_h**2
    rate = 64 if problem.without_tensor_cores else 1024 if size == 2 else 512
    wide = config.units_first and device.has_wgmma and width >= 64
    # The matrix unit reads the weights from where they are while it multiplies.
    time = max(macs / (rate * (2 if wide else 1)), weights / (128 if config.resident else 64)) / clock
    time += tile / 64 / clock + (0 if config.resident else weights) * min(programs, device.multiprocessors) / l2
    chunks = depth // config.block_k if config.placement != "local" else 1
    time += {"none": 0.02, "flags": 0.02, "mailbox": 0.06}[config.protocol] * chunks
    time += {"local": 0.2, "grid": 0.9 if config.protocol == "flags" else 0.8, "stepwise": 20.0}[config.placement]
    time += 0.01 * config.block_b * config.block_h / (32 * config.num_warps)
    return time * waves
