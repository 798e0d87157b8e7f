"""An environment report fit for a bug report: versions, GPUs, tuned tables, variables, a self-check."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from .._version import __version__
from ..functional import lstm
from ..planning import store
from ..planning.device import Device
from ..planning.planner import NoPlan, Plan, plan
from ..planning.problem import PASSES, Problem
from ..planning.route import kernel_device
from ..planning.settings import VARIABLES, misspelt
from ..planning.table import TableError, kernels_hash, load

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
    for name in misspelt():
        yield f"  {name} is no variable of lstm_triton"


def _gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "GPU          none: calls take PyTorch's own LSTM"
        return
    yield f"driver       {driver_version()}"
    for index in range(torch.cuda.device_count()):
        where = torch.device("cuda", index)
        device = kernel_device(where)
        if isinstance(device, NoPlan):
            yield f"GPU {index}: {torch.cuda.get_device_properties(index).name}, not usable: {device.reason}"
            continue
        shared = f"{device.shared_memory} bytes of shared memory"
        yield f"GPU {index}: {device.name}, {device.arch}, {device.multiprocessors} multiprocessors, {shared}"
        for kind, path in (("user", store.user_path(device)), ("shipped", store.SHIPPED / store.file_name(device))):
            yield f"  {kind} table: {_table(path, device)}"
        yield f"  self-check: {self_check(where)}"


def _table(path: Path, device: Device) -> str:
    try:
        table = load(path)
    except FileNotFoundError:
        return "none"
    except (OSError, TableError) as error:
        return f"ignored: {error}"
    problem = table.mismatch(device)
    if problem:
        return f"ignored: {problem}"
    return f"{len(table.entries)} entries, {len(table.contests)} contests with nn.LSTM"


def self_check(where: torch.device) -> str:
    """Run a small LSTM forward and backward by the kernels, with the heuristic's plans, and by PyTorch."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(32, 64, device=where)
    try:
        device = kernel_device(where)
        if isinstance(device, NoPlan):
            return f"none: {device.reason}"
        plans = [plan(Problem(which, 64, 5, 1, "float32", "ieee"), device) for which in PASSES]
        text = "|".join(one.config.encode() if isinstance(one, Plan) else one.reason for one in plans)
        ours = [weight.detach().clone().requires_grad_() for weight in theirs.parameters()]
        x = torch.randn(7, 5, 32, device=where)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out, _, _ = lstm(x, None, ours, backend="triton", precision="ieee", plan=text)
            want, _ = theirs(x)
            pairs = ((out, ours[1]), (want, list(theirs.parameters())[1]))
            grads = [torch.autograd.grad(result.square().sum(), w_hh)[0] for result, w_hh in pairs]
    except Exception as error:  # the report must come out whatever is wrong
        return f"FAILED: {type(error).__name__}: {error}"
    output, gradient = float((out - want).detach().abs().max()), float((grads[0] - grads[1]).abs().max())
    return f"kernels ran; largest difference from nn.LSTM {output:.1e} (output), {gradient:.1e} (gradient of W_hh)"
