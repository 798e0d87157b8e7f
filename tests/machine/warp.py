"""A warp: 32 lanes, their registers, which of them are active, and where it stands.

A branch on which lanes differ splits the warp: one side runs up to where the sides meet again (the branch's immediate
post-dominator), then the other. Lanes of a side that waits keep their registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import LANES
from .copies import Copies, Copy
from .faults import Divergence, Trap
from .wgmma import Queue

if TYPE_CHECKING:
    from .block import Block
    from .ptx import Instruction

RUNNING, BARRIER, WAITING, DONE = "running", "at a barrier", "waiting", "done"
END = -1  # where a warp stands that has ended


@dataclass
class Split:
    """A divergent branch: where its sides meet, who is active there, and the side that has not run yet."""

    meet: int
    mask: np.ndarray
    other: int | None
    other_mask: np.ndarray


class Warp:
    def __init__(self, block: Block, index: int) -> None:
        launch = block.launch
        self.block, self.index = block, index
        self.code = block.number * (launch.warps + 1) + index + 1  # who sees what only this warp sees: see memory.py
        self.at = 0  # the segment that comes next
        self.state = RUNNING
        self.mask: np.ndarray | None = None  # active lanes; None: all
        self.splits: list[Split] = []
        self.registers = launch.code.new_registers(launch.adversary)
        self.special = launch.special_registers(block, LANES + 32 * index)
        self.parameters = launch.parameters
        self.clock = np.zeros(launch.programs, np.int32)
        self.pending: list[np.ndarray] = []
        self.unreleased: list[np.ndarray] = []
        self.copies = Copies()
        self.products = Queue()
        self.polls: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self.waiting_since = -1  # the memory's version that it has seen twice
        self.waits_for: tuple[Instruction, int] | None = None

    # Control

    def run(self, burst: int) -> int:
        """Up to `burst` segments; how many it were."""
        code, count = self.block.launch.code, 0
        while count < burst and self.state == RUNNING:
            count += 1
            # It stays where it is until a segment has ended: an error names it.
            self.at = code.segment(self.at, self.mask is not None)(self, self.registers)
            while self.splits and self.at == self.splits[-1].meet:
                self._meet()
            if self.at == END:
                self._end()
        return count

    def branch(self, condition: np.ndarray, taken: int, otherwise: int, meet: int) -> int:
        """The segment to go on with; the warp splits where active lanes differ."""
        active = condition if self.mask is None else condition[self.mask]
        if active.all():
            return taken
        if not active.any():
            return otherwise
        mask = np.ones(32, bool) if self.mask is None else self.mask
        sides = [(taken, mask & condition), (otherwise, mask & ~condition)]
        if self.block.launch.adversary.last_lane_loses():
            sides.reverse()
        (first, first_mask), (second, second_mask) = sides
        self.splits.append(Split(meet, mask, second, second_mask))
        self.mask = first_mask
        return first

    def _meet(self) -> None:
        split = self.splits[-1]
        if split.other is not None:
            self.at, self.mask, split.other = split.other, split.other_mask, None
        else:
            self.splits.pop()
            self.mask = None if split.mask.all() else split.mask

    def _end(self) -> None:
        if self.splits:
            raise Divergence(f"{self.name}: lanes end on their own")
        self.state = DONE
        self.block.pass_barrier()

    def barrier(self, site: Instruction) -> None:
        if self.mask is not None:
            raise Divergence(self.report(site, "a part of the warp is at a barrier"))
        self.state = BARRIER
        self.waits_for = (site, 0)
        self.block.pass_barrier()

    def whole(self, site: Instruction) -> None:
        """All lanes take part in what follows."""
        if self.mask is not None:
            raise Divergence(self.report(site, "needs all lanes of the warp"))

    def members(self, site: Instruction, mask: np.ndarray) -> None:
        """All lanes are named by a membermask and take part."""
        self.whole(site)
        if (mask != 0xFFFFFFFF).any():
            raise Divergence(self.report(site, "names a part of the warp's lanes"))

    def polled(self, site: Instruction, address: np.ndarray, values: np.ndarray) -> None:
        """A strong load. One that has found the same before, with no change in memory since, finds it again: the warp
        need not be run until there is one."""
        version = self.block.launch.memory.version
        before = self.polls.get(id(site))
        self.polls[id(site)] = address, values, version
        if (
            before is not None
            and before[2] == version
            and np.array_equal(before[0], address)
            and np.array_equal(before[1], values)
        ):
            self.state, self.waiting_since = WAITING, version
            self.waits_for = (site, int(address[0]))

    # Memory, called by translated code. mask: lanes that take part, None for all.

    def load_global(
        self, site: Instruction, address: np.ndarray, mask: np.ndarray | None, width: int, count: int, strong: bool
    ) -> np.ndarray:
        if mask is None:
            return self.block.launch.memory.load(site, self, address, width, count, strong)
        found = np.zeros((count, 32), _UNSIGNED[width])
        if mask.any():
            found[:, mask] = self.block.launch.memory.load(site, self, address[mask], width, count, strong)
        return found

    def store_global(
        self,
        site: Instruction,
        address: np.ndarray,
        mask: np.ndarray | None,
        width: int,
        values: list[np.ndarray],
        strong: bool,
    ) -> None:
        stacked = np.array(values)
        if mask is None:
            self.block.launch.memory.store(site, self, address, stacked, width, strong)
        elif mask.any():
            self.block.launch.memory.store(site, self, address[mask], stacked[:, mask], width, strong)
        self.block.launch.stored(self)

    def atomic(
        self,
        site: Instruction,
        address: np.ndarray,
        mask: np.ndarray | None,
        operand: np.ndarray,
        what: str,
        order: str,
    ) -> np.ndarray:
        found = np.zeros(32, operand.dtype)
        chosen = np.ones(32, bool) if mask is None else mask
        if chosen.any():
            memory = self.block.launch.memory
            found[chosen] = memory.atomic(site, self, address[chosen], operand[chosen], what, order)
        return found

    def load_shared(
        self, site: Instruction, address: np.ndarray, mask: np.ndarray | None, width: int, count: int
    ) -> np.ndarray:
        if mask is None:
            return self.block.shared.load(site, self, address, width, count)
        found = np.zeros((count, 32), _UNSIGNED[width])
        if mask.any():
            found[:, mask] = self.block.shared.load(site, self, address[mask], width, count)
        return found

    def store_shared(
        self, site: Instruction, address: np.ndarray, mask: np.ndarray | None, width: int, values: list[np.ndarray]
    ) -> None:
        stacked = np.array(values)
        if mask is None:
            self.block.shared.store(site, self, address, stacked, width)
        elif mask.any():
            self.block.shared.store(site, self, address[mask], stacked[:, mask], width)

    def load_rows(self, site: Instruction, address: np.ndarray, matrices: int) -> np.ndarray:
        """ldmatrix: [matrices, 8 rows, 4 words]."""
        self.whole(site)
        words = self.block.shared.load(site, self, address[: 8 * matrices], 4, 4)
        return np.ascontiguousarray(words.T).reshape(matrices, 8, 4)

    def store_rows(self, site: Instruction, address: np.ndarray, rows: np.ndarray) -> None:
        self.whole(site)
        matrices = rows.shape[0]
        self.block.shared.store(site, self, address[: 8 * matrices], rows.reshape(-1, 4).T, 4)

    def copy(
        self,
        site: Instruction,
        target: np.ndarray,
        source: np.ndarray,
        size: int,
        count: np.ndarray,
        mask: np.ndarray | None,
    ) -> None:
        """cp.async of `count` bytes and zeros up to `size`."""
        if mask is not None:
            target, source, count = target[mask], source[mask], count[mask]
        if len(target):
            self.copies.issue(self, Copy(site, target, source, size, count))

    def poison_register(self, index: int) -> None:
        held = self.registers[index]
        poison = np.full(32, self.block.launch.adversary.poison & 0xFFFFFFFF, np.uint32)
        self.registers[index] = poison.view(held.dtype)

    # Words

    @property
    def name(self) -> str:
        return f"{self.block.launch.name}, program {self.block.position}, warp {self.index}"

    def report(self, site: Instruction, what: str) -> str:
        return f"{self.name}, {site}: {what}"

    def trap(self, site: Instruction) -> int:
        raise Trap(self.report(site, "trap"))


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
