"""Ahead-of-time compilation: what a config becomes on a target, with no GPU at hand.

The launchers run as they are, on meta tensors, under a driver that names a target and owns no
device: Triton compiles exactly what it would on such a GPU, under the same key of its cache.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget

from .backward import lstm_backward
from .config import PLAIN_CELL, Cell, Config, Layout
from .forward import lstm_forward
from .launch import Recurrence
from .listing import Loop, copied_tiles, misread_operands, time_loop
from .variants import Variants


@dataclass(frozen=True)
class Report:
    """What the compiler made of one pass.

    registers: per thread. spills: bytes of stack per thread (NVIDIA) or spilled vector registers
    (AMD). shared: bytes per program. matrix_instructions: in the source text of the binary, by
    kind (wgmma, mma, tcgen05, mfma); a loop body counts once. loop: the machine's instructions in the time loop.
    copied_tiles, misread_operands: must be 0, see listing.py. asm: PTX or AMDGCN.
    """

    registers: int
    spills: int
    shared: int
    matrix_instructions: dict[str, int]
    loop: Loop
    copied_tiles: int
    misread_operands: int
    asm: str


def target_of(arch: str) -> GPUTarget:
    """ "sm_90" or "gfx942" -> Triton's target."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


class _Driver:
    """What Triton asks of a driver before it compiles; a device is named by its architecture."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return target_of(self.arch)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Lowered:
    """In place of a binary where a compilation stops before the target's own code: the texts so far."""

    asm: dict[str, str]


@contextlib.contextmanager
def stopping_at_layouts(kernel: Any) -> Iterator[None]:
    """Within the block this kernel's compilations are `Lowered`, and end with the last text that names layouts."""

    def lower(
        key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Any:
        target, backend = kernel.device_caches[device][2:4]
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        options = backend.parse_options(options.__dict__ | source.parse_options())
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        module, metadata = source.make_ir(target, options, *functions, context), {"target": target, **options.__dict__}
        texts = {}
        for stage in ("ttir", "ttgir"):
            module = stages[stage](module, metadata)
            texts[stage] = str(module)
        return Lowered(texts)

    kernel._do_compile = lower  # before it: Triton's keys; after it: its cache, which knows nothing of this
    try:
        yield
    finally:
        del kernel._do_compile


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Within the block Triton compiles for this target and cannot launch."""
    drivers = triton.runtime.driver
    before = drivers._active  # `reset_active` would ask for a GPU's driver, which may not be there
    drivers.set_active(_Driver(arch))
    try:
        yield
    finally:
        drivers._active = before


def compile_pass(
    which: str,
    config: Config,
    arch: str,
    hidden_size: int,
    dtype: torch.dtype,
    precision: str = "tf32",
    directions: int = 1,
    save: bool = True,
    lengths: bool = False,
    reset: bool = False,
    state: bool = True,
    layout: Layout | None = None,
    order: str | None = None,
    states: bool = False,
    cell: Cell = PLAIN_CELL,
    peephole: bool = False,
    norm: bool = False,
    reset_state: bool = False,
    layouts_only: bool = False,
) -> Any:
    """Triton's binary of one pass ("forward" or "backward") of a layer.

    lengths, reset, state: whether these optional inputs are given, the last with the gradients of
    h_n and c_n. layout: of the call whose first launch is compiled; by default any. order: as for the
    launchers. states: whether gradients of the saved gates and cells are given (backward). cell, peephole, norm:
    variants of the cell, see `Variants`. reset_state: whether the state that `reset` leads to is given, else zeros.
    layouts_only: to stop at what `copied_tiles` and `misread_operands` look at; no binary then, but `Lowered`.
    """
    layout = layout or Layout(config.block_b, 1 if config.placement == "single" else 2, batch_first=False)
    meta: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    gates = torch.empty((layout.rows, directions, 4 * hidden_size), **meta)
    w_hh = torch.empty((directions, 4 * hidden_size, hidden_size), **meta)
    sequence = torch.empty((layout.rows, directions, hidden_size), **meta)
    given = torch.empty((directions, layout.batch, hidden_size), **meta) if state else None
    fresh = torch.empty((directions, layout.batch, hidden_size), **meta) if reset_state else None
    row_lengths = torch.empty((layout.batch,), dtype=torch.int32, device="meta") if lengths else None
    marks = torch.empty((layout.rows,), dtype=torch.bool, device="meta") if reset else None
    binaries: list[Any] = []

    def launch(kernel: Any, recurrence: Recurrence, arguments: dict[str, Any]) -> None:
        grid, shared = next(recurrence.calls(nvidia=arch.startswith("sm_")))
        with stopping_at_layouts(kernel) if layouts_only else contextlib.nullcontext():
            binaries.append(kernel.run(grid=grid, warmup=True, **arguments, **shared))

    variants = Variants(
        cell,
        torch.empty((directions, 3, hidden_size), **meta) if peephole else None,
        torch.empty((directions, 4, hidden_size), **meta) if norm else None,
        torch.empty((directions, 2, hidden_size), **meta) if norm else None,
        torch.empty((directions,), dtype=torch.int64, device="meta") if cell.draws else None,
        torch.empty((directions, layout.batch, hidden_size), **meta) if cell.sampled and cell.variational_h else None,
    )
    options: dict[str, Any] = {
        "lengths": row_lengths, "reset": marks, "order": order, "variants": variants, "launch": launch
    }  # fmt: skip
    with compiling_for(arch):
        if which == "forward":
            if config.placement == "single":
                x, bias = torch.empty((layout.batch, hidden_size), **meta), torch.empty(w_hh.shape[:2], **meta)
                options["projection"] = (x, w_hh, bias)
            pair = None if given is None else (given, given)
            options["reset_state"] = (fresh, fresh) if fresh is not None else None
            lstm_forward(gates, w_hh, pair, layout, config, precision, save, **options)
        else:
            if states:
                options |= {"dcells": sequence, "dactivated": gates}
            if norm:
                stats = torch.empty((layout.rows, directions, 4), dtype=torch.float32, device="meta")
                options |= {"product": gates, "stats": stats}
            options["reset_c"] = fresh
            tensors = (sequence, given, given, gates, sequence, w_hh, given)
            lstm_backward(*tensors, layout, config, precision, **options)
    return binaries[0]


def report_of(binary: Any) -> Report:
    """What the compiler made of it; of what is only `Lowered` there are no numbers yet."""
    if isinstance(binary, Lowered):
        text = binary.asm["ttgir"]
        return Report(0, 0, 0, {}, Loop({}, {}, {}), copied_tiles(text), misread_operands(text), "")
    return _nvidia_report(binary) if "cubin" in binary.asm else _amd_report(binary)


def _nvidia_report(binary: Any) -> Report:
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def output_of(tool: str, option: str) -> str:
            command = [os.path.join(tools, tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, listing = output_of("cuobjdump", "-res-usage"), output_of("nvdisasm", "-c")
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    kinds = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}
    return Report(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        binary.metadata.shared,
        {kind: count for kind, text in kinds.items() if (count := ptx.count(text))},
        time_loop(listing),
        copied_tiles(binary.asm["ttgir"]),
        misread_operands(binary.asm["ttgir"]),
        ptx,
    )


def _amd_report(binary: Any) -> Report:
    asm = binary.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", asm)
        if found is None:
            raise RuntimeError(f"no {key} in the compiled kernel's metadata")
        return int(found.group(1))

    mfma = asm.count("v_mfma_")
    return Report(
        number("vgpr_count"),
        number("vgpr_spill_count"),
        binary.metadata.shared,
        {"mfma": mfma} if mfma else {},
        time_loop(asm),
        copied_tiles(binary.asm["ttgir"]),
        misread_operands(binary.asm["ttgir"]),
        asm,
    )
