"""Ahead-of-time compilation: what a config becomes on a target, with no GPU at hand.

A pass is compiled from exactly what its launcher would pass: the launcher runs on meta tensors and
hands its arguments to the compiler in place of the driver.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward import lstm_backward
from .config import Config, Layout
from .forward import lstm_forward
from .launch import compile_options, constants
from .tiles import RUNTIME_SIZES

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one pass.

    registers: per thread. spills: bytes of stack per thread (NVIDIA) or spilled vector registers
    (AMD). shared: bytes per program. matrix_instructions: in the source text of the binary, by
    kind (wgmma, mma, tcgen05, mfma); a loop body counts once. asm: PTX or AMDGCN.
    """

    registers: int
    spills: int
    shared: int
    matrix_instructions: dict[str, int]
    asm: str


def target_of(arch: str) -> GPUTarget:
    """ "sm_90" or "gfx942" -> Triton's target."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


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
) -> Report:
    """Compile one pass ("forward" or "backward") of a layer with all its optional inputs given."""
    layout = Layout(batch=config.block_b, seq_len=2, batch_first=False)
    meta = {"dtype": dtype, "device": "meta"}
    gates = torch.empty((layout.rows, directions, 4 * hidden_size), **meta)
    w_hh = torch.empty((directions, 4 * hidden_size, hidden_size), **meta)
    sequence = torch.empty((layout.rows, directions, hidden_size), **meta)
    state = torch.empty((directions, layout.batch, hidden_size), **meta)
    row_lengths = torch.empty((layout.batch,), dtype=torch.int32, device="meta") if lengths else None
    marks = torch.empty((layout.rows,), dtype=torch.bool, device="meta") if reset else None
    reports: list[Report] = []

    def launch(kernel, config, layout, hidden_size, directions, precision, exchanged, backward, arguments) -> None:
        flags = exchanged.new_empty((1,), dtype=torch.int32) if config.protocol == "flags" else None
        fixed = constants(config, hidden_size, directions, precision, exchanged.dtype)
        reports.append(_compile(kernel, config, arch, {**arguments, **fixed, "flags": flags}))

    if which == "forward":
        given = (state, state)
        lstm_forward(gates, w_hh, given, layout, config, precision, save, row_lengths, marks, None, launch)
    else:
        lstm_backward(
            sequence,
            state,
            state,
            gates,
            sequence,
            w_hh,
            state,
            layout,
            config,
            precision,
            row_lengths,
            marks,
            None,
            launch,
        )
    return reports[0]


def _compile(kernel: Any, config: Config, arch: str, arguments: dict[str, Any]) -> Report:
    signature: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if name in RUNTIME_SIZES:
            signature[name] = "i32"
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            fixed[(index,)] = value
    options = compile_options(config, nvidia=arch.startswith("sm_"))
    source = ASTSource(kernel, signature, fixed, attributes)
    binary = triton.compile(source, target=target_of(arch), options=options)
    if arch.startswith("sm_"):
        return _nvidia_report(binary)
    return _amd_report(binary)


def _nvidia_report(binary: Any) -> Report:
    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    kinds = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}
    return Report(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        binary.metadata.shared,
        {kind: count for kind, text in kinds.items() if (count := ptx.count(text))},
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
        number("vgpr_count"), number("vgpr_spill_count"), binary.metadata.shared, {"mfma": mfma} if mfma else {}, asm
    )
