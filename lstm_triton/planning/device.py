"""What the planner needs to know about a GPU, and the GPUs that are compiled for without one.

Whether a tensor is a GPU's is asked here and nowhere else (`on_gpu`), for tests to put something in a GPU's place.
"""

from __future__ import annotations

import ctypes
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
STAND_IN = "stand-in"
INTERPRETER = Device("Triton interpreter", "interpreter", 1, 1 << 30, cooperative=False)


NO_DRIVER = "Triton's driver does not start"
COOPERATIVE_LAUNCH = 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH of CUDA's driver API
_refused: set[torch.device] = set()  # devices that have refused a cooperative launch


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device are a GPU's, or on the CPU where Triton's active driver stands in for one."""
    return device.type == "cuda" or _stands_in(device)


on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a constant of a compiled model


def gpu_here() -> torch.device | None:
    """The GPU that a command uses, or what stands in for one; None without."""
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return found if on_gpu(found) else None


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may be measured or compared then."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def device_of(device: torch.device) -> Device:
    """The GPU behind a torch device. Reads its properties once; a MIG slice counts its own SMs.

    RuntimeError says why Triton's driver does not start: for want of a C compiler, of Python's headers, of libcuda.
    """
    found = _device_of(torch.cuda.current_device() if device.index is None else device.index)
    if isinstance(found, str):
        raise RuntimeError(found)
    return _limited(found, device)


def stand_in(device: torch.device) -> Device | None:
    """What Triton's active driver says it runs on, where that driver takes CPU tensors: it stands in for a GPU."""
    if not _stands_in(device):
        return None
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    sizes = properties["multiprocessor_count"], properties["max_shared_mem"]
    return _limited(Device(STAND_IN, f"sm_{driver.get_current_target().arch}", *sizes), device)


def plan_without_waiting(device: torch.device) -> None:
    """From now on no plan for this device has programs that wait for each other."""
    _refused.add(torch.device(device.type, device.index))


def _limited(found: Device, device: torch.device) -> Device:
    """The device as the environment and its own refusals leave it."""
    return replace(found, cooperative=False) if COOPERATIVE.read() == "0" or device in _refused else found


def _stands_in(device: torch.device) -> bool:
    # Never made here, and asked nothing: a GPU's driver may not be able to start, or not in this process.
    return device.type == "cpu" and getattr(triton.runtime.driver._active, "stands_in_for_a_gpu", False)


@cache
def _device_of(index: int) -> Device | str:
    properties = torch.cuda.get_device_properties(index)
    try:
        # The limit that Triton itself checks a kernel against.
        shared_memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    except Exception as error:  # compilers, loaders and headers that are not there: whatever it is, it is the reason
        return f"{NO_DRIVER}: {type(error).__name__}: {str(error).strip() or 'no message'}"
    sizes = properties.multi_processor_count, shared_memory
    if torch.version.hip is not None:
        return Device(properties.name, properties.gcnArchName.split(":")[0], *sizes, cooperative=False)
    return Device(properties.name, f"sm_{properties.major}{properties.minor}", *sizes, _is_cooperative(index))


def _is_cooperative(index: int) -> bool:
    """Whether the device can launch programs that wait for each other; True where it cannot be asked.

    A launch that it refuses all the same is planned again, see `route.without_waiting`.
    """
    found = ctypes.c_int(1)
    try:
        ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(found), COOPERATIVE_LAUNCH, index)
    except (OSError, AttributeError):
        return True
    return bool(found.value)
