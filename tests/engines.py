"""What kernels run on in the tests: Triton's interpreter, or the compiled code in the machine, one target at a time.

A test that takes the fixture `engine` runs on all of them, with the same tolerances. A process either interprets
kernels or compiles them, so a plain `pytest` runs the interpreted half and `pytest -m machine` the compiled one. There
each test runs on one of the targets, drawn from its name, unless it is marked `every_target`; of tests marked
`thinned(n)` one in n runs. `--long` runs all of them on all targets.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from machine.scheduler import Adversary

INTERPRETED = "interpreted"
TARGETS = ("sm_80", "sm_90", "sm_120")


@dataclass(frozen=True)
class Engine:
    """name: INTERPRETED or a target."""

    name: str

    @property
    def compiled(self) -> bool:
        return self.name != INTERPRETED

    @property
    def faults(self) -> type[AssertionError]:
        """What is raised where programs wait for ever, and by the machine for every other fault that it sees."""
        if self.compiled:
            from machine.faults import Fault

            return Fault
        from lstm_triton.testing.interpreter import Deadlock

        return Deadlock

    def share(self, seeds: Sequence[int]) -> Sequence[int]:
        """Of many schedules those for this engine: targets share them, the interpreter runs all."""
        return seeds[TARGETS.index(self.name) :: len(TARGETS)] if self.compiled else seeds

    @contextlib.contextmanager
    def __call__(self, seed: int = 0, edit: Callable[[str], str] = str, patience: int = 200_000) -> Iterator:
        """Within the block kernels run here, everything that is left open drawn from the seed.

        edit: changes the PTX that the machine runs. patience: switches after which the interpreter's scheduler calls a
        launch a deadlock, which the machine sees as it is.
        """
        if self.compiled:
            from machine.driver import Machine, running  # which import Triton, before it is told to interpret

            with running(Machine(self.name, adversaries(seed), edit=edit)) as machine:
                yield machine
        else:
            from lstm_triton.testing.interpreter import cooperative

            with cooperative(seed, patience) as scheduler:
                yield scheduler


def adversaries(seed: int, rounding: int = 0) -> Callable[[int], Adversary]:
    """A new one for every launch of a run. rounding: seed of the errors of approximate instructions."""
    from machine.scheduler import Adversary

    return lambda launch: Adversary(zlib.crc32(f"{seed} {launch}".encode()), rounding)


def is_chosen(item: pytest.Item, every: bool) -> bool:
    """Whether a test runs on the engine it was made for; `every` target, or the one that its name draws."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    engine = parameters.get("engine")
    if engine in TARGETS and parameters.get("dtype") == torch.float64:
        return False  # which the kernels compute in the interpreter only
    if engine not in TARGETS or every:
        return True
    drawn = zlib.crc32(item.nodeid.replace(engine, "").encode())
    if (thinned := item.get_closest_marker("thinned")) and drawn // len(TARGETS) % thinned.args[0]:
        return False
    return bool(item.get_closest_marker("every_target")) or TARGETS[drawn % len(TARGETS)] == engine
