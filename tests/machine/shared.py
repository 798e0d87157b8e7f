"""The shared memory of a block: bounds, alignment, and races between its warps.

A race is two warps at one byte with no barrier between them (PTX ISA 8.7.1), at least one of them storing another
value. Values count: Triton lets several warps store the same value to the same place, which is harmless. `now` counts
the barriers that all warps have passed; what happened at another `now` is ordered.

Asynchronous copies and wgmma go through here too, the latter by the async proxy: what was stored by ordinary
instructions it sees only behind a `fence.proxy.async` (9.7.15.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .faults import Misaligned, OutOfBounds, Race
from .memory import UNSIGNED, column

if TYPE_CHECKING:
    from .ptx import Instruction
    from .scheduler import Adversary
    from .warp import Warp

BASE = 1024  # the address of the first byte; the first 1,024 belong to the system, as on sm_90
BASE32 = np.uint32(BASE)


class Shared:
    """size: bytes of the block's allocation. granule: bytes of its narrowest access. by_proxy: whether wgmma reads it."""

    def __init__(self, size: int, granule: int, warps: int, by_proxy: bool, adversary: Adversary) -> None:
        self.size, self.granule, self.by_proxy, self.adversary = size, granule, by_proxy, adversary
        flat = np.full((size + 15) // 16 * 16, adversary.poison & 255, np.uint8)
        self.views = {width: flat.view(kind) for width, kind in UNSIGNED.items()}
        self.memory = self.views[granule]
        count = flat.size // granule
        self.now = 1
        self.used_at = [np.zeros(count, np.int32) for _ in range(warps)]
        self.written_at = [np.zeros(count, np.int32) for _ in range(warps)]
        self.changed_at = np.zeros(count, np.int32)
        self.unfenced = np.zeros(
            count, np.int32
        )  # now * 64 + warp + 1 of an ordinary store that no fence has passed on

    def granules(self, site: Instruction, warp: Warp, address: np.ndarray, size: int) -> np.ndarray:
        """Indices [parts, lanes] of the granules of `size` bytes at each address."""
        offset = address - BASE32  # below the first byte: a number too large
        if int(np.bitwise_or.reduce(offset)) & (size - 1):
            wrong = offset[offset % np.uint32(size) != 0][0].view(np.int32)
            raise Misaligned(warp.report(site, f"{size} bytes at shared byte {wrong}"))
        return self.inside(site, warp, offset, size)

    def inside(self, site: Instruction, warp: Warp, offset: np.ndarray, size: int) -> np.ndarray:
        if int(offset.max()) > self.size - size:
            wrong = offset[offset > max(0, self.size - size)][0].astype(np.int32)
            raise OutOfBounds(warp.report(site, f"{size} bytes at shared byte {wrong} of {self.size}"))
        first = offset // offset.dtype.type(self.granule)
        return first[None, :] if size <= self.granule else first + column(size // self.granule)

    def load(self, site: Instruction, warp: Warp, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """`count` elements of `width` bytes at each address -> [count, lanes]."""
        granules = self.granules(site, warp, address, width * count)
        self.check_read(site, warp, granules)
        index = (address - BASE32) // np.uint32(width)
        return self.views[width][index + column(count)]

    def store(self, site: Instruction, warp: Warp, address: np.ndarray, values: np.ndarray, width: int) -> None:
        """values [count, lanes] of `width` bytes; where lanes store to one address, any of them may win."""
        granules = self.granules(site, warp, address, width * values.shape[0])
        new = np.ascontiguousarray(np.ascontiguousarray(values.T).view(self.memory.dtype).T)
        self.write(site, warp, granules, new)

    def write(self, site: Instruction, warp: Warp, granules: np.ndarray, new: np.ndarray) -> None:
        if self.adversary.last_lane_loses():
            granules, new = (np.ascontiguousarray(one[:, ::-1]) for one in (granules, new))
        self.check_write(site, warp, granules, self.memory[granules] != new)
        self.memory[granules] = new

    def check_read(self, site: Instruction, warp: Warp, granules: np.ndarray) -> None:
        """Mark granules as used now; Race where another warp has just changed one."""
        changed = self.changed_at[granules] == self.now
        if np.count_nonzero(changed) and (changed & (self.written_at[warp.index][granules] != self.now)).any():
            raise Race(warp.report(site, "reads shared memory that another warp has stored, with no barrier between"))
        self.used_at[warp.index][granules] = self.now

    def check_write(self, site: Instruction, warp: Warp, granules: np.ndarray, changes: np.ndarray) -> None:
        """Mark granules as written now; Race where one changes that another warp has just read or written."""
        if np.count_nonzero(changes):
            touched = granules[changes]
            for index, used_at in enumerate(self.used_at):
                if index != warp.index and np.count_nonzero(used_at[touched] == self.now):
                    what = "stores to shared memory that another warp uses, with no barrier between"
                    raise Race(warp.report(site, what))
            self.changed_at[touched] = self.now
        self.used_at[warp.index][granules] = self.now
        self.written_at[warp.index][granules] = self.now
        if self.by_proxy:
            self.unfenced[granules] = self.now * 64 + warp.index + 1

    def fence_proxy(self, warp: Warp) -> None:
        """fence.proxy.async: what this warp has stored, or barriers have handed to it, is seen by the async proxy."""
        passed = (self.unfenced // 64 < self.now) | (self.unfenced % 64 == warp.index + 1)
        self.unfenced[passed] = 0

    def read_by_proxy(self, site: Instruction, warp: Warp, offset: np.ndarray, width: int) -> np.ndarray:
        """Elements of `width` bytes at offsets of any shape, as wgmma reads them."""
        shape = offset.shape
        granules = self.inside(site, warp, offset.ravel(), width)
        self.check_read(site, warp, granules)
        values = self.views[width][offset.ravel() // width]
        late = self.unfenced[granules].any(axis=0)
        if late.any():
            values = np.where(late, values.dtype.type(self.adversary.poison & (256**width - 1)), values)
        return values.reshape(shape)
