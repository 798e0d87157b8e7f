"""The ceilings of a device, and the floor of a shape: what a recurrence of this design, layer after layer, cannot beat.

    python perf/floor.py --out floor.csv

Copy bandwidth, the rate of a large matrix product in each type, the time of an empty launch on the device,
and one step of an exchange between programs (a recurrence without its mathematics, but for a sum over what
was collected) by each protocol and number of programs. On a CPU only the first two. `sweep.py` measures the
same in its own run, and holds every result against the floor that `Ceilings.floor_ms` adds up from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
import triton.language as tl
from rows import Row, bound_said, device_here, digits, host_bound, provenance, start, write_rows
from shapes import DTYPES, Shape

from lstm_triton.kernels.alarm import board_of
from lstm_triton.kernels.exchange import await_flags, collect, publish, publishable, raise_flag
from lstm_triton.kernels.records import Part, Peers, Source
from lstm_triton.tuning.clock import Times, times_of

ROWS, UNITS = 16, 16  # the tile of a program: 16 sequences by 16 hidden units
STEPS = 1024
PROGRAMS = (2, 8, 16, 32, 64, 128)
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
MATRIX = {"cuda": 8192, "cpu": 1024}


@triton.jit(do_not_specialize=["steps"])
def exchange_kernel(
    buffer,  # [steps, ROWS, TILES * UNITS]
    flags,  # [TILES] int32 or None
    sums,  # [TILES]
    board,  # see lstm_triton/kernels/alarm.py
    steps,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Each step: publish this program's tile of a row block, then collect the whole block."""
    WIDTH: tl.constexpr = TILES * UNITS
    tile = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, WIDTH)
    unit = tile * UNITS + tl.arange(0, UNITS)
    total = 0.0
    value = tl.zeros([ROWS, UNITS], tl.float32) + 1.0
    for step in range(steps):
        at = (step * ROWS + row)[:, None] * WIDTH
        everything = tl.full([ROWS, UNITS], True, tl.int1)
        publish(buffer + at + unit[None, :], publishable(value, tl.bfloat16), everything, PROTOCOL)
        peers = Peers(flags, board, step)
        raise_flag(peers, tile, step + 1, PROTOCOL)
        await_flags(peers, step + 1, TILES, PROTOCOL)
        source = Source(buffer + (step * ROWS + row) * WIDTH, True, None)
        block = collect(source, column[None, :], None, Part(0, WIDTH, WIDTH, UNITS), peers, PROTOCOL)
        collected = tl.sum(block.to(tl.float32))
        total += collected
        value = value * 0.5 + collected * 0.0  # the next tile depends on what was collected
    tl.store(sums + tile, total)


def exchange(tiles: int, steps: int, protocol: str, device: str) -> torch.Tensor:
    """One launch; the sums say whether every program saw every tile."""
    buffer = torch.empty((steps, ROWS, tiles * UNITS), dtype=torch.bfloat16, device=device)
    flags = torch.zeros(tiles, dtype=torch.int32, device=device) if protocol == "flags" else None
    if protocol == "mailbox":
        buffer.view(torch.int16).fill_(-1)
    sums = torch.empty(tiles, device=device)
    exchange_kernel[(tiles,)](
        buffer, flags, sums, board_of(buffer.device, False), steps, tiles, ROWS, UNITS, protocol, num_warps=4,
        launch_cooperative_grid=True,
    )  # fmt: skip
    return sums


def expected_sum(tiles: int, steps: int) -> float:
    return sum(0.5**step for step in range(steps)) * ROWS * tiles * UNITS


@triton.jit
def empty_kernel(pointer):
    pass


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes per second, read and written. product: operations per second by dtype. launch: seconds.
    hop: seconds of one exchange by (protocol, programs); empty on a CPU. multiprocessors: 1 on a CPU.
    """

    copy: float
    product: dict[str, float]
    launch: float = 0.0
    hop: dict[tuple[str, int], float] = field(default_factory=dict)
    multiprocessors: int = 1

    def step_seconds(self, shape: Shape) -> float:
        """Of one step of one layer: the product at the measured rate of as many programs as would be
        best. Rows and directions go side by side for nothing, units for a hop between their programs.
        """
        operations = 8 * shape.batch * shape.hidden_size**2 * shape.directions
        rate = self.product[shape.dtype]
        apart = min(-(-shape.batch // ROWS) * shape.directions, self.multiprocessors)
        alone = operations * self.multiprocessors / (apart * rate)
        shared = [
            hop + operations * self.multiprocessors / (min(apart * programs, self.multiprocessors) * rate)
            for (_, programs), hop in self.hop.items()
        ]
        return min([alone, *shared])

    def floor_ms(self, shape: Shape, mode: str) -> float:
        """The products outside the recurrence or the memory traffic of their tensors, whichever is longer,
        and every step of every layer in turn; in training twice, for the backward pass. In milliseconds.
        """
        rows, gates = shape.batch * shape.seq_len, 4 * shape.hidden_size * shape.directions
        seconds = 0.0
        for layer in range(shape.layers):
            inputs = shape.input_size if layer == 0 else shape.hidden_size * shape.directions
            operations = 2 * rows * inputs * gates
            moved = rows * (inputs + 2 * gates + gates // 4) * shape.size
            recurrent = shape.seq_len * self.step_seconds(shape)
            if mode == "train":
                operations = 3 * operations + 2 * rows * shape.hidden_size * gates  # dx, dW_ih and dW_hh
                moved, recurrent = 3 * moved, 2 * recurrent
            seconds += max(operations / self.product[shape.dtype], moved / self.copy) + recurrent
            seconds += self.launch * (2 if mode == "train" else 1)
        return seconds * 1e3


def precise(dtype: str) -> None:
    """Let float32 products be as a shape's type says, in cuDNN and in cuBLAS alike."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "float32-tf32"


def measure(device: torch.device, dtypes: list[str]) -> tuple[Ceilings, Iterator[tuple[str, str, str, Times]]]:
    """The ceilings, and (label, dtype, metric, times in the metric's unit) of each measurement."""
    found: list[tuple[str, str, str, Times]] = []

    def note(label: str, dtype: str, metric: str, times: Times, scale: float, rate: bool) -> float:
        """scale: what the median in ms is multiplied by, or divided into, to be in the metric's unit."""
        values = [scale / ms if rate else scale * ms for ms in (times.p20, times.median, times.p80)]
        low, middle, high = sorted(values)
        found.append((label, dtype, metric, Times(low, middle, high, times.repeat, times.host_bound)))
        return middle

    buffers = torch.ones((2, COPY_BYTES[device.type] // 4), device=device)
    copied = note(
        "copy", "", "GB/s", times_of(lambda: buffers[0].copy_(buffers[1]), device, 10), buffers.nbytes / 1e6, True
    )
    product = {}
    for dtype in dtypes:
        n = MATRIX[device.type]
        precise(dtype)
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype.partition("-")[0])) for _ in range(2))
        times = times_of(lambda a=a, b=b: a @ b, device, 10)
        product[dtype] = 1e12 * note(f"product {n}", dtype, "TFLOP/s", times, 2 * n**3 / 1e9, True)
    if device.type == "cpu":
        return Ceilings(copied * 1e9, product), iter(found)
    pointer = torch.empty(1, device=device)
    launched = times_of(lambda: empty_kernel[(1,)](pointer), device, 50, ahead=True)
    launch = note("launch", "", "us", launched, 1e3, False) / 1e6
    limit = torch.cuda.get_device_properties(device).multi_processor_count
    hop = {}
    for protocol in ("flags", "mailbox"):
        for tiles in (n for n in PROGRAMS if n <= limit):
            want = torch.full((tiles,), expected_sum(tiles, 8), device=device)
            torch.testing.assert_close(exchange(tiles, 8, protocol, device.type), want)
            long, short = (
                times_of(lambda n=n, t=tiles, p=protocol: exchange(t, n, p, device.type), device, 15, ahead=True)
                for n in (2 * STEPS, STEPS)
            )
            # The launch itself and most of the filling of the buffers cancel in the difference.
            bound = long.host_bound or short.host_bound
            difference = Times(long.p20 - short.p20, long.median - short.median, long.p80 - short.p80, 15, bound)
            us = note(f"hop {protocol} {tiles} programs", "", "us", difference, 1e3 / STEPS, False)
            hop[protocol, tiles] = us / 1e6
    return Ceilings(copied * 1e9, product, launch, hop, limit), iter(found)


def rows_of(found: Iterator[tuple[str, str, str, Times]], where: dict[str, str]) -> list[Row]:
    return [
        Row("ceilings", label, *[""] * 6, dtype, "ceiling", "", metric, digits(times.median), digits(times.p20),
            digits(times.p80), str(times.repeat), host_bound(times), **where)
        for label, dtype, metric, times in found
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the products (default: all, on a CPU float32)")
    options = parser.parse_args(arguments)
    device = device_here()
    dtypes = options.dtype or (list(DTYPES) if device.type == "cuda" else ["float32-ieee"])
    try:
        start(options.out)
    except OSError as error:
        print(f"floor: {error}", file=sys.stderr)
        return 2
    _, found = measure(device, dtypes)
    rows = rows_of(found, provenance(device))
    write_rows(options.out, rows)
    for row in rows:
        print(f"{row.label:28} {row.dtype:12} {row.value:>9} {row.metric}  ({row.p20} to {row.p80}){bound_said(row)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
