"""Timing a call on the device that its tensors are on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

WARM_UP = 5
LEAST_AHEAD = 0.1  # milliseconds that the GPU is kept busy at least
MARGIN = 2.0  # over the slowest host call of the warm-up: a host has its hiccups
PROBE = 10_000_000  # cycles, some milliseconds: what the clock's rate is measured on
MOST_OF_IT = 0.9


@dataclass(frozen=True)
class Times:
    """Percentiles of one call's time in milliseconds.

    host_bound: in half of the calls or more the GPU waited for the Python that queues the call, so the median is the
    host's time, not that of kernels.
    """

    p20: float
    median: float
    p80: float
    repeat: int
    host_bound: bool = False

    def scaled(self, factor: float) -> Times:
        """The same in another unit."""
        return replace(self, p20=self.p20 * factor, median=self.median * factor, p80=self.p80 * factor)


class _Call(NamedTuple):
    """One call: its time, and how long the host took to queue it, in milliseconds; and whether the GPU waited."""

    taken: float
    host: float
    host_bound: bool


def times_of(
    call: Callable[[], object],
    device: torch.device,
    repeat: int,
    prepare: Callable[[], object] = lambda: None,
    ahead: bool = False,
    warm_up: int | None = None,
) -> Times:
    """Time `repeat` calls after some that are not counted; on CUDA by events, else by the clock.

    `prepare` runs before every call, outside the timed region. ahead: keep the GPU busy first, for longer than the
    host took in the warm-up, so that the host has queued the call before its time starts: for the time of kernels
    rather than of the Python that launches them. Nothing flushes the L2 cache between calls, as in a training loop.
    """
    warm_up = WARM_UP if warm_up is None else warm_up
    found: list[_Call] = []
    slowest = 0.0
    for index in range(warm_up + repeat):
        prepare()
        counted = index >= warm_up
        if device.type != "cuda":
            one = _once_on_host(call)
        else:
            one = _once_on_cuda(call, _cycles(slowest) if ahead and counted else 0)
        if counted:
            found.append(one)
        elif index:  # the first call compiles
            slowest = max(slowest, one.host)
    times = torch.tensor([one.taken for one in found])
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Times(p20, median, p80, repeat, host_bound=2 * sum(one.host_bound for one in found) >= repeat)


def _cycles(host: float) -> int:
    """How long to keep the GPU busy for a call that takes the host so many milliseconds."""
    return int(max(LEAST_AHEAD, MARGIN * host) * _cycles_per_millisecond(torch.cuda.current_device()))


@cache
def _cycles_per_millisecond(index: int) -> float:
    """Of the current device, `index`; measured after a warm-up, when its clock is up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(PROBE)
    end.record()
    end.synchronize()
    return PROBE / start.elapsed_time(end)


def _once_on_cuda(call: Callable[[], object], cycles: int) -> _Call:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    begin = time.perf_counter()
    call()
    host = (time.perf_counter() - begin) * 1e3
    end.record()
    # The GPU had come to the call before all of it was queued. (Asked before `end` is waited for.)
    dry = start.query()
    end.synchronize()
    taken = start.elapsed_time(end)
    # Where nothing keeps the GPU busy it always had. What counts there is who was the last to be done.
    return _Call(taken, host, dry if cycles else host >= MOST_OF_IT * taken)


def _once_on_host(call: Callable[[], object]) -> _Call:
    begin = time.perf_counter()
    call()
    taken = (time.perf_counter() - begin) * 1e3
    return _Call(taken, taken, host_bound=False)
