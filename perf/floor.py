"""The floor of a step: what it costs programs to hand each other a tile, with no arithmetic at all.

    python perf/floor.py --out results/floor.csv

Every program publishes a tile and collects those of all others of its group, step after step, by
the protocols of `kernels/exchange.py`. Rows: protocol, programs, microseconds per step (median,
20th and 80th percentile of the repetitions), and where it was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from lstm_triton.kernels.exchange import await_flags, collect, publishable, raise_flag
from measure import needs_gpu, quantiles_of, write_rows

ROWS, UNITS = 16, 16  # the tile of a program: 16 sequences by 16 hidden units


@triton.jit(do_not_specialize=["steps"])
def exchange_kernel(
    buffer,  # [steps, ROWS, TILES * UNITS]
    flags,  # [TILES] int32 or None
    sums,  # [TILES]
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
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    value = tl.zeros([ROWS, UNITS], tl.float32) + 1.0
    for step in range(steps):
        at = (step * ROWS + row)[:, None] * WIDTH
        tl.store(buffer + at + unit[None, :], publishable(value, tl.bfloat16))
        raise_flag(flags, tile, step + 1, PROTOCOL)
        await_flags(flags, step + 1, TILES, TILES, PROTOCOL)
        waiting = (row >= 0)[:, None]
        block = collect(buffer + at + column[None, :], waiting, waiting, PROTOCOL)
        total += block.to(tl.float32)
        value = value * 0.5 + tl.max(total) * 0.0  # the next tile depends on what was collected
    tl.store(sums + tile, tl.sum(total))


def run(tiles: int, steps: int, protocol: str, device: str) -> torch.Tensor:
    """One launch; the sums say whether every program saw every tile."""
    buffer = torch.empty((steps, ROWS, tiles * UNITS), dtype=torch.bfloat16, device=device)
    flags = torch.zeros(tiles, dtype=torch.int32, device=device) if protocol == "flags" else None
    if protocol == "mailbox":
        buffer.view(torch.int16).fill_(-1)
    sums = torch.empty(tiles, device=device)
    exchange_kernel[(tiles,)](
        buffer, flags, sums, steps, tiles, ROWS, UNITS, protocol, num_warps=4, launch_cooperative_grid=True
    )
    return sums


def expected_sum(tiles: int, steps: int) -> float:
    return sum(0.5**step for step in range(steps)) * ROWS * tiles * UNITS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args(arguments)
    if needs_gpu():
        return 2
    rows = []
    limit = torch.cuda.get_device_properties(0).multi_processor_count
    for protocol in ("flags", "mailbox"):
        for tiles in (n for n in (2, 8, 16, 32, 64, 128) if n <= limit):
            want = torch.full((tiles,), expected_sum(tiles, 8), device="cuda")
            torch.testing.assert_close(run(tiles, 8, protocol, "cuda"), want)

            def times(steps: int, tiles: int = tiles, protocol: str = protocol) -> tuple[float, float, float]:
                return quantiles_of(lambda: run(tiles, steps, protocol, "cuda"), options.repeat)

            # The launch itself and most of the filling of the buffers cancel in the difference.
            low, middle, high = ((a - b) * 1000 / 1024 for a, b in zip(times(2048), times(1024)))
            rows.append({"protocol": protocol, "programs": tiles, "us_per_step": middle, "p20": low, "p80": high})
            print(f"{protocol:8} {tiles:4} programs  {middle:.3f} us a step", flush=True)
    write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
