"""How calls are timed, on a GPU that is none: its clock and the host's go on only as a call says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lstm_triton.tuning import clock
from lstm_triton.tuning.clock import Times, times_of

CYCLES = 1_500_000  # a millisecond of the GPU's clock
CUDA = torch.device("cuda")


class Gpu:
    """Times in milliseconds. now: of the host. busy: until when the GPU is, with what has been queued."""

    def __init__(self) -> None:
        self.now = self.busy = 0.0
        self.sleeps: list[float] = []

    def queue(self, host: float, work: float) -> None:
        """A launch that takes the host and the GPU so long."""
        self.now += host
        self.busy = max(self.busy, self.now) + work

    def sleep(self, cycles: int) -> None:
        if cycles != clock.PROBE:
            self.sleeps.append(cycles / CYCLES)
        self.queue(0.0, cycles / CYCLES)

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.busy)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    for name, value in (("Event", found.event), ("_sleep", found.sleep), ("current_device", lambda: -1)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: found.now / 1e3))
    clock._cycles_per_millisecond.cache_clear()
    return found


@pytest.mark.parametrize("host", [0.001, 0.3, 7.0])
def test_the_gpu_is_kept_busy_until_all_is_queued(gpu: Gpu, host: float) -> None:
    """Three kernels of 20 us, however long the host takes for each: 60 us, without the gaps between them."""

    def call() -> None:
        for _ in range(3):
            gpu.queue(host, 0.02)

    times = times_of(call, CUDA, 10, ahead=True)
    assert times.median == pytest.approx(0.06)
    assert not times.host_bound
    assert len(gpu.sleeps) == 10
    assert gpu.sleeps[0] == pytest.approx(max(clock.LEAST_AHEAD, clock.MARGIN * 3 * host))


def test_the_first_call_compiles_and_is_no_measure(gpu: Gpu) -> None:
    hosts = iter([5000.0, 0.2, 0.4, 0.2, 0.2, *[0.2] * 10])
    times_of(lambda: gpu.queue(next(hosts), 0.01), CUDA, 10, ahead=True)
    assert gpu.sleeps == pytest.approx([clock.MARGIN * 0.4] * 10)


@pytest.mark.parametrize(("slow", "bound"), [(4, False), (5, True)])
def test_a_host_slower_than_in_the_warm_up_is_said(gpu: Gpu, slow: int, bound: bool) -> None:
    """The GPU has run dry before the call was queued: in half of the calls or more, the median says so."""
    hosts = iter([0.2] * clock.WARM_UP + [0.2] * (10 - slow) + [3.0] * slow)

    def call() -> None:
        gpu.queue(next(hosts), 0.01)
        gpu.queue(0.0, 0.01)

    times = times_of(call, CUDA, 10, ahead=True)
    assert times.host_bound == bound
    assert (times.median > 0.1) == bound


@pytest.mark.parametrize(("work", "bound"), [(0.002, True), (5.0, False)])
def test_without_keeping_it_busy(gpu: Gpu, work: float, bound: bool) -> None:
    """As a user calls: the time is of kernels where they end long after the host has queued them."""
    times = times_of(lambda: gpu.queue(0.1, work), CUDA, 3)
    assert times.host_bound == bound
    assert not gpu.sleeps


def test_on_the_host_there_is_nobody_to_wait_for() -> None:
    calls = []
    times = times_of(lambda: calls.append(0), torch.device("cpu"), 2, ahead=True)
    assert not times.host_bound
    assert len(calls) == clock.WARM_UP + 2


def test_the_warm_up_is_read_when_a_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "WARM_UP", 0)
    calls = []
    times_of(lambda: calls.append(0), torch.device("cpu"), 1)
    assert len(calls) == 1


def test_other_units() -> None:
    assert Times(1.0, 2.0, 4.0, 3, True).scaled(0.5) == Times(0.5, 1.0, 2.0, 3, True)
