"""Hidden sizes whose rows start on no 16 bytes: computed as the next larger size where that is predicted to win."""

from __future__ import annotations

from functools import lru_cache
from statistics import geometric_mean

from .cost import microseconds_per_step
from .device import Device
from .planner import LARGEST_TILE, NoPlan, plan
from .problem import ELEMENT_SIZE, PASSES, Problem, ceil_div

BATCHES = (8, 16, 32, 64, 128, 256)  # one size serves every batch, so it is chosen by what is predicted for all
MARGIN = 1.1


@lru_cache(maxsize=4096)
def padded_size(hidden_size: int, directions: int, dtype: str, precision: str, device: Device) -> int:
    """The hidden size that the kernels compute a plain layer by: a multiple of 16 bytes, or the size itself.

    What fits one program is never padded: its tile is larger than the layer in any case.
    """
    step = 16 // ELEMENT_SIZE[dtype]
    larger = ceil_div(hidden_size, step) * step
    if larger == hidden_size or hidden_size <= LARGEST_TILE or not device.is_nvidia:
        return hidden_size

    def microseconds(size: int, batch: int) -> float:
        """A step of both passes; 0 where there is no plan."""
        found = 0.0
        for which in PASSES:
            problem = Problem(which, size, batch, directions, dtype, precision)
            chosen = plan(problem, device)
            if isinstance(chosen, NoPlan):
                return 0.0
            found += microseconds_per_step(chosen.config, problem, device)
        return found

    times = [(microseconds(hidden_size, batch), microseconds(larger, batch)) for batch in BATCHES]
    if not all(map(all, times)):
        return hidden_size
    return larger if geometric_mean(own / padded for own, padded in times) >= MARGIN else hidden_size
