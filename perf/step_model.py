"""What a step should cost by the terms of `planning.cost`, counted in the binary and not estimated from the plan."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lstm_triton.kernels.config import Config
from lstm_triton.kernels.listing import MATRIX, Loop
from lstm_triton.planning.cost import CHAIN_CYCLES, WIDE_CYCLES, Counts, Step, accumulators, step_of
from lstm_triton.planning.device import Device
from lstm_triton.planning.problem import Problem, ceil_div

THREADS = 32  # of a warp


def shape_of(instruction: str) -> tuple[int, int, int]:
    """M, N, K of a matrix instruction: HMMA.16816, HGMMA.64x8x16 ..."""
    whole = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction)
    if whole:
        m, n, k = map(int, whole.groups())
        return m, n, k
    packed = re.search(r"\.(16)(8)(4|8|16)\b", instruction)
    if packed is None:
        raise ValueError(f"the shape of {instruction} is not known")
    return int(packed[1]), int(packed[2]), int(packed[3])


def shared_bytes_of(instruction: str) -> int:
    """Bytes that a warp's instruction moves to or from shared memory; 0 if it is none that does."""
    kind, *modifiers = instruction.split(".")
    if kind in ("LDSM", "STSM"):
        matrices = int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
        return 128 * matrices
    if kind in ("LDS", "STS"):
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return THREADS * next((sizes[one] for one in modifiers if one in sizes), 4)
    return 0


def counts_of(loop: Loop, config: Config, problem: Problem) -> Counts:
    """What the time loop of a compiled kernel does in one step that waits for nobody."""
    counts = loop.in_a_step(1 if config.resident else ceil_div(problem.depth, config.block_k))
    matrix = {name: count for name, count in counts.items() if name.startswith(MATRIX)}
    wide = {shape_of(name): count for name, count in matrix.items() if name.startswith("HGMMA")}
    narrow = {shape_of(name): count for name, count in matrix.items() if name.startswith("HMMA")}
    groups, size = config.num_warps / 4, problem.element_size
    chain = CHAIN_CYCLES * sum(narrow.values()) / accumulators(config, problem)
    # One thread issues tcgen05 for all, and names no shape: only that it is waited for can be told.
    chain += WIDE_CYCLES * (starting(counts, "WARPGROUP.DEPBAR") + starting(counts, "UTCHMMA"))
    special, barriers = starting(counts, "MUFU"), starting(counts, "BAR")
    return Counts(
        macs=config.num_warps * sum(count * math.prod(shape) for shape, count in narrow.items()),
        wide_macs=groups * sum(count * math.prod(shape) for shape, count in wide.items()),
        chain=chain,
        operands=groups * size * sum(count * k * (m + n) for (m, n, k), count in wide.items()),
        moved=config.num_warps * sum(count * shared_bytes_of(name) for name, count in counts.items()),
        special=special,
        others=sum(counts.values()) - sum(matrix.values()) - special - barriers,
        barriers=barriers,
    )


def starting(counts: Mapping[str, int], prefix: str) -> int:
    return sum(count for name, count in counts.items() if name.startswith(prefix))


def predict(loop: Loop, config: Config, problem: Problem, device: Device) -> Step:
    """The terms of one step of a pass whose time loop is `loop`."""
    return step_of(counts_of(loop, config, problem), config, problem, device)
