"""What has been decided for a call, kept for the next one like it.

A path, its plans and the checks of a call follow from its options and from shapes, types and devices of its tensors;
and from what surrounds it: environment variables, the driver, PyTorch's precision settings, whether ranks share a
table. A memory holds for one such surrounding. What else can change a plan (a config that is left out, a launch that a
device has refused, a new table) makes everything forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton

from . import settings
from .precision import resolve_precision

MOST = 4096  # decisions of one memory, for lengths of sequences may be many; and memories
_generation = 0


class Memory(dict[Hashable, Any]):
    """Decisions by what they follow from."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = _generation

    @property
    def stands(self) -> bool:
        """Whether nothing has been forgotten since."""
        return self.generation == _generation


_memories: dict[Hashable, Memory] = {}


def forget() -> None:
    """From now on everything is decided anew, also what is being decided just now."""
    global _generation
    _generation += 1
    _memories.clear()


def memory() -> Memory:
    """Of what surrounds a call that is made now."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    driver = triton.runtime.driver._active
    now = _generation, settings.as_they_are(), driver, resolve_precision(""), group
    found = _memories.get(now)
    if found is None or len(found) > MOST:
        if len(_memories) > MOST:
            _memories.clear()
        found = _memories[now] = Memory()
    return found
