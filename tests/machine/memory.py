"""Global memory: the tensors of a launch, and when what a warp stores becomes visible to whom.

Follows PTX ISA chapter 8 (memory consistency model), as a machine that is as late as the model allows:

- A plain store is kept back. Its own warp sees it at once, the other warps of its block behind a block barrier (8.9.4),
  every other program at a time that the adversary draws, in any order and lane by lane (8.2.4: a vector is several
  scalars) - but no later than a release that is ordered after it (8.8) makes itself seen.
- A weak load that nothing orders behind another program's store to the same place (8.7.1, a data race) reads POISON,
  whatever may have arrived. Order comes from a release that an acquire has read (8.8), handed on by block barriers
  (8.9.5), and is counted by vector clocks: one number for every program.
- A strong load (`.volatile`, 8.4.2) reads what has arrived, each of its lanes at a time of its own. What it may find there
  another program must have stored strongly too (`.relaxed`): else that is a data race (8.7.1), and an error.

How: `memory` always holds the newest value. `hidden` says for each granule who alone sees it (0: everybody), `old` what
the others see instead. `owner` and `epoch` say which program stored it last, and with which release of that program it
was published (UNRELEASED: with none so far); `weak`, whether by a plain store.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .faults import MachineError, Misaligned, OutOfBounds, Race

if TYPE_CHECKING:
    from .block import Block
    from .ptx import Instruction
    from .scheduler import Adversary
    from .warp import Warp

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
UNRELEASED = np.iinfo(np.int32).max


@lru_cache
def column(count: int) -> np.ndarray:
    """0, 1, ... down the first axis."""
    return np.arange(count, dtype=np.uint32)[:, None]


@dataclass(frozen=True)
class Span:
    """The memory of one argument: `size` bytes from `start`."""

    name: str
    start: int
    size: int


class Memory:
    """What the programs of one launch may reach."""

    def __init__(self, spans: Iterable[Span], granule: int, programs: int, adversary: Adversary) -> None:
        self.spans = sorted((span for span in spans if span.size), key=lambda span: (span.start, span.size))
        self.granule, self.adversary = granule, adversary
        self.version = 0  # counts visible changes: who waits need not look again before
        self.synchronized: dict[int, np.ndarray] = {}  # address of a released value -> clock of who released it
        merged: list[tuple[int, int]] = []  # overlapping spans are one
        for span in self.spans:
            if span.start % granule:
                raise MachineError(f"{span.name} starts at an address that is no multiple of {granule}")
            if merged and span.start < merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], span.start + span.size)
            else:
                merged.append((span.start, span.start + span.size))
        if not merged:
            merged = [(0, 0)]
        self.begins = np.array([begin for begin, _ in merged], np.uint64)
        self.ends = np.array([end for _, end in merged], np.uint64)
        self.low = int(self.begins[0]) & ~15
        size = int(self.ends[-1]) - self.low
        whole = (ctypes.c_uint8 * (size + 16)).from_address(self.low) if size else bytearray(16)
        flat = np.frombuffer(whole, np.uint8)
        self.views = {width: flat[: flat.size // width * width].view(kind) for width, kind in UNSIGNED.items()}
        self.memory = self.views[granule]
        # Where a span's granules are among the shadows, all behind one another.
        counts = [(end - begin + granule - 1) // granule for begin, end in merged]
        firsts = np.concatenate(([0], np.cumsum(counts)))
        self.shift = np.array(
            [int(first) - (begin - self.low) // granule for first, (begin, _) in zip(firsts, merged)], np.int64
        )
        total = int(firsts[-1]) + 16
        self.hidden = np.zeros(total, np.int32)
        self.owner = np.zeros(total, np.int32)
        self.epoch = np.zeros(total, np.int32)
        self.weak = np.zeros(total, bool)
        self.old = np.zeros(total, self.memory.dtype)
        self.poison = self.memory.dtype.type(adversary.poison & (256**granule - 1))

    # Addresses

    def locate(self, site: Instruction, warp: Warp, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Offsets from `low` in bytes, and indices of the first granules' shadows, of `size` bytes at each address."""
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            wrong = int(address[address % np.uint64(size) != 0][0])
            raise Misaligned(warp.report(site, f"{size} bytes at {self.name_of(wrong)}"))
        where = self.begins.searchsorted(address, "right") - 1
        outside = (where < 0) | (address + np.uint64(size) > self.ends[where])
        if np.count_nonzero(outside):
            raise OutOfBounds(warp.report(site, f"{size} bytes at {self.name_of(int(address[outside][0]))}"))
        offset = (address - np.uint64(self.low)).view(np.int64)
        return offset, offset // self.granule + self.shift[where]

    def name_of(self, address: int) -> str:
        """An address in words: the nearest tensor that begins before it."""
        before = [span for span in self.spans if span.start <= address]
        if not before:
            return f"address {address:#x}, which lies before every tensor"
        span = max(before, key=lambda span: (span.start + span.size > address, span.start))
        offset = address - span.start
        return f"{span.name} + {offset} bytes" + ("" if offset < span.size else f", which has {span.size}")

    # Loads

    def load(
        self, site: Instruction, warp: Warp, address: np.ndarray, width: int, count: int, strong: bool
    ) -> np.ndarray:
        """`count` elements of `width` bytes at each address -> [count, lanes]."""
        size = width * count
        offset, first = self.locate(site, warp, address, size)
        parts = max(1, width // self.granule)
        if width < self.granule:
            shadows = first[None, :]
        else:
            shadows = first + column(count * parts)
        index = offset // width
        elements = self.views[width][index if count == 1 else index + column(count)]
        elements = elements.reshape(count, -1)
        if strong:
            elements = self._strong(site, warp, elements, shadows, offset, width, count)
            warp.polled(site, address, elements)
            return elements
        if not np.count_nonzero(self.owner[shadows]):
            return elements
        return self._blend(warp, elements, shadows, offset, width, True)

    def _strong(
        self,
        site: Instruction,
        warp: Warp,
        elements: np.ndarray,
        shadows: np.ndarray,
        offset: np.ndarray,
        width: int,
        count: int,
    ) -> np.ndarray:
        owners = self.owner[shadows]
        if not np.count_nonzero(owners):
            return elements
        foreign = (owners != 0) & (owners != warp.block.number + 1) & self.weak[shadows]
        if (foreign & (self.epoch[shadows] > warp.clock[owners - 1])).any():
            where = self.name_of(int(offset[0]) + self.low)
            raise Race(warp.report(site, f"polls what another program stores by a plain store, at or behind {where}"))
        found = self._blend(warp, elements, shadows, offset, width, False)
        if self.adversary.tears() and self.hidden[shadows].any():
            # Something arrives while the lanes read: some have read before, some read after.
            warp.block.launch.drain_some()
            index = offset // width
            elements = self.views[width][index if count == 1 else index + column(count)]
            later = self._blend(warp, elements.reshape(count, -1), shadows, offset, width, False)
            found = np.where(self.adversary.lanes(found.shape), found, later)
        return found

    def _blend(
        self, warp: Warp, elements: np.ndarray, shadows: np.ndarray, offset: np.ndarray, width: int, weak: bool
    ) -> np.ndarray:
        """What this warp may see of elements that programs of this launch have stored."""
        codes = self.hidden[shadows]
        unseen = (codes != 0) & (codes != warp.code) & (codes != warp.block.code)
        spoilt = None
        if weak:
            owners = self.owner[shadows]
            foreign = (owners != 0) & (owners != warp.block.number + 1)
            if foreign.any():
                spoilt = foreign & (self.epoch[shadows] > warp.clock[owners - 1])
        if not unseen.any() and (spoilt is None or not spoilt.any()):
            return elements
        if width < self.granule:
            raise MachineError("a load that is narrower than every store, of memory that the launch has written")
        granules = np.ascontiguousarray(elements.T).view(self.memory.dtype).T  # [count * parts, lanes]
        granules = np.where(unseen, self.old[shadows], granules)
        if spoilt is not None:
            granules = np.where(spoilt, self.poison, granules)
        return np.ascontiguousarray(np.ascontiguousarray(granules.T).view(elements.dtype).T)

    # Stores

    def store(
        self, site: Instruction, warp: Warp, address: np.ndarray, values: np.ndarray, width: int, strong: bool
    ) -> None:
        """values [count, lanes] of `width` bytes; where lanes store to one address, any of them may win."""
        count = values.shape[0]
        offset, first = self.locate(site, warp, address, width * count)
        parts = width // self.granule

        def by_scalar(of_granules: np.ndarray) -> np.ndarray:
            """[count * parts, lanes] -> [scalars, parts]: what arrives, arrives a scalar at a time."""
            found = of_granules.reshape(count, parts, -1).transpose(0, 2, 1).reshape(-1, parts)
            return found[::-1].copy() if self.adversary.last_lane_loses() else found

        shadows = by_scalar(first + column(count * parts))
        index = by_scalar(offset // self.granule + column(count * parts))
        granules = by_scalar(np.ascontiguousarray(np.ascontiguousarray(values.T).view(self.memory.dtype).T))
        owners = self.owner[shadows]
        if np.count_nonzero(owners):
            foreign = (owners != 0) & (owners != warp.block.number + 1) & (self.memory[index] != granules)
            if (foreign & (self.epoch[shadows] > warp.clock[owners - 1])).any():
                raise Race(
                    warp.report(site, f"another program stores another value at {self.name_of(int(address[0]))}")
                )
        visible = self.hidden[shadows] == 0
        self.old[shadows[visible]] = self.memory[index[visible]]
        self.memory[index] = granules
        self.hidden[shadows] = warp.code
        self.owner[shadows] = warp.block.number + 1
        self.epoch[shadows] = UNRELEASED
        self.weak[shadows] = not strong
        warp.pending.append(shadows)

    def drain(self, shadows: np.ndarray) -> None:
        """What was stored there is now visible to everybody."""
        self.hidden[shadows] = 0
        self.version += 1

    def hand_to_block(self, warp: Warp) -> None:
        """At a block barrier: what the warp has stored is visible to its block."""
        block = warp.block
        for shadows in warp.pending:
            mine = self.hidden[shadows] == warp.code
            self.hidden[shadows[mine]] = block.code
        block.pending.extend(warp.pending)
        block.unreleased.extend(warp.unreleased)
        warp.pending.clear()
        warp.unreleased.clear()

    # Atomics

    def atomic(
        self, site: Instruction, warp: Warp, address: np.ndarray, operand: np.ndarray, what: str, order: str
    ) -> np.ndarray:
        """One read-modify-write a lane, in any order -> what was there."""
        width = operand.dtype.itemsize
        offset, _ = self.locate(site, warp, address, width)
        view = self.views[width]
        before = np.empty_like(operand)
        if order in ("release", "acq_rel"):
            self._release(warp)
        for lane in self.adversary.order(len(address)):
            at, key = int(offset[lane]) // width, int(address[lane])
            before[lane] = view[at]
            after = _modified(view[at], operand[lane], what)
            published = self.synchronized.get(key)
            if order in ("acquire", "acq_rel") and published is not None:
                np.maximum(warp.clock, published, out=warp.clock)
            if order in ("release", "acq_rel"):
                # A read-modify-write goes on with the release sequence that it is part of (8.9.2).
                self.synchronized[key] = warp.clock.copy() if published is None else np.maximum(published, warp.clock)
            if after != view[at]:
                view[at] = after
                self.version += 1
        if what == "add" and not operand.any():
            warp.polled(site, address, before)
        return before

    def _release(self, warp: Warp) -> None:
        """Everything ordered before this release is seen by whoever sees it."""
        block, number = warp.block, warp.block.number
        block.epoch += 1
        warp.clock[number] = block.epoch
        for entries in (warp.pending, block.pending, warp.unreleased, block.unreleased):
            for shadows in entries:
                codes = self.hidden[shadows]
                mine = (codes == warp.code) | (codes == block.code)
                self.hidden[shadows[mine]] = 0
                own = (self.owner[shadows] == number + 1) & (self.epoch[shadows] == UNRELEASED) & ((codes == 0) | mine)
                self.epoch[shadows[own]] = block.epoch
            entries.clear()
        self.version += 1

    def finish(self, blocks: Iterable[Block]) -> None:
        """The end of programs: what they have stored has arrived."""
        for block in blocks:
            for entries in (block.pending, *(warp.pending for warp in block.warps)):
                for shadows in entries:
                    self.hidden[shadows] = 0
                entries.clear()


def _modified(old: np.generic, operand: np.generic, what: str) -> np.generic:
    with np.errstate(over="ignore"):
        if what == "exch":
            return operand
        if what == "add":
            return old + operand
        return {"max": max, "min": min}[what](old, operand)
