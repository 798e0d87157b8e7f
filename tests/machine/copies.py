"""cp.async: copies from global to shared memory that arrive late (PTX ISA 9.7.9.25.3).

A copy reads and writes at any time between its issue and the wait for its group, which the adversary draws. Until then
its destination holds poison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .ptx import Instruction
    from .warp import Warp


@dataclass
class Copy:
    site: Instruction
    target: np.ndarray  # shared addresses
    source: np.ndarray
    size: int
    count: np.ndarray  # bytes that are read; the rest is zero
    done: bool = False


class Copies:
    """A warp's copies under way, in groups."""

    def __init__(self) -> None:
        self.groups: list[list[Copy]] = []
        self.open: list[Copy] = []

    def issue(self, warp: Warp, copy: Copy) -> None:
        shared = warp.block.shared
        granules = shared.granules(copy.site, warp, copy.target, copy.size)
        poison = np.full(
            granules.shape, shared.memory.dtype.type(warp.block.launch.adversary.poison & (256**shared.granule - 1))
        )
        shared.write(copy.site, warp, granules, poison)
        self.open.append(copy)
        if warp.block.launch.adversary.early():
            self._land(warp, copy)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, warp: Warp, left: int) -> None:
        """Until at most `left` groups are under way."""
        while len(self.groups) > left:
            for copy in self.groups.pop(0):
                self._land(warp, copy)

    def wait_all(self, warp: Warp) -> None:
        self.commit()
        self.wait(warp, left=0)

    def _land(self, warp: Warp, copy: Copy) -> None:
        if copy.done:
            return
        copy.done = True
        memory, lanes = warp.block.launch.memory, len(copy.target)
        values = np.zeros((copy.size // 4, lanes), np.uint32)
        for count in np.unique(copy.count):
            if count:
                chosen = copy.count == count
                width = 4 if count % 4 == 0 else int(count & -count)
                # Read at the whole copy's alignment, in words of what there is.
                found = memory.load(copy.site, warp, copy.source[chosen], width, int(count) // width, False)
                bytes_ = np.zeros((int(chosen.sum()), copy.size), np.uint8)
                bytes_[:, : int(count)] = np.ascontiguousarray(found.T).view(np.uint8)
                values[:, chosen] = bytes_.view(np.uint32).T
        warp.block.shared.store(copy.site, warp, copy.target, values, 4)
