"""What kernels run on in the tests: Triton's interpreter, or the compiled code in the machine, one target at a time.

A test that takes the fixture `engine` runs on all of them, with the same tolerances. A process either interprets
kernels or compiles them, so a plain `pytest` runs the interpreted half and `pytest -m machine` the compiled one. There
each test runs on one of the targets, drawn from its name, unless it is marked `every_target` or `--long` is given.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
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

    @contextlib.contextmanager
    def __call__(self, seed: int = 0, edit: Callable[[str], str] = str, multiprocessors: int | None = None) -> Iterator:
        """Within the block kernels run here, everything that is left open drawn from the seed.

        edit, multiprocessors: of the machine.
        """
        if self.compiled:
            from machine.driver import Machine, running  # which import Triton, before it is told to interpret

            with running(Machine(self.name, adversaries(seed), multiprocessors, edit)) as machine:
                yield machine
        else:
            from lstm_triton.recipes.interpreter import cooperative

            with cooperative(seed) as scheduler:
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
    if not engine or engine == INTERPRETED or every or item.get_closest_marker("every_target"):
        return True
    return TARGETS[zlib.crc32(item.nodeid.replace(engine, "").encode()) % len(TARGETS)] == engine
