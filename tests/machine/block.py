"""A block of the grid, Triton's program: its warps, its shared memory, its barrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .shared import Shared
from .warp import BARRIER, DONE, RUNNING, Warp

if TYPE_CHECKING:
    from .scheduler import Launch


class Block:
    """number: of the block in its launch; position: its %ctaid."""

    def __init__(self, launch: Launch, number: int, position: tuple[int, int, int]) -> None:
        self.launch, self.number, self.position = launch, number, position
        self.code = number * (launch.warps + 1) + launch.warps + 1  # who sees what only this block sees: see memory.py
        self.epoch = 0  # releases so far
        self.pending: list[np.ndarray] = []  # stores that only this block sees
        self.unreleased: list[np.ndarray] = []  # stores that have arrived, but that no release has published
        self.shared = Shared(
            launch.shared_size, launch.code.shared_granule, launch.warps, launch.code.by_proxy, launch.adversary
        )
        self.warps = [Warp(self, index) for index in range(launch.warps)]

    @property
    def done(self) -> bool:
        return all(warp.state == DONE for warp in self.warps)

    def pass_barrier(self) -> bool:
        """Let the warps go on if all that have not ended stand at the barrier (9.7.13.1); whether they did."""
        alive = [warp for warp in self.warps if warp.state != DONE]
        if not alive or any(warp.state != BARRIER for warp in alive):
            return False
        self.shared.now += 1
        clock = np.maximum.reduce([warp.clock for warp in self.warps])
        for warp in self.warps:
            self.launch.memory.hand_to_block(warp)
            warp.clock = clock.copy()
        for warp in alive:
            warp.state = RUNNING
        return True
