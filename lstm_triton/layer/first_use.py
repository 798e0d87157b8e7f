"""Before a GPU runs a config for the first time it is compared with plain PyTorch: see `comparison.py`.

Compilers have turned kernels like these into garbage, on one target and with one optional input. What is found is
remembered in the cache folder, by GPU, driver, Triton and source of the kernels; what is wrong is left out, and the
planner asked again. LSTM_TRITON_CHECK says whether. Nothing is compared while a CUDA graph is captured, and no config
that a tuned table or an argument names: it has been measured and checked, or asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import triton
from triton.runtime.errors import TritonError

from ..planning.device import Device, is_capturing, on_gpu
from ..planning.planner import NoPlan
from ..planning.problem import bucket_of_batch
from ..planning.route import kernel_device, leave_out
from ..planning.settings import CHECK, cache_dir
from ..planning.table import kernels_hash
from . import comparison
from .choice import choose_plan, problem_of
from .comparison import Pass
from .records import Cotangents, Inputs, Options

_settled: set[tuple] = set()  # calls whose configs are known to be right, or are not to be compared
_found: dict[tuple[Path, str], str] = {}  # complaints about configs in this process, "" for none
logger = logging.getLogger("lstm_triton")


def ensure_forward(v: Inputs, options: Options, save: bool, c_dtype: torch.dtype | None = None) -> bool:
    """Have the planner's config of a forward pass compared, to `save` also that of the pass back; leave out wrong ones.

    Returns whether that is settled for calls like this one. `route.Unusable` if none is left.
    """
    if not _to_be_compared(v):
        return True
    one = Pass("forward", v, options, save, c_dtype)
    if _ensure(one) and save:
        # What is wrong with the pass back is best known while the call can still go another way.
        wanted = dict.fromkeys(comparison.DIFFERENTIABLE, True)
        _ensure(Pass("backward", v, options, given=Cotangents(v.x, None, None), wanted=wanted))
    return _call_of(one) in _settled


def ensure_backward(v: Inputs, options: Options, given: Cotangents, wanted: Mapping[str, bool]) -> bool:
    """The same of a backward pass with these gradients given."""
    if not _to_be_compared(v):
        return True
    one = Pass("backward", v, options, given=given, wanted=wanted)
    _ensure(one)
    return _call_of(one) in _settled


def _to_be_compared(v: Inputs) -> bool:
    return on_gpu(v.x.device) and CHECK.read() != "off"


def _ensure(one: Pass) -> bool:
    """Whether such a call is new in this process."""
    v, options, batch = one.v, one.options, one.options.layout(one.v.x).batch
    call, binary = _call_of(one), _binary(one)
    if call in _settled:
        return False
    device = kernel_device(v.x.device)
    assert not isinstance(device, NoPlan)
    while True:
        plan = choose_plan(one.which, v, options)
        if plan.source != "heuristic":
            break
        configs = [plan.config] if one.which == "forward" else [choose_plan("forward", v, options).config, plan.config]
        # How many batch tiles share a launch is no part of a binary.
        texts = [replace(config, max_batch_tiles=0).encode() for config in configs]
        key = " ".join(map(str, (*binary, *texts)))
        complaint = _known(device, key)
        if complaint is None:
            if is_capturing(v.x.device):
                return True
            try:
                complaint = comparison.complaint(one, configs[0], configs[1] if len(configs) > 1 else None)
            except (torch.OutOfMemoryError, comparison.Incomparable) as error:
                _warn_once(f"configs are used without a comparison with plain PyTorch, which fails: {error}")
                break
            except Exception as error:  # what cannot be compiled is left out like what is wrong; all else is the call's
                if not isinstance(error, TritonError) and "PassManager" not in str(error):
                    raise
                complaint = f"does not compile: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
            _remember(device, key, complaint)
        if not complaint:
            break
        _settled.clear()  # another call may have had this config
        leave_out(problem_of(one.which, v, options, batch), device, plan.config, complaint)
    _settled.add(call)
    return True


def _call_of(one: Pass) -> tuple[Hashable, ...]:
    v, options = one.v, one.options
    batch = bucket_of_batch(options.layout(v.x).batch)
    return v.x.device, batch, options.batch_invariant, options.plans, _binary(one)


def _binary(one: Pass) -> tuple[Hashable, ...]:
    """What a binary depends on besides its config: no batch, and of the cell's numbers only whether they are 0."""
    v, options = one.v, one.options
    single = options.layout(v.x).seq_len == 1
    given = tuple(None if tensor is None else tensor.dtype for tensor in (*v, *one.given))
    of_cell = tuple(bool(value) for value in vars(options.cell).values())
    return (
        one.which, tuple(v.w_hh.shape), v.x.dim(), v.x.shape[-1] if single else 0, single, given, one.save, one.c_dtype,
        options.order, options.precision, of_cell,
    )  # fmt: skip


def record_path(device: Device) -> Path:
    """Where comparisons on this GPU are remembered, with this driver, this Triton and these kernels."""
    made = (device.name, device.arch, driver_version(), triton.__version__, torch.__version__, kernels_hash())
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    return cache_dir() / "checks" / f"{device.arch}-{digest}.jsonl"


@cache
def driver_version() -> str:
    """The NVIDIA driver's, or the newest CUDA that it knows; on AMD that of ROCm."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        if torch.version.hip or not torch.cuda.is_available():
            return str(torch.version.hip)
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]  # not in a build without CUDA


def _known(device: Device, key: str) -> str | None:
    """What is known of a config; None for nothing."""
    path = record_path(device)
    if (path, key) not in _found and CHECK.read() == "first":
        for known, complaint in _read(path).items():
            _found.setdefault((path, known), complaint)
    return _found.get((path, key))


@cache
def _read(path: Path) -> dict[str, str]:
    """A record, once a process; lines that are none are passed over with a warning."""
    found, corrupt = {}, 0
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("the record of checked configs %s is ignored: %s", path, error)
        return {}
    for line in lines:
        try:
            key, complaint = json.loads(line)
            found[str(key)] = str(complaint)
        except (ValueError, TypeError):
            corrupt += 1
    if corrupt:
        logger.warning("%d lines of the record of checked configs %s are ignored: they are corrupt", corrupt, path)
    return found


def _remember(device: Device, key: str, complaint: str) -> None:
    path = record_path(device)
    _found[path, key] = complaint
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps([key, complaint]) + "\n")  # in one write: several processes may add
    except OSError as error:
        _warn_once(f"what has been checked is not remembered beyond this process: {error}")


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
