"""What the planner needs to know about a GPU, and the GPUs that are compiled for without one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from .settings import COOPERATIVE


@dataclass(frozen=True)
class Device:
    """A GPU as the planner sees it.

    arch: "sm_90", "gfx942", ... or "interpreter", which runs one program after another.
    multiprocessors: SMs (compute units) that a kernel can use.
    shared_memory: bytes of shared memory that one program may ask for.
    cooperative: programs of one launch may wait for each other: the launch can demand that all are
        resident together, and the compiler keeps the exchange's volatile loads. Triton's AMD
        backend does not (3.7.1 drops `volatile`, so a poll is read once).
    """

    name: str
    arch: str
    multiprocessors: int
    shared_memory: int
    cooperative: bool = True

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def has_wgmma(self) -> bool:
        return self.arch == "sm_90"


# Sizes from the vendors' tuning guides; the name is the part whose multiprocessors are counted.
KNOWN = {
    device.arch: device
    for device in (
        Device("A100", "sm_80", 108, 163 * 1024),
        Device("A10", "sm_86", 72, 99 * 1024),
        Device("L40S", "sm_89", 142, 99 * 1024),
        Device("H100", "sm_90", 132, 227 * 1024),
        Device("B200", "sm_100", 148, 227 * 1024),
        Device("RTX 5090", "sm_120", 170, 99 * 1024),
        Device("MI300X", "gfx942", 304, 64 * 1024, cooperative=False),
    )
}
INTERPRETER = Device("Triton interpreter", "interpreter", 1, 1 << 30, cooperative=False)


def device_of(device: torch.device) -> Device:
    """The GPU behind a torch device. Reads its properties once; a MIG slice counts its own SMs."""
    found = _device_of(torch.cuda.current_device() if device.index is None else device.index)
    return found if COOPERATIVE.read() == "1" else replace(found, cooperative=False)


def stand_in(device: torch.device) -> Device | None:
    """What Triton's active driver says it runs on, where that driver takes CPU tensors: it stands in for a GPU."""
    driver = triton.runtime.driver._active  # never made here: a GPU's driver may not be able to start
    if device.type != "cpu" or driver is None or driver.get_active_torch_device().type != "cpu":
        return None
    properties = driver.utils.get_device_properties(driver.get_current_device())
    sizes = properties["multiprocessor_count"], properties["max_shared_mem"]
    return Device("stand-in", f"sm_{driver.get_current_target().arch}", *sizes, cooperative=COOPERATIVE.read() == "1")


@cache
def _device_of(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    # The limit that Triton itself checks a kernel against.
    shared_memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return Device(properties.name, arch, properties.multi_processor_count, shared_memory, cooperative=False)
    arch = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, arch, properties.multi_processor_count, shared_memory)
