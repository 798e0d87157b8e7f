"""Time that Python takes to have one call's kernels under way: by the operator, and past the dispatcher.

    python perf/host_overhead.py

On a GPU the host's clock until everything is queued, nn.LSTM's beside ours. Without one the launches are looked up as
for an H100 and then left out, and the small products around them are the CPU's: what is left is Python. Sizes are
small on purpose; lower quartiles, in microseconds.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch import nn

from lstm_triton import LSTM
from lstm_triton.functional import decision
from lstm_triton.kernels import launch
from lstm_triton.kernels.compile import compiling_for
from lstm_triton.layer import choice, eager
from lstm_triton.planning import route
from lstm_triton.planning.device import KNOWN

CALLS, WARM_UP = 300, 20
INPUTS, HIDDEN = 8, 16


@contextlib.contextmanager
def replaced(target: object, name: str, value: object) -> Iterator[None]:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextlib.contextmanager
def without_launches(arch: str) -> Iterator[None]:
    """Within the block kernels over CPU tensors are compiled for this target, looked up, and not launched."""
    real = triton.runtime.JITFunction.run
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiling_for(arch))
        for module in (route, choice):
            stack.enter_context(replaced(module, "kernel_device", lambda device: KNOWN[arch]))

        def look_up(self, *arguments, grid, warmup, **options):
            return real(self, *arguments, grid=grid, warmup=True, **options)

        stack.enter_context(replaced(triton.runtime.JITFunction, "run", look_up))
        stack.enter_context(replaced(launch, "again", lambda binary, grid, arguments: None))
        yield


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for index in range(WARM_UP + CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if index >= WARM_UP:
            times.append(time.perf_counter() - start)
    # The lower quartile: a machine that does something else now and then makes some calls slow, and none fast.
    return statistics.quantiles(times, n=4)[0] * 1e6


def calls_of(module: nn.Module, device: torch.device) -> dict[str, Callable[[], object]]:
    dtype = torch.bfloat16
    x, step = (torch.randn(steps, 1, INPUTS, device=device, dtype=dtype) for steps in (2, 1))
    cotangent = torch.ones(2, 1, HIDDEN, device=device, dtype=dtype)

    def without_gradient(given: torch.Tensor) -> None:
        with torch.no_grad():
            module(given)

    def train() -> None:
        module.zero_grad()
        module(x)[0].backward(cotangent)

    return {
        "one step": lambda: without_gradient(step),
        "inference": lambda: without_gradient(x),
        "forward pass of training": lambda: module(x),
        "training step": train,
    }


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls, theirs = {}, {}
    for layers in (1, 2):
        sizes, where = (INPUTS, HIDDEN, layers), {"device": device, "dtype": torch.bfloat16}
        of_two = f", {layers} layers" * (layers > 1)
        calls |= {
            name + of_two: call for name, call in calls_of(LSTM(*sizes, backend="triton", **where), device).items()
        }
        if device.type == "cuda":
            theirs |= {name + of_two: call for name, call in calls_of(nn.LSTM(*sizes, **where), device).items()}
    print(f"{'us a call':36}" + "".join(f"{name:>10}" for name in ("operator", "eager", *["nn.LSTM"] * bool(theirs))))
    for name, call in calls.items():
        # A figure as soon as there is one: the next may take long, where it has to compile.
        print(f"{name:36}", end="", flush=True)
        with contextlib.nullcontext() if device.type == "cuda" else without_launches("sm_90"):
            with (
                replaced(eager, "unobserved", lambda tensors: False),
                replaced(decision, "nobody_observes", lambda: False),
            ):
                tell(microseconds(call, device))
            tell(microseconds(call, device))
        if theirs:
            tell(microseconds(theirs[name], device))
        print(flush=True)
    return 0


def tell(figure: float) -> None:
    print(f"{figure:10.0f}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
