"""What a config costs: shared memory, time, bytes and operations. Pure arithmetic, coarse on purpose.

`shared_bytes` errs to the large side, and tests hold it against compiled kernels.

A step is a chain that nothing inside it can shorten: the others' tiles arrive, are read, multiplied, turned into gates
and states, and published. So `step_of` adds its terms up. What it counts with comes from a compiled kernel
(`perf/step_model.py`) or, before there is one, from `estimate`; tests hold the one against the other. What the machine
constants are worth is for measurement to say; those marked "assumed" have no source.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.config import REGISTER_BYTES, Config
from .device import Device
from .problem import Problem, ceil_div

SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle (NVIDIA's architecture white papers)
SPECIAL_CYCLES = 8  # 16 special functions a cycle and multiprocessor: a warp's 32 hold a scheduler's quarter for 8
BARRIER_CYCLES = 30  # assumed
CHAIN_CYCLES = 33  # latency of a dependent mma.sync 16x8x16 (Ampere microbenchmarks)
WIDE_CYCLES = 64  # from the issue of the last of some wgmma to their result; assumed
SHARED_BYTES = 128  # a cycle and multiprocessor, from shared memory
L2_BYTES = 64  # a cycle and multiprocessor
LAUNCH = 20.0  # microseconds of a launch from Python, about: one a step where `stepwise`


@dataclass(frozen=True)
class Machine:
    """clock: cycles a microsecond. hop: microseconds by protocol. macs: 16-bit multiply-adds a cycle and
    multiprocessor, by mma.sync and by wgmma. l2: bytes a microsecond of the whole device."""

    clock: float
    hop: dict[str, float]
    macs: float
    wide_macs: float
    l2: float


# Hops by flags are published microbenchmarks (H100 0.65 us, consumer Blackwell 0.40 us); a mailbox saves the second
# trip, assumed a quarter; the A100's and B200's are assumed to be as the H100's. Clocks are boost clocks.
_FAR, _NEAR = {"flags": 0.65, "mailbox": 0.49, "none": 0.0}, {"flags": 0.40, "mailbox": 0.30, "none": 0.0}
MACHINES = {
    "sm_80": Machine(1410, _FAR, 1024, 1024, 3.5e6),
    "sm_86": Machine(1695, _NEAR, 512, 512, 2.0e6),
    "sm_89": Machine(2520, _NEAR, 512, 512, 4.0e6),
    "sm_90": Machine(1755, _FAR, 1280, 2048, 5.5e6),
    "sm_100": Machine(1965, _FAR, 1280, 1280, 8.0e6),
    "sm_120": Machine(2407, _NEAR, 512, 512, 5.0e6),
}
ELSEWHERE = MACHINES["sm_80"]  # an order of configs is wanted for every device


@dataclass(frozen=True)
class Counts:
    """What one program does in one step.

    macs, wide_macs: multiply-adds by mma.sync and by wgmma. chain: cycles of the longest chain of matrix instructions
    that wait for each other. operands: bytes that wgmma reads from shared memory; moved: that other instructions read
    there and write. special, others: instructions of a warp on the special function unit, and the rest. barriers: of
    the block.
    """

    macs: float
    wide_macs: float
    chain: float
    operands: float
    moved: float
    special: float
    others: float
    barriers: float


@dataclass(frozen=True)
class Step:
    """Microseconds of one step of one wave of programs, by term; waves: how often the whole batch needs it.

    - hop: from one multiprocessor's store to another's load, by protocol; or a launch.
    - tile: reading the collected tile through L2. weights: re-reading W_hh where it is not resident.
    - matrix: matrix instructions, by issue, by their operands or by a chain of dependent ones, whichever is most.
    - shared: other traffic of shared memory.
    - special: exp2, reciprocal and the like.
    - issue: all other instructions of the warps that share a scheduler.
    - barriers: of the block.
    """

    hop: float
    tile: float
    weights: float
    matrix: float
    shared: float
    special: float
    issue: float
    barriers: float
    waves: int

    @property
    def terms(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "waves"}

    @property
    def total(self) -> float:
        return self.waves * sum(self.terms.values())

    @property
    def binding(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self.terms.items() if value >= 0.005)
        return f"{self.total:.2f} us a step ({parts}; {self.waves} waves), bound by {self.binding}"


def step_of(counts: Counts, config: Config, problem: Problem, device: Device) -> Step:
    """The terms of one step of the whole batch."""
    machine = MACHINES.get(device.arch, ELSEWHERE)
    cycle, size = 1 / machine.clock, problem.element_size
    a_scheduler = config.num_warps / SCHEDULERS
    programs = ceil_div(problem.batch, config.block_b) * _hidden_tiles(config, problem) * problem.directions
    at_once = min(programs, device.multiprocessors)
    waves = ceil_div(programs, device.multiprocessors)
    if config.max_batch_tiles:
        waves = max(waves, ceil_div(ceil_div(problem.batch, config.block_b), config.max_batch_tiles))
    exchanged = config.placement in ("grid", "stepwise")

    def through_l2(bytes_of_one: float) -> float:
        return max(bytes_of_one / L2_BYTES * cycle, bytes_of_one * at_once / machine.l2)

    issue = counts.macs / machine.macs + counts.wide_macs / machine.wide_macs
    issue *= 2 if size == 4 else 1  # tf32 has half the rate of 16-bit products
    return Step(
        hop=LAUNCH if config.placement == "stepwise" else machine.hop[config.protocol],
        tile=through_l2(config.block_b * problem.depth * size) if exchanged else 0.0,
        weights=0.0 if config.resident else through_l2(problem.depth * problem.width(config.block_h) * size),
        matrix=max(issue, counts.operands / SHARED_BYTES, counts.chain) * cycle,
        shared=counts.moved / SHARED_BYTES * cycle,
        special=counts.special * SPECIAL_CYCLES * a_scheduler * cycle,
        issue=counts.others * a_scheduler * cycle,
        barriers=counts.barriers * BARRIER_CYCLES * cycle,
        waves=waves,
    )


def _hidden_tiles(config: Config, problem: Problem) -> int:
    return 1 if config.placement == "local" else ceil_div(problem.hidden_size, config.block_h)


def shared_bytes(config: Config, problem: Problem) -> int:
    """Estimate, from above, of a program's shared memory."""
    size, width = problem.element_size, problem.width(config.block_h)
    copies = 2 if problem.dtype == "float32" and problem.precision == "tf32x3" else 1  # high and low parts
    if config.placement == "local":
        state = config.block_b * config.block_h
        return copies * 4 * config.block_h**2 * size + max(copies * 4 * size + 8, 4 * config.split_k) * state
    chunks = ceil_div(problem.depth, config.block_k) if config.resident else 1
    weights = chunks * config.block_k * width * size * config.num_stages
    tile = config.block_b * config.block_k * size * config.num_stages
    sums = 4 * config.split_k * config.block_b * width
    return copies * weights + max(copies * tile, sums) + 6144


def accumulators(config: Config, problem: Problem) -> float:
    """Tiles of 16 by 8 of the product that one warp has, whose chains of mma.sync run beside each other."""
    width = problem.width(config.block_h)
    wide, narrow = (width, config.block_b) if config.units_first else (config.block_b, width)
    tiles = ceil_div(wide, 16) * ceil_div(narrow, 8)
    return tiles if config.split_k > 1 else max(1.0, tiles / config.num_warps)


def features(config: Config, problem: Problem, device: Device) -> dict[str, float]:
    """What a program has in one step, of everything that instructions are spent on; see `FITTED`."""
    threads, size = 32 * config.num_warps, problem.element_size
    state = config.block_b * config.block_h / threads
    width, depth, chunks = problem.width(config.block_h), 4 * config.block_h, 1
    if config.placement == "local":
        depth = config.block_h if problem.which == "forward" else depth
    else:
        chunks = ceil_div(problem.depth, config.block_k)
        depth = chunks * config.block_k
    products = 3 if size == 4 and problem.precision == "tf32x3" else 0 if problem.without_tensor_cores else 1
    chain = products * depth / config.split_k / (16 if size == 2 else 8)
    wgmma = device.has_wgmma and config.units_first and config.split_k == 1 and config.block_b >= 16 and width >= 64
    tile, weights = config.block_b * depth * size, width * depth * size
    few = config.resident and weights * (2 if products == 3 else 1) <= REGISTER_BYTES
    # wgmma reads resident weights where they lie; those of tf32x3 are split for it first.
    fetched = 0 if few or (wgmma and products == 1 and config.resident) else products * weights
    groups = min(config.num_warps // 4, width // 64) if wgmma else 1
    return {
        "step": 1,
        "state": max(1.0, state),  # elements of a thread
        "spare": max(0.0, 1 / state - 1),  # threads for each that has an element of its own, beyond one
        "word": 0.0 if config.placement == "local" else config.block_b * depth * size / 4 / threads,  # collected
        "mma": 0.0 if wgmma else chain * accumulators(config, problem),
        "wgmma": chain * ceil_div(width, 64 * groups) if wgmma else 0.0,
        "product": config.block_b * width * config.split_k / threads,  # elements of a thread
        "fma": config.block_b * width * depth / threads if problem.without_tensor_cores else 0.0,
        "chunk": chunks,
        "streamed chunk": 0 if config.resident else chunks,
        "streamed": 0.0 if config.resident else width * depth * size / 4 / threads,  # words of a thread
        "tile bytes": tile,
        "read bytes": tile * (config.num_warps if config.split_k == 1 and not wgmma else 1),  # by all warps
        "weight bytes": fetched,
        "product bytes": config.block_b * width * config.split_k * 4,
        "chain": chain,
    }


# What each of the counts is a sum of, and how much of each feature it takes: fitted to compiled kernels by
# `python perf/fit_counts.py --sample 300`; but for fma, of which there is one a product, as nothing draws ieee there.
COUNTED_FROM = {
    "others": ("step", "state", "word", "mma", "wgmma", "product", "fma", "chunk", "streamed", "streamed chunk"),
    "barriers": ("step", "chunk", "streamed chunk", "spare"),
    "special": ("state",),
    "moved": ("tile bytes", "read bytes", "weight bytes", "product bytes"),
}
FITTED: dict[str, dict[str, dict[str, float]]] = {
    "forward": {
        "others": {
            "step": 72,
            "mma": 2.4,
            "wgmma": 7.1,
            "product": 9.9,
            "fma": 1.0,
            "chunk": 3.2,
            "streamed chunk": 26,
        },
        "barriers": {"step": 4.0, "chunk": 1.7, "streamed chunk": 1.6, "spare": 6.0},
        "special": {"state": 10},
        "moved": {"tile bytes": 1.1, "read bytes": 0.44, "weight bytes": 1.4, "product bytes": 2.6},
    },
    "backward": {
        "others": {
            "step": 173,
            "state": 12,
            "mma": 2.3,
            "product": 9.1,
            "fma": 1.0,
            "chunk": 3.8,
            "streamed": 1.6,
            "streamed chunk": 16,
        },
        "barriers": {"step": 8.9, "streamed chunk": 2.9, "spare": 6.9},
        "special": {"state": 2},
        "moved": {"tile bytes": 1.15, "read bytes": 1.15, "weight bytes": 0.92, "product bytes": 5.5},
    },
}


def estimate(config: Config, problem: Problem, device: Device) -> Counts:
    """Counts of a step before there is a binary, from what the config has and `FITTED`."""
    have = features(config, problem, device)
    depth_of_one = 16 if problem.element_size == 2 else 8
    fitted = {
        name: sum(amount * have[feature] for feature, amount in amounts.items())
        for name, amounts in FITTED[problem.which].items()
    }
    # Warpgroups beyond one for every 64 rows of weights share out the columns.
    warpgroups, rows = config.num_warps / 4, 64
    columns = config.block_b / max(1.0, warpgroups * rows / problem.width(config.block_h))
    wide = have["wgmma"] * warpgroups * depth_of_one
    return Counts(
        macs=have["mma"] * config.num_warps * 16 * 8 * depth_of_one,
        wide_macs=wide * rows * columns,
        chain=WIDE_CYCLES if wide else CHAIN_CYCLES * have["chain"],
        operands=wide * (rows + columns) * problem.element_size,
        **fitted,
    )


def microseconds_per_step(config: Config, problem: Problem, device: Device) -> float:
    """Time of one step of the whole batch, estimated: what plans are ordered by."""
    return step_of(estimate(config, problem, device), config, problem, device).total


@dataclass(frozen=True)
class Work:
    """What one step of one pass does for the whole batch.

    operations: of the recurrent product, a multiplication and an addition counted as two.
    memory_bytes: per step between the chip and device memory, each tensor once: the projected input
        and the output; in training also the gates and cells kept; in backward these and the gradients.
    exchanged_bytes: read through L2 by all programs: the tile handed over, and W_hh where it is
        not resident.
    """

    operations: int
    memory_bytes: int
    exchanged_bytes: int


def work_per_step(config: Config, problem: Problem, training: bool = True) -> Work:
    """Counted from the config, not measured."""
    hidden, directions, size = problem.hidden_size, problem.directions, problem.element_size
    state = problem.batch * hidden * directions * size  # one [B, D, H] tensor
    tensors = 5 + 5 * training if problem.which == "forward" else 10  # gates 4, out; gates 4, cells | 4, 1, dout, 4
    programs = directions * ceil_div(problem.batch, config.block_b) * ceil_div(hidden, config.block_h)
    exchanged = 0
    if config.placement != "local":
        exchanged += programs * config.block_b * problem.depth * size
    if not config.resident:
        exchanged += programs * problem.depth * problem.width(config.block_h) * size
    return Work(8 * problem.batch * hidden * hidden * directions, tensors * state, exchanged)
