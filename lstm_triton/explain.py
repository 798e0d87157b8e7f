"""Which path each layer of an LSTM takes on an input, with which configs, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.config import Config
from .modules import path
from .modules.cell import LSTMCell
from .modules.lstm import LSTM
from .planning.cost import Work, microseconds_per_step, work_per_step
from .planning.cudnn import UNDER_AUTOCAST, Algorithm, Call, algorithm
from .planning.device import Device
from .planning.padding import padded_size
from .planning.planner import NoPlan, Plan, plan_single
from .planning.precision import resolve_precision
from .planning.prediction import Prediction, predict
from .planning.problem import INVARIANT_BATCH, PASSES, Problem
from .planning.route import Request, compute_dtype, kernel_device, plan_for, refusal_on, said, slower_on
from .planning.settings import strict
from .planning.transforms import autocast_is_on


@dataclass(frozen=True)
class PassPath:
    """One pass of a layer on the Triton path.

    source: where the config came from, "heuristic" or the name of a tuned table.
    work: of one step. estimate: microseconds of one step, by the planner's coarse sum, not measured. padded_to: the
    hidden size that the layer is computed by, where it is not its own (`planning/padding.py`); else 0.
    """

    which: str
    config: Config
    source: str
    work: Work
    estimate: float
    padded_to: int = 0

    def __str__(self) -> str:
        config, work = self.config, self.work
        weights = "resident on chip" if config.resident else "re-read from L2 every step"
        if config.placement == "single":
            weights = "and W_ih read once, in one launch"
        padded = f", padded to H={self.padded_to}" if self.padded_to else ""
        exchange = "" if config.protocol == "none" else f", exchange by {config.protocol}"
        return (
            f"  {self.which}: {config.placement}{exchange}, W_hh {weights}, plan from {self.source}{padded}\n"
            f"    {config.encode()}\n"
            f"    a step: {_scaled(work.operations, 1000, 'FLOP')}, {_scaled(work.memory_bytes, 1024, 'B')} of memory "
            f"traffic, {_scaled(work.exchanged_bytes, 1024, 'B')} through L2; estimated {self.estimate:.2f} us"
        )


@dataclass(frozen=True)
class LayerPath:
    """path is "triton" or "torch"; passes: one per pass on the Triton path.

    cudnn: what nn.LSTM runs for the same call, per pass; empty off NVIDIA.
    """

    layer: int
    path: str
    reason: str
    passes: tuple[PassPath, ...] = ()
    cudnn: tuple[Algorithm, ...] = ()

    def __str__(self) -> str:
        lines = [f"layer {self.layer}: {self.path} ({self.reason})", *map(str, self.passes)]
        if self.cudnn:
            asked = ", ".join(f"{which} {one}" for which, one in zip(PASSES, self.cudnn))
            lines.append(f"  nn.LSTM would run cuDNN's: {asked}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    layers: tuple[LayerPath, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def explain(module: LSTM | LSTMCell, input: Tensor | PackedSequence) -> Explanation:
    """Say what `module(input)` would do, without doing it; print the result to read it.

    Raises RuntimeError where the call itself would: backend="triton" where the kernels cannot run.
    """
    if not isinstance(module, (LSTM, LSTMCell)):
        kind = type(module)
        raise TypeError(f"explains an LSTM or LSTMCell of lstm_triton, got {kind.__name__} of {kind.__module__}")
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    reason, invariant = module.refusal(data), getattr(module, "batch_invariant", False)
    if reason and invariant:
        raise RuntimeError(f"batch_invariant is asked for, and the kernels do not run: {reason}")
    if not reason and isinstance(module, LSTM) and not packed and not data.is_nested:
        reason = module.slower(data)
    layers, directions, proj_size = 1, 1, 0
    if isinstance(module, LSTM):
        layers, directions, proj_size = module.num_layers, 2 if module.bidirectional else 1, module.proj_size
    dtype = compute_dtype(data.device.type, next(module.parameters()).dtype)
    batch = INVARIANT_BATCH if invariant else _batch(module, input)
    sizes = (module.input_size, module.hidden_size, batch, layers, directions)
    call = Call(*sizes, dtype, proj_size, packed)
    one_step = isinstance(module, LSTMCell) or (not packed and _steps(module, data) == 1)
    one_step = one_step and not invariant
    precision, device = resolve_precision(module.precision or ""), kernel_device(data.device)
    kind = module.variant.kind(module.training) if isinstance(module, LSTM) else "plain"
    theirs = replace(call, dtype=UNDER_AUTOCAST) if autocast_is_on(data.device.type) else call
    predicted = None
    if isinstance(module, LSTM) and isinstance(device, Device) and not packed and not data.is_nested:
        asked = path.rival(module, data)
        if asked is not None:
            rival, _, trained, seq_len = asked
            predicted = predict(rival, device, precision, trained, seq_len)
    return _explanation(call, precision, device, reason, one_step, kind, theirs, predicted)


def explain_call(
    call: Call, device: Device | NoPlan, backend: str = "auto", precision: str = "tf32", seq_len: int = 100
) -> Explanation:
    """The same for sizes and a GPU that need not be here; as a training step.

    Raises ValueError for a proj_size that is none of an LSTM's, and RuntimeError as `explain` does.
    """
    if not 0 <= call.proj_size < call.hidden_size:
        raise ValueError(f"proj_size must be at least 0 and less than hidden_size, got {call.proj_size}")
    request = Request(backend, "cuda", None, call.dtype, precision, call.hidden_size, call.directions)
    reason = refusal_on(device, request)
    must = backend == "triton" or (backend == "auto" and strict())
    if reason and must:
        raise RuntimeError(f'backend="triton" is not possible: {reason}')
    if not reason and not must and backend == "auto" and isinstance(device, Device):
        reason = slower_on(device, call, precision, training=True, seq_len=seq_len)
    predicted = predict(call, device, precision, True, seq_len) if isinstance(device, Device) else None
    return _explanation(call, precision, device, reason, seq_len == 1, "plain", call, predicted)


def _explanation(
    call: Call,
    precision: str,
    device: Device | NoPlan,
    reason: str,
    one_step: bool,
    kind: str,
    theirs: Call,
    predicted: Prediction | None,
) -> Explanation:
    asked: tuple[Algorithm, ...] = ()
    if isinstance(device, Device) and device.is_nvidia:
        asked = tuple(algorithm(theirs, device, which) for which in PASSES)
    if reason:
        return Explanation(tuple(LayerPath(n, "torch", reason, (), asked) for n in range(call.num_layers)))
    assert isinstance(device, Device)
    passes = tuple(_pass(which, call, precision, device, one_step, kind) for which in PASSES)
    why = f"a plan exists for {call.dtype} on {device.name}"
    if predicted is not None:
        why += f"; nn.LSTM is {said(predicted)}"
    return Explanation(tuple(LayerPath(n, "triton", why, passes, asked) for n in range(call.num_layers)))


def _pass(which: str, call: Call, precision: str, device: Device, one_step: bool, kind: str) -> PassPath:
    hidden_size = call.hidden_size
    if kind == "plain" and not one_step:
        hidden_size = padded_size(hidden_size, call.directions, call.dtype, precision, device)
    problem = Problem(which, hidden_size, call.batch, call.directions, call.dtype, precision, kind)
    chosen = plan_for(problem, device)
    assert not isinstance(chosen, NoPlan)
    single = plan_single(problem, device) if one_step and which == "forward" and not problem.norm else None
    if single is not None:
        chosen = Plan(single, "heuristic")
    work = work_per_step(chosen.config, problem)
    estimate = microseconds_per_step(chosen.config, problem, device)
    return PassPath(
        which, chosen.config, chosen.source, work, estimate, hidden_size if hidden_size != call.hidden_size else 0
    )


def _steps(module: LSTM | LSTMCell, input: Tensor) -> int:
    return input.shape[1 if input.dim() == 3 and getattr(module, "batch_first", False) else 0]


def _batch(module: LSTM | LSTMCell, input: Tensor | PackedSequence) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return 1
    return input.shape[0] if module.batch_first else input.shape[1]


def _scaled(number: float, base: int, unit: str) -> str:
    """12_300_000 FLOP -> "12.3 MFLOP"; bytes in KiB, MiB, GiB."""
    infix = "i" if base == 1024 else ""
    for prefix in ("", "K", "M", "G", "T"):
        if number < base or prefix == "T":
            return f"{number:.3g} {prefix}{infix if prefix else ''}{unit}"
        number /= base
    raise AssertionError
