"""Which path a call takes, the Triton kernels or PyTorch's own LSTM, and the reason in words.

Whether the kernels can run (`kernel_refusal`) depends on the device, the type and the module's
constructor arguments, never on a batch size or a sequence length, so that it is a constant of a
compiled or exported model. Whether nn.LSTM is faster, as measured or as predicted (`slower_reason`), depends on the
batch and the length too, and is asked in eager mode only: inside a compiled graph nn.LSTM is a break.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ..kernels.config import PRECISIONS as PRECISIONS
from ..kernels.config import Config
from ..kernels.forward import lstm_forward_kernel
from ..kernels.launch import LaunchRefused, is_interpreted
from .cudnn import Call, algorithm
from .device import INTERPRETER, NO_DRIVER, Device, device_of, on_gpu, plan_without_waiting, stand_in
from .memory import forget
from .padding import padded_size
from .planner import NoPlan, Plan, plan, refusal
from .precision import resolve_precision
from .prediction import Prediction, predict
from .problem import PASSES, Problem, bucket_of
from .settings import AUTOTUNE, misspelt, strict
from .store import active_table
from .table import Bout
from .transforms import autocast_is_on, exporting, refused_transform

BACKENDS = ("auto", "triton", "torch")
logger = logging.getLogger("lstm_triton")


class Request(NamedTuple):
    """What of a call the possibility of the kernels depends on. precision: "" follows `torch.backends.cudnn`."""

    backend: str
    device_type: str
    device_index: int | None
    dtype: str
    precision: str
    hidden_size: int
    directions: int
    kind: str = "plain"

    @property
    def device(self) -> torch.device:
        return (
            torch.device(self.device_type)
            if self.device_index is None
            else torch.device(self.device_type, self.device_index)
        )


def kernel_device(device: torch.device) -> Device | NoPlan:
    """The device on which kernels over tensors of `device` would run, or why there is none."""
    if is_interpreted(lstm_forward_kernel):
        if device.type == "cpu":
            return INTERPRETER
        return NoPlan(f"Triton's interpreter is on (TRITON_INTERPRET=1) and takes CPU tensors, not {device.type}")
    if (found := stand_in(device)) is not None:
        return found
    if not on_gpu(device):
        return NoPlan(f"the tensors are on {device.type}: the kernels run on CUDA and ROCm devices")
    try:
        return device_of(device)
    except RuntimeError as error:
        return NoPlan(str(error))


class Unusable(RuntimeError):
    """No plan is left for a layer that kernels were expected to run."""


_wrong: dict[tuple[Device, Problem], frozenset[Config]] = {}  # configs found to be wrong, of problems of any batch


def plan_for(problem: Problem, device: Device) -> Plan | NoPlan:
    """The plan for a problem, from the tuned table that is active on the device or the heuristic."""
    return plan(problem, device, active_table(device), wrong_configs(problem, device))


def wrong_configs(problem: Problem, device: Device) -> frozenset[Config]:
    """Those that have been compared with PyTorch and are left out."""
    return _wrong.get((device, replace(problem, batch=0)), frozenset()) if _wrong else frozenset()


def leave_out(problem: Problem, device: Device, config: Config, complaint: str) -> None:
    """Never plan this config for such a problem again, in this process; one warning."""
    known = wrong_configs(problem, device)
    if config not in known:
        _wrong[device, replace(problem, batch=0)] = known | {config}
        _refusal.cache_clear()
        forget()
        logger.warning(
            "a config is left out: it does not do on this GPU what it should. Please report it, with what `python -m "
            "lstm_triton doctor` prints: %s pass, %s, %s: %s",
            problem.which, problem, config.encode(), complaint,
        )  # fmt: skip


def without_waiting(device: torch.device, refused: LaunchRefused) -> None:
    """After a cooperative launch that the device has refused: plan without such launches; one warning."""
    plan_without_waiting(device)
    forget()
    logger.warning(
        "%s has refused a launch whose programs wait for each other (%s): from now on there are none, and large layers "
        "are slower. LSTM_TRITON_COOPERATIVE=0 says so from the start", device, refused,
    )  # fmt: skip


def compute_dtype(device_type: str, dtype: torch.dtype) -> str:
    """The name of the type that a call computes in: autocast's if it is on (never for float64), else the weights'."""
    if dtype != torch.float64 and autocast_is_on(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return str(dtype).removeprefix("torch.")


def kernel_refusal(*fields: Any) -> str:
    """Why a call takes PyTorch's path; "" if it takes the kernels. RuntimeError if backend="triton" cannot.

    fields: those of a `Request`, one by one, as TorchDynamo hands constants on.
    """
    request = Request(*fields)
    if request.backend == "auto" and exporting():
        return ""  # the operator goes into the program, and runs in plain PyTorch where it must
    gpu = on_gpu(request.device)
    if request.backend == "auto" and gpu and strict():
        request = request._replace(backend="triton")
    reason = refused(request.backend, possible_refusal(request))
    if reason and gpu:
        log_once(reason)
    return reason


def refused(backend: str, reason: str) -> str:
    """The reason; an error, where there is one, if nothing but the kernels was asked for."""
    if reason and backend == "triton":
        raise RuntimeError(f'backend="triton" is not possible: {reason}')
    return reason


def by_torch_alone(backend: str, device: torch.device) -> bool:
    """Whether a plain call can only be PyTorch's own, by the first glance: of most calls off a GPU."""
    return backend != "triton" and not on_gpu(device) and not exporting()


def possible_refusal(request: Request) -> str:
    """The same as a question: nothing is raised or logged."""
    # Neither asks a driver, which may not be able to start.
    if request.backend == "torch":
        return 'backend="torch" asks for it'
    if request.backend == "auto" and not on_gpu(request.device):
        return f"the tensors are on {request.device_type}: the kernels run on CUDA and ROCm devices"
    _warn_of_misspelt_variables()
    if not request.precision:
        request = request._replace(precision=resolve_precision(""))
    return _refusal(kernel_device(request.device), request) or refused_transform()


def has_kernels(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device at all."""
    return not isinstance(kernel_device(device), NoPlan)


def kernel_hidden_size(*fields: Any) -> int:
    """The hidden size that the kernels compute a plain layer by, see `padding.py`; fields: those of a `Request`."""
    request = Request(*fields)
    device = kernel_device(request.device)
    if isinstance(device, NoPlan) or exporting():  # a program may run elsewhere
        return request.hidden_size
    sizes, precision = (request.hidden_size, request.directions), resolve_precision(request.precision)
    return padded_size(*sizes, request.dtype, precision, device)


# A constant of a compiled model: this is what `torch.compiler.assume_constant_result` sets, which
# would import TorchDynamo, a second of import time.
kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
kernel_hidden_size._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal_on(target: Device | NoPlan, request: Request) -> str:
    """`kernel_refusal` for a GPU that need not be here."""
    if request.backend == "torch":
        return 'backend="torch" asks for it'
    none = target if isinstance(target, NoPlan) else refusal(target, request.dtype, request.precision)
    if none is not None:
        return none.reason
    assert isinstance(target, Device)
    hidden_size = request.hidden_size
    if request.kind == "plain":
        hidden_size = padded_size(hidden_size, request.directions, request.dtype, request.precision, target)
    for which in PASSES:
        sizes = hidden_size, 16, request.directions
        problem = Problem(which, *sizes, request.dtype, request.precision, request.kind)
        chosen = plan_for(problem, target)
        if isinstance(chosen, NoPlan):
            return chosen.reason
        if request.backend == "auto" and request.kind == "plain" and chosen.config.placement == "stepwise":
            return (
                f"the {which} pass would need one launch a step on {target.name}, which PyTorch's own LSTM does better"
            )
    return ""


_refusal = lru_cache(maxsize=4096)(refusal_on)


def slower_reason(device: torch.device, call: Call, precision: str, training: bool, seq_len: int) -> str:
    """Why nn.LSTM is the faster path of a call that the kernels could run; "" if it is not known to be."""
    target = kernel_device(device)
    if isinstance(target, NoPlan) or strict():
        return ""
    return slower_on(target, call, resolve_precision(precision), training, seq_len)


def slower_on(target: Device, call: Call, precision: str, training: bool, seq_len: int) -> str:
    """`slower_reason` for a GPU that need not be here. What has been measured goes before what is predicted.

    A call that is captured into a CUDA graph goes the way of its warm-up, though a graph may favour the other one.
    """
    table = active_table(target)
    if table.contests:
        contest = table.contests.get(bout_of(call, precision, training, seq_len == 1, target))
        if contest is not None:
            return "" if contest.speedup >= 1 else _measured(call, training, target, contest.speedup, table.name)
    predicted = predict(call, target, precision, training, seq_len)
    if predicted is None or not predicted.leaves_it or AUTOTUNE.read() == "on":
        return ""
    return f"nn.LSTM is {said(predicted)}"


def said(predicted: Prediction) -> str:
    """A prediction in words, behind "nn.LSTM is"."""
    ratio = predicted.speedup
    compared = f"{ratio:.2f} times slower" if ratio >= 1 else f"{1 / ratio:.2f} times faster"
    return f"{compared}, predicted, not measured (`python -m lstm_triton tune` measures), by {predicted}"


def _measured(call: Call, training: bool, device: Device, speedup: float, name: str) -> str:
    _, which = mode_of(training)
    return (
        f"nn.LSTM measured {1 / speedup:.2f} times faster here (table {name}): "
        f"cuDNN's algorithm is {algorithm(call, device, which)}"
    )


def mode_of(training: bool) -> tuple[str, str]:
    """The mode of a bout, and the pass whose cuDNN algorithm stands for it."""
    return ("training", "backward") if training else ("inference", "forward")


def bout_of(call: Call, precision: str, training: bool, single_step: bool, device: Device) -> Bout:
    """The table's key of a call."""
    mode, which = mode_of(training)
    bucket = bucket_of(Problem("forward", call.hidden_size, call.batch, call.directions, call.dtype, precision))
    return Bout(
        bucket.hidden_size,
        bucket.aligned,
        bucket.batch,
        bucket.directions,
        bucket.dtype,
        bucket.precision,
        algorithm(call, device, which).name,
        mode,
        single_step,
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise the ValueError of an argument that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got: {value!r}")


@cache
def _warn_of_misspelt_variables() -> None:
    for name in misspelt():
        logger.warning("%s is no variable of lstm_triton: `python -m lstm_triton doctor` lists them", name)


@cache
def log_once(reason: str) -> None:
    # That something on this machine is broken is no matter of course.
    level = logging.WARNING if reason.startswith(NO_DRIVER) else logging.INFO
    logger.log(level, "LSTM takes PyTorch's path: %s", reason)


@cache
def warn_once_of_the_loop(reason: str) -> None:
    """What neither the kernels nor aten do is a Python loop over time: slow on a GPU, so say it aloud."""
    logger.warning("LSTM runs step by step in plain PyTorch: %s", reason)
