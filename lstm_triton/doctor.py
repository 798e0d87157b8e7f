"""An environment report fit for a bug report: versions, GPUs, tuned tables, variables, a self-check."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from ._version import __version__
from .device import Device, device_of
from .module import LSTM
from .settings import VARIABLES
from .tuning import store
from .tuning.table import NO_TABLE, TableError, kernels_hash, load

OTHERS_VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES")


def report() -> str:
    """The whole report; reads, runs one tiny LSTM per GPU, and changes nothing."""
    return "\n".join([*_versions(), *_variables(), *_gpus()])


def driver_version() -> str:
    """The NVIDIA driver's, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def _versions() -> Iterator[str]:
    yield f"lstm_triton  {__version__}, kernels {kernels_hash()[:12]}"
    yield f"python       {platform.python_version()} on {platform.platform()}"
    yield f"torch        {torch.__version__} (CUDA {torch.version.cuda}, ROCm {torch.version.hip})"
    yield f"triton       {triton.__version__}"
    yield f"cuDNN        {torch.backends.cudnn.version()}"


def _variables() -> Iterator[str]:
    yield "variables"
    for variable in VARIABLES:
        try:
            value = variable.read()
        except ValueError as error:
            value = f"WRONG: {error}"
        yield f"  {variable.name} = {value or '(the default)'}"
    for name in OTHERS_VARIABLES:
        if name in os.environ:
            yield f"  {name} = {os.environ[name]}"


def _gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "GPU          none: calls take PyTorch's own LSTM"
        return
    yield f"driver       {driver_version()}"
    for index in range(torch.cuda.device_count()):
        where = torch.device("cuda", index)
        device = device_of(where)
        shared = f"{device.shared_memory} bytes of shared memory"
        yield f"GPU {index}: {device.name}, {device.arch}, {device.multiprocessors} multiprocessors, {shared}"
        for kind, path in (("user", store.user_path(device)), ("shipped", store.SHIPPED / store.file_name(device))):
            yield f"  {kind} table: {_table(path, device)}"
        yield f"  self-check: {self_check(where)}"


def _table(path: Path, device: Device) -> str:
    if not path.exists():
        return "none"
    try:
        table = load(path)
    except (OSError, TableError) as error:
        return f"ignored: {error}"
    problem = table.mismatch(device)
    if problem:
        return f"ignored: {problem}"
    counts = f"{len(table.entries)} entries, {len(table.contests)} contests with nn.LSTM"
    return counts if store.active_table(device) is not NO_TABLE else f"{counts}, not used"


def self_check(where: torch.device) -> str:
    """Run a small LSTM forward and backward by the kernels and by PyTorch, and compare."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(32, 64, device=where)
    try:
        ours = LSTM(32, 64, backend="triton", precision="ieee", device=where)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(7, 5, 32, device=where)
        results = []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for module in (ours, theirs):
                output, _ = module(x)
                output.square().sum().backward()
                results.append((output.detach(), module.weight_hh_l0.grad))
    except Exception as error:  # the report must come out whatever is wrong
        return f"FAILED: {type(error).__name__}: {error}"
    output, gradient = (float((a - b).abs().max()) for a, b in zip(*results))
    return f"kernels ran; largest difference from nn.LSTM {output:.1e} (output), {gradient:.1e} (gradient of W_hh)"
