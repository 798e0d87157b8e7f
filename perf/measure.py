"""Timing and provenance, shared by the scripts of this folder."""

from __future__ import annotations

import csv
import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton


def needs_gpu() -> bool:
    """Whether there is no CUDA device; says so on stderr."""
    if torch.cuda.is_available():
        return False
    print("this script measures on a CUDA device, and there is none", file=sys.stderr)
    return True


def quantiles_of(
    call: Callable[[], object], repeat: int, prepare: Callable[[], object] = lambda: None
) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in ms of `repeat` calls, timed by events after five warm-ups.

    `prepare` runs before every call, outside the timed region. Inputs stay where they are: nothing
    flushes the L2 cache between calls, as in a training loop.
    """
    times = []
    for index in range(repeat + 5):
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end))
    low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, middle, high


def provenance() -> dict[str, str]:
    """Where and with what a row was measured."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip().splitlines()[0] if driver.returncode == 0 else "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows of the same keys, each with its provenance, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = provenance()
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    print(f"written: {path} ({len(rows)} rows)")
