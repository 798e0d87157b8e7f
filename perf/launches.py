"""One tiny launch of each placement and protocol, forward and backward, beside nn.LSTM; each is named before it starts.

    python perf/launches.py

What hangs is the one named last: after 20 seconds it is shown where. Results are held against nn.LSTM in fp64, and may
be twice as far from it as nn.LSTM in the same type.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rows import needs_gpu
from torch import Tensor, nn

from lstm_triton.functional import lstm
from lstm_triton.kernels.config import Config
from lstm_triton.planning.cost import microseconds_per_step
from lstm_triton.planning.device import Device, device_of
from lstm_triton.planning.planner import candidates
from lstm_triton.planning.problem import PASSES, Problem

INPUTS, HIDDEN, BATCH, STEPS = 32, 64, 20, 6
# By placement and protocol: the type of its launch. What waits for nobody comes first.
KINDS = {
    ("local", "none"): "bfloat16",
    ("stepwise", "none"): "float16",
    ("grid", "mailbox"): "bfloat16",
    ("grid", "flags"): "float16",
}
HANGS = 20  # seconds


@dataclass(frozen=True)
class Case:
    """configs: by pass; those that the planner likes best of a kind."""

    name: str
    dtype: str
    configs: dict[str, Config]


def cases(device: Device) -> Iterator[Case]:
    """Those of KINDS that the device can run."""
    for (placement, protocol), dtype in KINDS.items():
        configs = {}
        for which in PASSES:
            problem = Problem(which, HIDDEN, BATCH, 1, dtype, "ieee")
            found = [c for c in candidates(problem, device) if (c.placement, c.protocol) == (placement, protocol)]
            if found:
                configs[which] = min(found, key=lambda c, p=problem: microseconds_per_step(c, p, device))
        if len(configs) == len(PASSES):
            yield Case(name_of((placement, protocol)), dtype, configs)


def name_of(kind: tuple[str, str]) -> str:
    return " ".join(kind).removesuffix(" none")


def complaint(case: Case, where: torch.device) -> str:
    """How a result is further from fp64 than twice nn.LSTM's own error, by the rms; "" if none is."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = (STEPS, BATCH, INPUTS), (1, BATCH, HIDDEN), (1, BATCH, HIDDEN)
    inputs = [torch.randn(shape, generator=generator).to(where, dtype) for shape in shapes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = nn.LSTM(INPUTS, HIDDEN).to(where, dtype)
    exact = nn.LSTM(INPUTS, HIDDEN).to(where, torch.float64)
    exact.load_state_dict(theirs.state_dict())
    plan = "|".join(case.configs[which].encode() for which in PASSES)

    def ours(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, h_n, c_n = lstm(x, state, list(theirs.parameters()), backend="triton", plan=plan)
        return out, (h_n, c_n)

    results = {}
    for name, call, module in (("ours", ours, theirs), ("nn.LSTM", theirs, theirs), ("fp64", exact, exact)):
        x, h, c = leaves = [t.to(next(module.parameters()).dtype, copy=True).requires_grad_() for t in inputs]
        out, (h_n, c_n) = call(x, (h, c))
        loss = out.square().sum() + (h_n * c_n).sum()
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        results[name] = [t.detach().double() for t in (out, h_n, c_n, *grads)]
    unit = torch.finfo(dtype).eps
    for index, (a, b, want) in enumerate(zip(*results.values())):
        error, own = (float((t - want).square().mean().sqrt()) for t in (a, b))
        # A few values may be exact by luck: no error is held to less than one rounding of the type.
        if not error <= 2 * max(own, unit * float(want.square().mean().sqrt())):
            return f"wrong: result {index} has an rms error of {error:.2e}, nn.LSTM's is {own:.2e}"
    return ""


def run(device: Device, where: torch.device) -> int:
    """The number of launches that failed."""
    failed, able = 0, list(cases(device))
    for case in able:
        print(f"{case.name}, {case.dtype}, forward and backward ...", flush=True)
        faulthandler.dump_traceback_later(HANGS, file=sys.__stderr__)
        try:
            found = complaint(case, where)
        except Exception as error:  # the next may run: which do says what is wrong
            found = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        failed += bool(found)
        print(f"  {found or 'as good as nn.LSTM'}", flush=True)
    for name in [name_of(kind) for kind in KINDS if name_of(kind) not in [case.name for case in able]]:
        print(f"{name}: not for {device.name}")
    return failed


def main() -> int:
    if needs_gpu():
        return 2
    where = torch.device("cuda")
    return 1 if run(device_of(where), where) else 0


if __name__ == "__main__":
    sys.exit(main())
