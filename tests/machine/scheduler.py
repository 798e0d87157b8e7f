"""A launch, and the adversary who decides whatever PTX leaves open: who runs next, for how long, what arrives when.

Everything is drawn from two seeds. `seed` orders events; results must not depend on it. `rounding` errs in approximate
instructions; results may differ by their bounds.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANES
from .block import Block
from .faults import Deadlock
from .memory import Memory, Span
from .warp import DONE, RUNNING, WAITING, Warp

if TYPE_CHECKING:
    from .translate import Code

LOOKS = 3  # at which everybody has looked once more, and nothing has changed: a deadlock
PATIENCE = 100_000  # segments of one launch without any visible change


class Adversary:
    """Draws of one launch. lateness: the share of moments at which nothing arrives that need not."""

    def __init__(self, seed: int, rounding: int = 0) -> None:
        self.random = random.Random(seed)
        self.lanes_random = np.random.default_rng(seed)
        self.rounding = rounding
        self.poison = self.random.choice([2**64 - 1, 0x7FFF7FFF7FFF7FFF])  # NaNs of every type
        self.longest = self.random.choice([1, 4, 64, 1_000_000])  # segments that a warp runs at a stretch
        self.lateness = self.random.choice([0.0, 0.5, 0.95, 1.0])
        self.eagerness = self.random.choice([0.0, 0.5, 1.0])  # of asynchronous copies and products
        self.reversed = self.random.random() < 0.5
        self.freezes = self.random.random() < 0.5  # now and then a program, until nobody else can go on

    def burst(self) -> int:
        return self.random.randint(1, self.longest)

    def early(self) -> bool:
        return self.random.random() < self.eagerness

    def last_lane_loses(self) -> bool:
        return self.reversed

    def tears(self) -> bool:
        return self.random.random() < 0.25

    def arrives(self) -> bool:
        return self.random.random() >= self.lateness

    def lanes(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.lanes_random.random(shape) < 0.5

    def order(self, count: int) -> list[int]:
        return self.random.sample(range(count), count)


class Launch:
    """One kernel over a grid. together: whether all programs run side by side, as a cooperative launch promises."""

    def __init__(
        self,
        code: Code,
        grid: tuple[int, int, int],
        threads: int,
        shared_size: int,
        parameters: list[np.ndarray],
        spans: list[Span],
        together: bool,
        adversary: Adversary,
        looks: int = LOOKS,
    ) -> None:
        self.looks = looks
        self.code, self.grid, self.warps, self.shared_size = code, grid, threads // 32, shared_size
        self.parameters, self.together, self.adversary = parameters, together, adversary
        self.name = code.program.name
        self.programs = grid[0] * grid[1] * grid[2]
        self.memory = Memory(spans, code.global_granule, self.programs, adversary)
        self.blocks: list[Block] = []  # under way
        self.frozen: Block | None = None  # which is not run while another can be
        self.trace: list[tuple[int, int]] = []  # number of the block and of its warp, whenever one went on

    def run(self) -> None:
        with np.errstate(all="ignore"):
            positions = list(enumerate(itertools.product(*(range(size) for size in reversed(self.grid)))))
            self.adversary.random.shuffle(positions)
            at_once = len(positions) if self.together else 1
            for begin in range(0, len(positions), at_once):
                chosen = positions[begin : begin + at_once]
                self.blocks = [Block(self, number, (x, y, z)) for number, (z, y, x) in chosen]
                self._run_blocks()
                self.memory.finish(self.blocks)

    def _run_blocks(self) -> None:
        adversary, memory = self.adversary, self.memory
        warps = [warp for block in self.blocks for warp in block.warps]
        looked, quiet, version = 0, 0, memory.version
        while True:
            if memory.version != version:
                looked, quiet, version = 0, 0, memory.version
            warp = self._choose(warps)
            if warp is None:
                warps = [warp for warp in warps if warp.state != DONE]
                if not warps:
                    return
                if self.drain_some():
                    continue
                looked += 1
                waiting = [warp for warp in warps if warp.state == WAITING]
                if looked > self.looks * len(warps) or not waiting:
                    raise Deadlock(self._who_waits())
                warp = adversary.random.choice(waiting)
            warp.state = RUNNING
            self.trace.append((warp.block.number, warp.index))
            quiet += warp.run(adversary.burst())
            if quiet > PATIENCE:
                raise Deadlock(f"{self.name}: nothing has changed in {PATIENCE} steps of its warps")

    def _choose(self, warps: list[Warp]) -> Warp | None:
        """Any warp that can go on; None if there is none."""

        def ready(warp: Warp) -> bool:
            return warp.state == RUNNING or (warp.state == WAITING and warp.waiting_since != self.memory.version)

        draw = self.adversary.random
        if self.adversary.freezes and draw.random() < 0.05:
            self.frozen = draw.choice(self.blocks)
        for _ in range(4):
            warp = warps[int(draw.random() * len(warps))]
            if ready(warp) and warp.block is not self.frozen:
                return warp
        found = [warp for warp in warps if ready(warp)]
        awake = [warp for warp in found if warp.block is not self.frozen]
        if found and not awake:
            self.frozen = None
        return draw.choice(awake or found) if found else None

    def stored(self, warp: Warp) -> None:
        """After a store: something may arrive."""
        if self.adversary.arrives():
            self.drain_some()

    def drain_some(self) -> bool:
        """Let a part of what was stored arrive, whichever; whether there was any."""
        lists = [
            entries
            for block in self.blocks
            for entries in (block.pending, *(w.pending for w in block.warps))
            if entries
        ]
        if not lists:
            return False
        entries = self.adversary.random.choice(lists)
        at = self.adversary.random.randrange(len(entries))
        shadows = entries[at]
        if self.adversary.random.random() < 0.5 or len(shadows) == 1:
            entries.pop(at)
            self._arrived(entries, shadows)
        else:
            some = self.adversary.lanes(shadows.shape[:1])
            entries[at] = shadows[~some]
            if not len(entries[at]):
                entries.pop(at)
            self._arrived(entries, shadows[some])
        return True

    def _arrived(self, entries: list[np.ndarray], shadows: np.ndarray) -> None:
        if self.code.releases:
            for block in self.blocks:
                for owner in (block, *block.warps):
                    if owner.pending is entries:
                        owner.unreleased.append(shadows)
        self.memory.drain(shadows)

    def special_registers(self, block: Block, threads: np.ndarray) -> dict[str, np.ndarray]:
        def same(value: int) -> np.ndarray:
            return np.full(32, value, np.uint32)

        found = {
            "%tid.x": threads.astype(np.uint32),
            "%laneid": LANES.astype(np.uint32),
            "%ntid.x": same(32 * self.warps),
        }
        for axis, at, size in zip("xyz", block.position, self.grid):
            found |= {f"%ctaid.{axis}": same(at), f"%nctaid.{axis}": same(size)}
        return found | {f"%tid.{axis}": same(0) for axis in "yz"} | {f"%ntid.{axis}": same(1) for axis in "yz"}

    def _who_waits(self) -> str:
        """Of every program, what its warps wait for."""
        lines = []
        for block in self.blocks:
            waits: dict[str, list[int]] = {}
            for warp in block.warps:
                what = "has ended"
                if warp.state != DONE and warp.waits_for is not None:
                    site, address = warp.waits_for
                    what = f"waits at {site}" + (f" for {self.memory.name_of(address)}" if address else "")
                waits.setdefault(what, []).append(warp.index)
            if not block.done:
                lines += [f"program {block.position}, warps {who}: {what}" for what, who in waits.items()]
        head = f"{self.name}: nobody can go on"
        if not self.together and self.programs > 1:
            head += "; the launch is not cooperative, so that its programs need not run together"
        return "\n  ".join([head, *lines])
