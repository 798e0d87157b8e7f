"""What our module adds where it calls the same aten op as nn.LSTM, and what importing it adds.

    python perf/cpu_overhead.py

A CPU is a noisy place: the two modules take turns, and the ratio is that of their fastest calls.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import nn

from lstm_triton import LSTM


def seconds(module: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    module(x)
    return time.perf_counter() - start


def import_seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(7)]
    return min(float(run.stdout) for run in runs)


def main() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(64, 128), LSTM(64, 128)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(100, 32, 64)
    rounds = [(seconds(theirs, x), seconds(ours, x)) for _ in range(300)]
    fastest = [min(times) for times in zip(*rounds)]
    print(
        f"forward, B=32 T=100 I=64 H=128: nn.LSTM {fastest[0] * 1e3:.3f} ms, ours {fastest[1] * 1e3:.3f} ms, ", end=""
    )
    print(f"ratio {fastest[1] / fastest[0]:.3f}")
    base, both = import_seconds("import torch"), import_seconds("import torch, lstm_triton")
    print(f"import torch {base:.2f} s, with lstm_triton {both:.2f} s: {both - base:.2f} s more")


if __name__ == "__main__":
    main()
