"""Triton's interpreter made fit for tests and for a look: programs that wait for each other, and bf16.

`cooperative(seed)` runs the programs of a launch as greenlets that hand over at every store, every
atomic (before and after it) and every volatile load, the next one drawn by a seeded generator.
Triton's own interpreter runs them one after another, so a kernel whose programs exchange data
would spin for ever.

`repair_bf16()` mends two things the interpreter gets wrong: `tl.dot` multiplies bf16 bit patterns,
and a cast to bf16 truncates where hardware rounds to nearest even.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import random
from collections.abc import Iterator

import greenlet
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
PATIENCE = 200_000
PATCHED: set[int] = set()  # modules whose triton.language is patched for the launch under way


class Deadlock(AssertionError):
    """Every living program only ever waits."""


class Scheduler:
    """Runs callables as greenlets, one step at a time, in a seeded random order."""

    def __init__(self, seed: int, patience: int = PATIENCE) -> None:
        self.random = random.Random(seed)
        self.patience = patience
        self.hub: greenlet.greenlet | None = None
        self.trace: list[int] = []  # which of the living programs went on, at every switch
        self.events: list[tuple[tuple[int, ...], str]] = []  # program and what it did when it handed over
        self.running: tuple[int, ...] = ()

    def run(self, programs: list) -> None:
        self.hub = greenlet.getcurrent()
        waiting = [(index, greenlet.greenlet(call)) for index, call in programs]
        budget = self.patience
        while waiting:
            if budget == 0:
                raise Deadlock(f"{len(waiting)} programs did not finish in {self.patience} switches")
            budget -= 1
            chosen = self.random.randrange(len(waiting))
            index, program = waiting[chosen]
            BUILDER.set_grid_idx(*index)
            self.running = index
            program.switch()
            self.trace.append(chosen)
            if program.dead:
                waiting.pop(chosen)
        self.hub = None

    def pause(self, event: str) -> None:
        if self.hub is not None and greenlet.getcurrent() is not self.hub:
            self.events.append((self.running, event))
            self.hub.switch()


def _run_cooperatively(scheduler: Scheduler):
    def call(self: interpreter.GridExecutor, *args_dev, **kwargs) -> None:
        """GridExecutor.__call__ with its loop over programs replaced by the scheduler."""
        PATCHED.clear()
        names = inspect.getfullargspec(self.fn).args
        kwargs = {name: value for name, value in kwargs.items() if name in names}
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        scope = interpreter._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
            bound = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in bound.items()}
            grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
            BUILDER.set_grid_dim(*grid)
            indices = itertools.product(*map(range, grid))
            scheduler.run([(index, lambda: self.fn(**bound)) for index in indices])
        finally:
            scope.restore()
        self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    return call


def _pausing(scheduler: Scheduler, method, event: str):
    atomic = event == "atomic"

    def call(*args):
        # The last argument of a load says whether it is volatile, the first of an atomic what it does.
        if event != "poll" or args[-1]:
            scheduler.pause(str(args[0].name).lower() if atomic and hasattr(args[0], "name") else event)
        result = method(*args)
        if atomic:
            scheduler.pause("after")
        return result

    return call


@contextlib.contextmanager
def ordered_dots() -> Iterator[None]:
    """Dots that sum over the depth in one order for every element, as a matrix unit does.

    The BLAS behind NumPy does not: which of its inner loops an element is in depends on its place.
    """

    def dot(a, b, d, *rest):
        left, right, acc = (np.asarray(handle.data) for handle in (a, b, d))
        acc = acc.copy()
        for k in range(left.shape[-1]):
            acc += left[..., :, k, None].astype(acc.dtype) * right[..., k, None, :].astype(acc.dtype)
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    create_dot = BUILDER.create_dot
    BUILDER.create_dot = dot
    try:
        yield
    finally:
        BUILDER.create_dot = create_dot


@contextlib.contextmanager
def cooperative(seed: int, patience: int = PATIENCE) -> Iterator[Scheduler]:
    """Within the block, launches run under a scheduler with this seed."""
    scheduler = Scheduler(seed, patience)
    saved_call = interpreter.GridExecutor.__call__
    pauses = {
        "create_load": "poll",
        "create_masked_load": "poll",
        "create_store": "store",
        "create_masked_store": "store",
        "create_atomic_rmw": "atomic",
        "create_atomic_cas": "atomic",
    }
    interpreter.GridExecutor.__call__ = _run_cooperatively(scheduler)
    for name, event in pauses.items():
        setattr(BUILDER, name, _pausing(scheduler, getattr(BUILDER, name), event))
    try:
        yield scheduler
    finally:
        interpreter.GridExecutor.__call__ = saved_call
        for name in pauses:
            delattr(BUILDER, name)


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair_bf16() -> None:
    """Install the two corrections for the rest of the process."""
    create_dot, cast_impl = BUILDER.create_dot, BUILDER.cast_impl

    def dot(a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(_bf16_to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return create_dot(a, b, d, *rest)

    def cast(src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast_impl(src, dst_type)

    BUILDER.create_dot = dot
    BUILDER.cast_impl = cast


def patch_language_once() -> None:
    """Patch triton.language once per launch and module, not at every call of a device function; and so on.

    Triton's own way is most of the interpreter's time in kernels built from small functions.
    """
    launch = interpreter.GridExecutor.__call__

    def call_executor(self, *args, **kwargs):
        PATCHED.clear()
        return launch(self, *args, **kwargs)

    def call_function(self, *args, **kwargs):
        if id(self.fn.__globals__) not in PATCHED:
            PATCHED.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = call_executor
    interpreter.InterpretedFunction.__call__ = call_function
    # Arguments are on the CPU, so what a kernel wrote is there: Triton copies every storage onto itself.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    # It builds a table of all types at every call, and is called for every tile.
    plain = interpreter._get_np_dtype
    of_type = functools.cache(plain)

    def np_dtype(dtype):
        dtype = dtype.element_ty if dtype.is_block() else dtype
        return plain(dtype) if dtype.is_ptr() else of_type(dtype)

    interpreter._get_np_dtype = np_dtype
