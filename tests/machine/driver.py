"""A driver for Triton whose device is this machine: what `kernel[grid](...)` launches runs on CPU tensors.

Triton's own JIT does the rest: it specialises, compiles for the target, caches, and hands the launcher what a GPU's
driver would get.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .faults import LaunchError, MachineError
from .memory import Span
from .ptx import SIZES
from .scheduler import LOOKS, Adversary, Launch
from .translate import code_of

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 72, "sm_89": 142, "sm_90": 132, "sm_120": 170}
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}  # that one program may ask for

_POINTER = np.dtype("u8")
_SCALARS = {
    "i1": "?",
    "i8": "i1",
    "i16": "i2",
    "i32": "i4",
    "i64": "i8",
    "u1": "?",
    "u8": "u1",
    "u16": "u2",
    "u32": "u4",
}
_SCALARS |= {"u64": "u8", "fp32": "f4", "fp64": "f8", "f32": "f4", "f64": "f8"}


class Machine:
    """The driver. arch: "sm_80", ...; multiprocessors: of the device that it stands for; free: those of them that a
    launch finds free, which a device does not tell. looks: how often everybody who waits looks once more, and nothing has
    changed, until that is a deadlock.

    adversary: makes the adversary of the launch with a given number. edit: changes a kernel's PTX before it is run.
    After a run `launches` has the names of the kernels that ran, and `trace` which warps ran, in order.
    """

    stands_in_for_a_gpu = True  # to lstm_triton.planning.device

    def __init__(
        self,
        arch: str,
        adversary: Callable[[int], Adversary] = Adversary,
        multiprocessors: int | None = None,
        edit: Callable[[str], str] = str,
        free: int | None = None,
        looks: int = LOOKS,
    ) -> None:
        if arch not in TARGETS:
            raise MachineError(f"the machine stands for {', '.join(TARGETS)}, not for {arch!r}")
        self.arch, self.adversary, self.edit, self.looks = arch, adversary, edit, looks
        self.multiprocessors = multiprocessors or MULTIPROCESSORS[arch]
        self.free = self.multiprocessors if free is None else free
        self.launches: list[str] = []
        self.trace: list[tuple[int, int]] = []
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(get_device_properties=self._properties, load_binary=self._load_binary)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch[3:]), 32)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_KIB[self.arch] * 1024,
            "multiprocessor_count": self.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65_536,
        }

    def _load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple:
        return None, name, 0, 0, 1024

    def launch(self, grid: tuple[int, int, int], launcher: _Launcher, values: tuple) -> None:
        """Run a kernel to its end."""
        metadata = launcher.metadata
        if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_pdl", False):
            raise MachineError("clusters and programmatic dependent launches are not modelled")
        code = code_of(self.edit(launcher.ptx))
        threads = metadata.num_warps * 32
        if code.program.threads not in (None, threads):
            raise MachineError(f"{code.program.name} is compiled for {code.program.threads} threads, not {threads}")
        programs = grid[0] * grid[1] * grid[2]
        together = bool(metadata.launch_cooperative_grid)
        if together and programs > self.resident(threads, metadata.shared):
            raise LaunchError(
                f"{code.program.name}: a cooperative launch of {programs} programs, of which only "
                f"{self.resident(threads, metadata.shared)} fit on {self.free} multiprocessors together"
            )
        parameters, spans = _packed(code.program.parameters, launcher.arguments(values))
        adversary = self.adversary(len(self.launches))
        self.launches.append(code.program.name)
        if programs:
            launch = Launch(code, grid, threads, metadata.shared, parameters, spans, together, adversary, self.looks)
            launch.run()
            self.trace += launch.trace

    def resident(self, threads: int, shared: int) -> int:
        """Programs that are on the device at once, each taking all the registers that it may."""
        each = max(1, min(65_536 // (256 * threads), (SHARED_KIB[self.arch] + 1) // (shared // 1024 + 1)))
        return each * self.free


class _Launcher:
    """What Triton calls in place of a GPU's launcher: the machine that is active then runs the kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
        paths = [path for name, path in group.items() if name.endswith(".ptx")]
        if not paths:
            raise MachineError(f"{source.name} has no PTX in Triton's cache")
        self.ptx = Path(paths[0]).read_text()

    def __call__(self, x: int, y: int, z: int, stream, function, packed, metadata, enter, leave, *values) -> None:
        machine = triton.runtime.driver.active
        assert isinstance(machine, Machine)
        machine.launch((x, y, z), self, values)

    def arguments(self, values: tuple) -> list[tuple[str, str, Any]]:
        """(name, Triton's type, value) of what the binary takes; tuples are flat."""
        found: list[tuple[str, str, Any]] = []

        def flatten(name: str, kind: Any, value: Any) -> None:
            if isinstance(kind, tuple):
                for index, (one, part) in enumerate(zip(kind, value)):
                    flatten(f"{name}[{index}]", one, part)
            elif kind != "constexpr":
                found.append((name, kind, value))

        for (name, kind), value in zip(self.source.signature.items(), values):
            flatten(str(name), kind, value)
        return found


def _packed(parameters: dict[str, str], arguments: list[tuple[str, str, Any]]) -> tuple[list[np.ndarray], list[Span]]:
    """Parameters as vectors of their bits, and the memory that they point to."""
    vectors, spans = [], []
    kinds = list(parameters.values())
    # Triton adds pointers to scratch memory, which these kernels do not have.
    if not len(arguments) <= len(kinds) <= len(arguments) + 2:
        raise MachineError(f"the kernel takes {len(kinds)} parameters, the launch has {len(arguments)}")
    for (name, kind, value), declared in zip(arguments, kinds):
        if kind.startswith("*"):
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                where = value.device if isinstance(value, torch.Tensor) else type(value).__name__
                raise MachineError(f"{name} should be a tensor on the CPU, got: {where}")
            bits = np.full(32, value.data_ptr(), np.uint64)
            spans.append(Span(name, value.data_ptr(), _extent(value)))
        elif kind in _SCALARS and isinstance(value, int | float):
            bits = np.full(32, value, _SCALARS[kind])
        else:
            raise MachineError(f"{name} of type {kind} cannot be {value!r}")
        if bits.itemsize != SIZES[declared]:
            raise MachineError(f"{name} of type {kind} goes into a parameter of type {declared}")
        vectors.append(bits.view(f"u{bits.itemsize}"))
    vectors += [np.zeros(32, f"u{SIZES[declared]}") for declared in kinds[len(arguments) :]]
    return vectors, spans


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


@contextlib.contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    """Within the block Triton's kernels run on this machine."""
    drivers = triton.runtime.driver
    before = drivers._active  # `reset_active` would ask for a GPU's driver, which may not be there
    drivers.set_active(machine)
    try:
        yield machine
    finally:
        drivers._active = before
