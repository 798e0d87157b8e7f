"""What a step should cost, from the binary and the plan: terms in microseconds, and which of them is the largest.

A step is a chain that nothing inside it can shorten: the others' tiles arrive, are read, multiplied, turned into gates
and states, and published. So the terms are added:

- hop: from one multiprocessor's store to another's load, by protocol.
- tile: reading the collected tile through L2. weights: re-reading W_hh where it is not resident.
- matrix: matrix instructions, by issue or by the latency of a chain of dependent ones, whichever is more.
- special: exp2, reciprocal and the like.
- issue: all other instructions of the warps that share a scheduler.
- barriers: of the block.

What the constants are worth is for the first measurement to say; those marked "assumed" have no source.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass

from lstm_triton.kernels.config import Config
from lstm_triton.kernels.listing import MATRIX, Loop

from lstm_triton.problem import Problem, ceil_div

SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle (NVIDIA's architecture white papers)
SPECIAL_CYCLES = 8  # 16 special functions a cycle and multiprocessor: a warp's 32 hold a scheduler's quarter for 8
BARRIER_CYCLES = 30  # assumed
CHAIN_CYCLES = 33  # latency of a dependent mma.sync 16x8x16 (Ampere microbenchmarks); of wgmma with N <= 16, assumed
L2_BYTES = 64  # a cycle and multiprocessor


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


@dataclass(frozen=True)
class Step:
    """Microseconds of one step of one wave of programs, by term; waves: how often the whole batch needs it."""

    hop: float
    tile: float
    weights: float
    matrix: float
    special: float
    issue: float
    barriers: float
    waves: int

    @property
    def terms(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "waves"}

    @property
    def total(self) -> float:
        return self.waves * sum(self.terms.values())

    @property
    def binding(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in self.terms.items() if value >= 0.005)
        return f"{self.total:.2f} us a step ({parts}; {self.waves} waves), bound by {self.binding}"


def macs_of(instruction: str) -> float:
    """Multiply-adds of one warp's share of a matrix instruction, from its shape: HMMA.16816, HGMMA.64x8x16 ..."""
    whole = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction)
    if whole:
        m, n, k = map(int, whole.groups())
        return m * n * k / 4  # a warpgroup's, of four warps
    packed = re.search(r"\.(16)(8)(4|8|16)\b", instruction)
    if packed is None:
        raise ValueError(f"the shape of {instruction} is not known")
    m, n, k = map(int, packed.groups())
    return float(m * n * k)


def predict(loop: Loop, config: Config, problem: Problem, arch: str, multiprocessors: int) -> Step:
    """The terms of one step of a pass whose time loop is `loop`. Raises KeyError for an arch without constants."""
    machine, size = MACHINES[arch], problem.element_size
    chunks = ceil_div(problem.depth, config.block_k)
    counts = loop.in_a_step(1 if config.resident else chunks)
    a_scheduler = config.num_warps / SCHEDULERS
    cycle = 1 / machine.clock
    matrix = {name: count for name, count in counts.items() if name.startswith(MATRIX)}
    # tf32 products have half the rate of 16-bit ones; `macs_of` counts their smaller depth.
    slower = 2 if problem.dtype == "float32" else 1
    issue = sum(
        count * macs_of(name) * config.num_warps * slower / (machine.wide_macs if "HGMMA" in name else machine.macs)
        for name, count in matrix.items()
    )
    chain = CHAIN_CYCLES * sum(count / _independent(name, config, problem) for name, count in matrix.items())
    special = sum(count for name, count in counts.items() if name.startswith("MUFU"))
    barriers = sum(count for name, count in counts.items() if name.startswith("BAR"))
    others = sum(counts.values()) - sum(matrix.values()) - special - barriers
    exchanged = config.placement not in ("local", "single")
    tile = config.block_b * problem.depth * size if exchanged else 0
    hidden_tiles = ceil_div(problem.hidden_size, config.block_h) if config.placement != "local" else 1
    programs = hidden_tiles * ceil_div(problem.batch, config.block_b) * problem.directions
    streamed = 0 if config.resident else problem.depth * problem.width(config.block_h) * size
    at_once = min(programs, multiprocessors)
    waves = ceil_div(programs, multiprocessors)
    if config.max_batch_tiles:
        waves = max(waves, ceil_div(ceil_div(problem.batch, config.block_b), config.max_batch_tiles))
    return Step(
        hop=machine.hop[config.protocol],
        tile=tile / L2_BYTES * cycle,
        weights=max(streamed / L2_BYTES * cycle, streamed * at_once / machine.l2),
        matrix=max(issue, chain) * cycle,
        special=special * SPECIAL_CYCLES * a_scheduler * cycle,
        issue=others * a_scheduler * cycle,
        barriers=barriers * BARRIER_CYCLES * cycle,
        waves=waves,
    )


def _independent(name: str, config: Config, problem: Problem) -> float:
    """How many accumulators of its own a warp has, whose chains run beside each other."""
    if "HGMMA" in name:
        return 1.0
    tiles = math.ceil(config.block_b / 16) * math.ceil(problem.width(config.block_h) / 8)
    return max(1.0, tiles if config.split_k > 1 else tiles / config.num_warps)
