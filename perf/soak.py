"""Thousands of launches of every exchanging kernel on two streams at once: same bits, no hang.

python perf/soak.py --launches 10000
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from rows import needs_gpu

from lstm_triton.kernels.backward import lstm_backward
from lstm_triton.kernels.config import Config, Layout
from lstm_triton.kernels.forward import lstm_forward
from lstm_triton.kernels.variants import PLAIN, Variants

HIDDEN, BATCH, STEPS = 512, 16, 32


def recurrences(protocol: str, rows: int, norm: bool, seed: int, device: str = "cuda"):
    """A call that runs forward and backward once, in tiles of so many rows, and returns out and dgates.

    norm: with layer normalisation, whose programs share sums within a step too.
    """
    torch.manual_seed(seed)
    wide = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    # Two launches must be resident side by side: each takes half of the multiprocessors at most.
    if rows == 8:
        forward = Config("grid", protocol, True, True, 4, 8, 16, 512, 4, max_batch_tiles=1)
        backward = Config("grid", protocol, True, True, 4, 8, 16, 1024, 4, max_batch_tiles=1)
    else:
        forward = Config("grid", protocol, True, wide, 1, 16, 16, 256, 8, max_batch_tiles=1)
        backward = Config("grid", protocol, True, False, 8, 16, 16, 512, 8, max_batch_tiles=1)
    layout = Layout(BATCH, STEPS, False)
    options = dict(device=device, dtype=torch.bfloat16)
    projected = torch.randn(layout.rows, 1, 4 * HIDDEN, **options)
    w_hh = torch.randn(1, 4 * HIDDEN, HIDDEN, **options) * HIDDEN**-0.5
    dout = torch.randn(layout.rows, 1, HIDDEN, **options)
    variants, product = PLAIN, None
    if norm:
        variants = Variants(gain_hh=torch.rand(1, 4, HIDDEN, **options), norm_c=torch.rand(1, 2, HIDDEN, **options))
        product = torch.randn_like(projected)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        gates = projected.clone()
        out, _, _, cells, stats = lstm_forward(gates, w_hh, None, layout, forward, "tf32", True, variants=variants)
        given = (dout, None, None, gates, cells, w_hh, None, layout, backward, "tf32")
        return out, lstm_backward(*given, variants=variants, product=product, stats=stats).dgates

    return call


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--launches", type=int, default=10_000, help="of each pass, protocol and size of tiles (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if needs_gpu():
        return 2
    for protocol, rows, norm in itertools.product(("flags", "mailbox"), (16, 8), (False, True)):
        calls = [recurrences(protocol, rows, norm, seed) for seed in (0, 1)]
        expected = [call() for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        different = torch.zeros(len(streams), dtype=torch.int64, device="cuda")  # each stream has its own
        for _ in range(options.launches // 2):
            for call, stream, want, count in zip(calls, streams, expected, different):
                with torch.cuda.stream(stream):
                    for got, right in zip(call(), want):
                        count += (got != right).any()
        torch.cuda.synchronize()
        print(
            f"{protocol}, tiles of {rows} rows{', normalised' * norm}: {options.launches} launches of each pass, "
            f"{int(different.sum())} with a different result",
            flush=True,
        )
        if different.any():
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
