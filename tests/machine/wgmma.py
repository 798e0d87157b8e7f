"""wgmma: matrix products of four warps, operands in shared memory by descriptors (PTX ISA 9.7.15).

D [64, n] += A [64, k] B [k, n], k being 32 bytes. Each of the four warps computes its own 16 rows, which needs no word
from the others. A descriptor names a start address, two byte offsets and a swizzle; `offsets` is the table of canonical
layouts (9.7.15.5.1.2.1.3). The instruction is asynchronous: it reads and writes at any time before the wait that names
its group, which the adversary draws, and its registers hold poison until then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, MachineError
from .matrix import accumulator, floats, values_of
from .shared import BASE

if TYPE_CHECKING:
    from .ptx import Instruction
    from .warp import Warp

_SWIZZLES = {0: 1, 1: 8, 2: 4, 3: 2}  # code in a descriptor -> 16-byte units of a row
_A_FROM_REGISTERS = {  # element i of a lane is A[group + 8 * _[0], ...]: as for mma.sync
    "tf32": lambda i, lane: ((lane // 4) + 8 * (i % 2), lane % 4 + 4 * (i // 2)),
    "16": lambda i, lane: ((lane // 4) + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)),
}


@lru_cache(maxsize=256)
def offsets(rows: int, size: int, leading: int, stride: int, units: int, k_major: bool) -> np.ndarray:
    """Bytes from the start of a matrix [rows, 32 / size] to each of its elements, before the swizzle.

    size: bytes of an element; leading, stride: the descriptor's offsets; units: 16-byte units of a swizzled row, 1
    for none.
    """
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    in_unit = 16 // size
    if k_major:
        byte = k * size
        if units == 1:
            return row % 8 * 16 + row // 8 * stride + byte // 16 * leading + byte % 16
        return row % 8 * (16 * units) + row // 8 * stride + byte
    unit = row // in_unit
    if units == 1:
        return row % in_unit * size + unit * stride + k % 8 * 16 + k // 8 * leading
    by_unit = unit % units * 16 + unit // units * leading
    return row % in_unit * size + by_unit + k % 8 * (16 * units) + k // 8 * stride


def addresses(descriptor: int, rows: int, size: int, k_major: bool) -> np.ndarray:
    """Shared addresses [rows, 32 / size] of a matrix."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise MachineError("a wgmma descriptor with a base offset")
    units = _SWIZZLES[descriptor >> 62 & 3]
    found = start + offsets(rows, size, leading, stride, units, k_major)
    return found ^ ((found >> 7 & (units - 1)) << 4)


@dataclass
class Product:
    """One wgmma.mma_async."""

    site: Instruction
    destinations: tuple[int, ...]  # registers of D
    a: np.ndarray | int  # elements [16, k] from registers, or a descriptor
    b: int
    kind: str
    width: int
    scale: bool  # whether D is added to
    sign: int
    k_major: tuple[bool, bool]
    done: bool = False


class Queue:
    """A warp's products under way, in groups."""

    def __init__(self) -> None:
        self.groups: list[list[Product]] = []
        self.open: list[Product] = []
        self.accumulators: dict[int, np.ndarray] = {}  # what registers of products under way will hold
        self.fenced = False

    def issue(self, warp: Warp, product: Product) -> None:
        if not self.fenced:
            raise Fault(warp.report(product.site, "no wgmma.fence since its registers may have been touched"))
        self.open.append(product)
        for register in product.destinations:
            if register not in self.accumulators:
                self.accumulators[register] = warp.registers[register].view(np.float32)
                warp.poison_register(register)
        if warp.block.launch.adversary.early():
            for group in (*self.groups, self.open):
                self._run(warp, group)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, warp: Warp, left: int) -> None:
        """Until at most `left` groups are under way."""
        while len(self.groups) > left:
            self._run(warp, self.groups.pop(0))
        busy = {
            register for group in (*self.groups, self.open) for product in group for register in product.destinations
        }
        for register in self.accumulators.keys() - busy:
            value = self.accumulators.pop(register)
            warp.registers[register] = value.view(warp.registers[register].dtype)
        self.fenced = self.fenced and bool(busy)

    def _run(self, warp: Warp, group: list[Product]) -> None:
        for product in group:
            if not product.done:
                product.done = True
                self._compute(warp, product)

    def _compute(self, warp: Warp, product: Product) -> None:
        kind, size = product.kind, 4 if product.kind == "tf32" else 2
        shared, quarter = warp.block.shared, warp.index % 4

        def read(descriptor: int, rows: int, k_major: bool, own: slice) -> np.ndarray:
            places = addresses(descriptor, rows, size, k_major)[own] - BASE
            return floats(shared.read_by_proxy(product.site, warp, places, size), kind)

        left = product.a
        if isinstance(left, int):
            left = read(left, 64, product.k_major[0], slice(16 * quarter, 16 * quarter + 16))
        right = read(product.b, product.width, product.k_major[1], slice(None))
        total = product.sign * (left @ right.T)
        table = accumulator(product.width)
        if product.scale:
            before = np.array([self.accumulators[register] for register in product.destinations])
            total = total + before.ravel()[table].reshape(16, -1)
        result = np.empty(total.size, np.float32)
        result[table] = total.ravel()
        self.accumulators.update(zip(product.destinations, result.reshape(-1, 32)))


SHAPE = re.compile(r"m64n(\d+)k(\d+)$")


def a_of_registers(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A [16, k] of the warp's own rows from its registers uint32."""
    values = values_of(np.array(registers), kind)
    place = _A_FROM_REGISTERS["tf32" if kind == "tf32" else "16"]
    matrix = np.empty((16, 8 if kind == "tf32" else 16))
    lane = np.arange(32)
    for i in range(values.shape[0]):
        matrix[place(i, lane)] = values[i]
    return matrix
