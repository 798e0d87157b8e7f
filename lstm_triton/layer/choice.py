"""Which config runs a pass of a layer: that of an argument, of a tuned table, or of the planner."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.config import PLAIN_CELL, Cell, Config, Layout
from ..kernels.launch import Launcher, Repeated
from ..planning import planner
from ..planning.device import on_gpu
from ..planning.planner import NoPlan, Plan, plan_single
from ..planning.problem import INVARIANT_BATCH, Problem, bucket_of_batch
from ..planning.route import Unusable, kernel_device, plan_for, wrong_configs
from ..planning.settings import AUTOTUNE
from .records import Inputs, Options


class Pass(NamedTuple):
    """How calls with tensors of the same kinds run one pass: by this config, and once launched by its binary."""

    config: Config
    launch: Launcher


GIVEN = "the call"  # where a plan came from that an argument gave


def fits_one_launch(v: Inputs, options: Options, layout: Layout) -> bool:
    if layout.seq_len != 1 or v.x.dim() == 4 or options.batch_invariant or v.gain_ih is not None:
        return False
    return v.x.shape[2] > 0 and v.w_ih[0].numel() < 2**31  # something to multiply, by 32-bit offsets inside W_ih


def _single_plan(v: Inputs, options: Options, layout: Layout) -> Plan | None:
    """The plan of a sequence of one step in one launch; None if it is to be computed as any other."""
    if not fits_one_launch(v, options, layout):
        return None
    if options.plans:
        config = options.plans.forward
        return Plan(config, GIVEN) if config.placement == "single" else None
    device = kernel_device(v.w_hh.device)
    if isinstance(device, NoPlan):
        return None
    problem = problem_of("forward", v, options, layout.batch)
    chosen = plan_single(problem, device)
    return None if chosen is None or chosen in wrong_configs(problem, device) else Plan(chosen, "heuristic")


def problem_of(which: str, v: Inputs, options: Options, batch: int) -> Problem:
    """What a plan is asked for."""
    dtype, (sets, _, hidden_size) = str(v.w_hh.dtype).removeprefix("torch."), v.w_hh.shape
    # One config for all batches: its tiles say in which order a row's sums are made.
    batch = INVARIANT_BATCH if options.batch_invariant else bucket_of_batch(batch)
    return Problem(which, hidden_size, batch, sets, dtype, options.precision, kind_of(v, options.cell))


def refusal(v: Inputs, options: Options) -> str:
    """Why no kernel runs this layer, whatever its sizes; "" if one may."""
    if options.plans:
        return ""
    device = kernel_device(v.x.device)
    dtype = str(v.w_hh.dtype).removeprefix("torch.")
    none = device if isinstance(device, NoPlan) else planner.refusal(device, dtype, options.precision)
    return "" if none is None else none.reason


def kind_of(v: Inputs, cell: Cell) -> str:
    """One of `problem.KINDS`."""
    plain = (cell is PLAIN_CELL or cell == PLAIN_CELL) and v.peephole is None
    if v.gain_hh is not None:
        return "norm" if plain else "norm+"
    return "plain" if plain else "variant"


def pass_of(which: str, v: Inputs, options: Options) -> Pass:
    """`choose_plan`, to be kept for calls like this one."""
    return Pass(choose_plan(which, v, options).config, Repeated())


def choose_plan(which: str, v: Inputs, options: Options) -> Plan:
    """The plan of one pass: from the `plan` argument, else from the planner; Unusable without one."""
    layout, hidden_size = options.layout(v.x), v.w_hh.shape[2]
    if which == "forward" and (single := _single_plan(v, options, layout)) is not None:
        return single
    if options.plans:
        config = options.plans.forward if which == "forward" else options.plans.backward
        if config is None:
            raise ValueError("a plan is two configs with a | between them: there is none of the backward pass")
        if config.placement == "local" and config.block_h < hidden_size:
            raise ValueError(f"placement 'local' needs block_h >= H = {hidden_size}, got {config.block_h}")
        return Plan(config, GIVEN)
    device = kernel_device(v.w_hh.device)
    if isinstance(device, NoPlan):
        raise Unusable(f"lstm_triton: {device.reason}")
    problem = problem_of(which, v, options, layout.batch)
    if on_gpu(v.w_hh.device) and AUTOTUNE.read() == "on":
        from ..tuning import first_call

        first_call.tune(problem, device, v.w_hh.device, torch.ops.lstm_triton.layer)
    chosen = plan_for(problem, device)
    if isinstance(chosen, NoPlan):
        raise Unusable(f"lstm_triton: {chosen.reason}")
    return chosen
