"""Timing a call on the device that its tensors are on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 5
AHEAD = 200_000  # clock cycles, about 0.1 ms


@dataclass(frozen=True)
class Times:
    """Percentiles of one call's time in milliseconds."""

    p20: float
    median: float
    p80: float
    repeat: int


def times_of(
    call: Callable[[], object],
    device: torch.device,
    repeat: int,
    prepare: Callable[[], object] = lambda: None,
    ahead: bool = False,
    warm_up: int = WARM_UP,
) -> Times:
    """Time `repeat` calls after some that are not counted; on CUDA by events, else by the clock.

    `prepare` runs before every call, outside the timed region. ahead: keep the GPU busy first, so
    that the host has queued the call before its time starts: for the time of kernels rather than of
    the Python that launches them. Nothing flushes the L2 cache between calls, as in a training loop.
    """
    once = _once_on_cuda if device.type == "cuda" else _once_on_host
    times = []
    for index in range(warm_up + repeat):
        prepare()
        milliseconds = once(call, ahead)
        if index >= warm_up:
            times.append(milliseconds)
    p20, median, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Times(p20, median, p80, repeat)


def _once_on_cuda(call: Callable[[], object], ahead: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(AHEAD)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _once_on_host(call: Callable[[], object], ahead: bool) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
