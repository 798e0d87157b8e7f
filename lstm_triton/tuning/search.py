"""Finding the fastest config of a problem by running every admissible one on the device.

Each config is compiled first, in parallel, and left out if it spills; then checked against fp64;
then timed on scratch tensors. Flags and mailboxes are reset inside every timed launch, as in use.
A config that fails is recorded with its error, warned about once, and skipped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch import Tensor

from ..kernels.backward import lstm_backward
from ..kernels.compile import compile_pass, report_of
from ..kernels.config import PLAIN_CELL, Config, Layout
from ..kernels.forward import lstm_forward
from ..planning.cost import microseconds_per_step
from ..planning.device import Device
from ..planning.planner import NoPlan, admissible, plan
from ..planning.precision import matmul_precision
from ..planning.problem import PASSES, Bucket, Problem, bucket_of
from ..planning.table import Entry
from ..reference import layer as reference
from .clock import Times, times_of

SCRATCH_BYTES = 1 << 28  # of the gates: bounds the steps of a timed launch
FEWEST_STEPS, MOST_STEPS = 32, 512
CHECKED_STEPS, CHECKED_INPUTS = 4, 16
REPEAT = 10
RunLayer = Callable[..., tuple[Tensor, ...]]  # the operator `lstm_triton::layer`, or one like it
logger = logging.getLogger("lstm_triton")


@dataclass(frozen=True)
class Progress:
    """What happened to one config: microseconds a step, or why it was left out; host_bound as in `Times`."""

    problem: Problem
    config: Config
    result: float | str
    host_bound: bool = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search. entry: what had been measured, None for nothing."""

    def __init__(self, entry: Entry | None) -> None:
        super().__init__()
        self.entry = entry


def search(
    problem: Problem,
    device: Device,
    where: torch.device,
    layer: RunLayer,
    deadline: float,
    known: Entry | None = None,
    pool: Executor | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Entry | None:
    """Measure a problem's configs, best estimate first, until done or `time.monotonic()` is past the deadline.

    layer: the operator of one layer, by which a config is checked. known: an earlier, incomplete entry whose
    measurements are kept. pool: where configs are compiled ahead; without one they compile as they are timed. None if
    nothing could be measured.
    """
    configs = sorted(admissible(problem, device), key=lambda config: microseconds_per_step(config, problem, device))
    measured: dict[str, float | str] = dict(known.measured) if known is not None else {}
    host_bound: set[str] = set(known.host_bound) if known is not None else set()
    configs = [config for config in configs if _key(config) not in measured]
    if not configs and known is not None:
        return replace(known, complete=True)
    complete = True
    # Events and streams are the current device's.
    guard = torch.accelerator.device_index(where.index)
    try:
        with guard:
            scratch = Scratch(problem, device, where, layer)
        for config, complaint in _compiled(configs, problem, device, pool):
            if time.monotonic() > deadline and measured:
                complete = False
                break
            with guard:
                times = complaint or _measure(scratch, config)
            if isinstance(times, str):
                logger.warning("left out: %s for %s: %s", _key(config), problem, times)
                progress = Progress(problem, config, times)
            else:
                progress = Progress(problem, config, times.median, times.host_bound)
            measured[_key(config)] = progress.result
            if progress.host_bound:
                host_bound.add(_key(config))
            tell(progress)
    except KeyboardInterrupt:
        raise Interrupted(_entry(measured, host_bound, False)) from None
    return _entry(measured, host_bound, complete)


def _entry(measured: dict[str, float | str], host_bound: set[str], complete: bool) -> Entry | None:
    best = _best(measured)
    if best is None:
        return None
    return Entry(Config.decode(best), measured, complete, tuple(key for key in measured if key in host_bound))


def _best(measured: dict[str, float | str]) -> str | None:
    times = {key: value for key, value in measured.items() if not isinstance(value, str)}
    return min(times, key=times.__getitem__, default=None)


def _key(config: Config) -> str:
    return replace(config, max_batch_tiles=0).encode()


def _compiled(
    configs: list[Config], problem: Problem, device: Device, pool: Executor | None
) -> Iterator[tuple[Config, str]]:
    """Each config with "" or the reason to leave it out: what the compiler made of it."""
    futures: list[Future] = []
    index = 0
    try:
        if pool is not None:
            futures.extend(pool.submit(_complaint, config, problem, device) for config in configs)
        for index, config in enumerate(configs):
            yield config, futures[index].result() if futures else ""
    except BrokenExecutor:
        # The compiler took its process with it. Which config it was, one process for each will tell.
        for config in configs[index:]:
            with ProcessPoolExecutor(1, get_context("spawn")) as single:
                try:
                    yield config, single.submit(_complaint, config, problem, device).result()
                except BrokenExecutor:
                    yield config, "the compiler ended its process"
    finally:
        for future in futures:
            future.cancel()


def _complaint(config: Config, problem: Problem, device: Device) -> str:
    """Compile a config as it will be launched, which also fills Triton's cache on disk."""
    try:
        binary = compile_pass(
            problem.which,
            config,
            device.arch,
            problem.hidden_size,
            getattr(torch, problem.dtype),
            problem.precision,
            problem.directions,
        )
        report = report_of(binary)
    except Exception as error:  # whatever the compiler raises is the finding
        return _first_line(error)
    if report.spills:
        return f"spills {report.spills} bytes"
    if report.copied_tiles:
        return "has threads load copies of a tile that others publish"
    if report.misread_operands:
        return "has an operand that the matrix unit would misread"
    if report.shared > device.shared_memory:
        return f"needs {report.shared} bytes of shared memory, there are {device.shared_memory}"
    return ""


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _measure(scratch: Scratch, config: Config) -> Times | str:
    try:
        return scratch.complaint(config) or scratch.times_per_step(config)
    except Exception as error:  # a config that cannot run must not end the search
        return _first_line(error)


class Scratch:
    """Random tensors of a problem, on which its configs are checked and timed; no user's tensor is touched.

    Both run the binary that is compiled ahead: with an initial state, and with what backward reads.
    """

    def __init__(self, problem: Problem, device: Device, where: torch.device, layer: RunLayer) -> None:
        self.problem, self.where, self.dtype = problem, where, getattr(torch, problem.dtype)
        self.layer = layer
        self.helper = _helper(problem, device)
        row_bytes = problem.batch * problem.directions * 4 * problem.hidden_size * problem.element_size
        steps = min(max(SCRATCH_BYTES // row_bytes, FEWEST_STEPS), MOST_STEPS)
        if device.arch == "interpreter":
            steps = CHECKED_STEPS  # a time says nothing there
        self.layout = Layout(problem.batch, steps, False)
        generator = torch.Generator(where).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=where)

        hidden, directions = problem.hidden_size, problem.directions
        self.w_hh = (draw(directions, 4 * hidden, hidden) * hidden**-0.5).to(self.dtype)
        self.w_ih = (draw(directions, 4 * hidden, CHECKED_INPUTS) * CHECKED_INPUTS**-0.5).to(self.dtype)
        self.x = draw(CHECKED_STEPS, problem.batch, CHECKED_INPUTS).to(self.dtype)
        self.h, self.c = (draw(directions, problem.batch, hidden).to(self.dtype) for _ in range(2))
        self.projected = draw(self.layout.rows, directions, 4 * hidden).to(self.dtype)
        self.gates = torch.empty_like(self.projected)
        self.cells, self.dout = (draw(self.layout.rows, directions, hidden).to(self.dtype) for _ in range(2))
        self.truth, own = self._by_reference(torch.float64), self._by_reference(self.dtype)
        # A few values may be exact by luck: no error is held to less than one rounding of the type.
        unit = 2**-11 if problem.precision == "tf32" and problem.dtype == "float32" else torch.finfo(self.dtype).eps
        self.own_error = [max(_rms(a.double() - b), unit * _rms(b)) for a, b in zip(own, self.truth)]

    def complaint(self, config: Config) -> str:
        """How a config's results are further from fp64 than twice PyTorch's own, by the rms; "" if they are not."""
        for index, (result, want, own) in enumerate(zip(self._by_kernels(config), self.truth, self.own_error)):
            error = _rms(result.double() - want)
            if not error <= 2 * own:
                return f"wrong: result {index} has an rms error of {error:.2e}, PyTorch's own is {own:.2e}"
        return ""

    def times_per_step(self, config: Config) -> Times:
        """In microseconds, of a launch over all steps with the reset of its exchange."""
        problem, layout = self.problem, self.layout
        if problem.which == "forward":

            def call() -> None:
                state = (self.h, self.c)
                lstm_forward(self.gates, self.w_hh, state, layout, config, problem.precision, True)

            times = times_of(call, self.where, REPEAT, lambda: self.gates.copy_(self.projected), ahead=True)
        else:
            self.gates.copy_(self.projected.sigmoid())

            def call() -> None:
                given = (self.dout, self.h, self.c, self.gates, self.cells, self.w_hh, self.c)
                lstm_backward(*given, layout, config, problem.precision)

            times = times_of(call, self.where, REPEAT, ahead=True)
        return times.scaled(1e3 / layout.seq_len)

    def _by_reference(self, dtype: torch.dtype) -> list[Tensor]:
        def run(x: Tensor, w_ih: Tensor, w_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            v = reference.Inputs(x, w_ih, w_hh, h_0=h, c_0=c)
            bidirectional = self.problem.directions == 2  # more are an ensemble's
            return reference.ensemble_forward(v, batch_first=False, bidirectional=bidirectional, cell=PLAIN_CELL)[:3]

        with matmul_precision(dtype, self.problem.precision):
            return self._results(run, dtype)

    def _by_kernels(self, config: Config) -> list[Tensor]:
        pair = (config, self.helper) if self.problem.which == "forward" else (self.helper, config)
        text = "|".join(one.encode() for one in pair)

        def run(x: Tensor, w_ih: Tensor, w_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            v = reference.Inputs(x, w_ih, w_hh, h_0=h, c_0=c)
            how = {"batch_first": False, "bidirectional": self.problem.directions == 2, "keep": "all"}
            how |= {"batch_invariant": False, "precision": self.problem.precision, "plan": text, "cell": ""}
            return self.layer(*v, **how)[:3]

        return self._results(run, self.dtype)

    def _results(self, run: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
        """out, h_n, c_n and the gradients of x, W_hh and the initial state: through all that forward saves."""
        leaves = [tensor.to(dtype, copy=True) for tensor in (self.x, self.w_ih, self.w_hh, self.h, self.c)]
        with torch.enable_grad():
            x, _, w_hh, h, c = (leaf.requires_grad_() for leaf in leaves)
            results = run(*leaves)
            out = results[0]
            cotangents = [self.dout.flatten()[: out.numel()].view_as(out), self.h, self.c]
            grads = torch.autograd.grad(results, (x, w_hh, h, c), [one.to(dtype) for one in cotangents])
        return [*(result.detach() for result in results), *grads]


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _helper(problem: Problem, device: Device) -> Config:
    """The heuristic's config of the other pass, which a check runs too."""
    other = PASSES[1 - PASSES.index(problem.which)]
    chosen = plan(replace(problem, which=other), device)
    if isinstance(chosen, NoPlan):
        raise RuntimeError(chosen.reason)
    return chosen.config


def problems_of(shapes: Iterable[tuple[int, int, int, str, str]]) -> list[Problem]:
    """The passes of (hidden_size, batch, directions, dtype, precision) shapes, without repeated buckets."""
    found: dict[Bucket, Problem] = {}
    for hidden_size, batch, directions, dtype, precision in shapes:
        for which in PASSES:
            problem = Problem(which, hidden_size, batch, directions, dtype, precision)
            found.setdefault(bucket_of(problem), problem)
    return list(found.values())
