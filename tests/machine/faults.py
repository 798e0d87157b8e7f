"""What the machine reports. Every fault names the kernel, the program, the warp and the line of source."""

from __future__ import annotations


class MachineError(Exception):
    """The machine cannot run what it was given: PTX, a target or an argument that it does not know."""


class Fault(AssertionError):
    """A kernel did what no kernel may do: wrong on a GPU, or undefined there."""


class OutOfBounds(Fault):
    """An access outside of every tensor of the launch, or of the block's shared memory."""


class Misaligned(Fault):
    """An access at an address that is no multiple of its size."""


class Race(Fault):
    """Two warps at one shared byte, or two programs at one global byte, with nothing that orders them."""


class Divergence(Fault):
    """A part of a warp at an instruction that needs all of its threads, or some warps of a block that end before others
    reach a barrier."""


class Deadlock(Fault):
    """Nobody can go on."""


class LaunchError(Fault, RuntimeError):
    """The device refuses the launch: what Triton raises for it, with more to say."""

    def __init__(self, what: str) -> None:
        super().__init__(f"Triton Error [CUDA]: too many blocks in cooperative launch: {what}")


class Trap(Fault, RuntimeError):
    """A program has stopped the device: what CUDA says from then on, with more to say."""

    def __init__(self, what: str) -> None:
        super().__init__(f"CUDA error: unspecified launch failure: {what}")
