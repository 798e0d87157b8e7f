"""What our modules add where they call the same aten ops as nn.LSTM and nn.LSTMCell, and what importing them adds.

    python perf/cpu_overhead.py

A CPU is a noisy place: the two modules take turns, and the ratio is that of their fastest calls.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_triton import LSTM, LSTMCell


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, theirs: nn.Module, ours: nn.Module, rounds: int, *given: object) -> None:
    """A line with the fastest of so many calls of each."""
    ours.load_state_dict(theirs.state_dict())
    times = [(seconds(lambda: theirs(*given)), seconds(lambda: ours(*given))) for _ in range(rounds)]
    fastest = [min(of_one) * 1e6 for of_one in zip(*times)]
    print(f"{name:30} nn {fastest[0]:8.1f} us, ours {fastest[1]:8.1f} us, ratio {fastest[1] / fastest[0]:.3f}")


def compare_lengths(seq_len: int, batch: int, rounds: int) -> None:
    """`lengths=` against packing by hand: forward, and with the backward pass."""
    theirs, ours = nn.LSTM(64, 128), LSTM(64, 128)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(seq_len, batch, 64), torch.linspace(seq_len // 4, seq_len, batch).long()

    def by_hand() -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(theirs(packed)[0], total_length=seq_len)[0]

    def in_one_call() -> torch.Tensor:
        return ours(x, lengths=lengths)[0]

    def run(call: Callable[[], torch.Tensor], training: bool) -> None:
        with torch.set_grad_enabled(training):
            out = call()
        if training:
            out.sum().backward()

    for name, training in (("forward", False), ("training", True)):
        calls = [partial(run, call, training) for call in (by_hand, in_one_call)]
        times = [[seconds(call) for call in calls] for _ in range(rounds)]
        fastest = [min(of_one) * 1e6 for of_one in zip(*times)]
        print(
            f"{f'lengths=, T={seq_len} B={batch}, {name}':30} packed {fastest[0]:8.1f} us, ours {fastest[1]:8.1f} us, "
            f"ratio {fastest[1] / fastest[0]:.3f}"
        )


def import_seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(7)]
    return min(float(run.stdout) for run in runs)


def main() -> None:
    torch.manual_seed(0)
    compare("B=32 T=100 I=64 H=128", nn.LSTM(64, 128), LSTM(64, 128), 300, torch.randn(100, 32, 64))
    step, state = torch.randn(1, 16, 32), (torch.zeros(1, 16, 32), torch.zeros(1, 16, 32))
    with torch.no_grad():
        compare("a step, B=16 I=H=32", nn.LSTM(32, 32), LSTM(32, 32), 3000, step, state)
        of_cell = (state[0][0], state[1][0])
        compare("LSTMCell, B=16 I=H=32", nn.LSTMCell(32, 32), LSTMCell(32, 32), 3000, step[0], of_cell)
    compare_lengths(100, 8, 40)
    base, both = import_seconds("import torch"), import_seconds("import torch, lstm_triton")
    print(f"import torch {base:.2f} s, with lstm_triton {both:.2f} s: {both - base:.2f} s more")


if __name__ == "__main__":
    main()
