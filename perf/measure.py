"""One provider on one shape: checked, then timed in every mode."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from check import Truth
from floor import precise
from providers import PROVIDERS, Unsupported
from shapes import Shape

from lstm_triton.tuning.clock import Times, times_of

WARM_UP = 3


class Measurement:
    """One provider on one shape."""

    def __init__(self, truth: Truth, provider: str, repeat: int) -> None:
        self.shape, self.device, self.repeat = truth.shape, truth.device, repeat
        self.x = truth.x
        self.module = PROVIDERS[provider](truth.base, truth.shape)
        complaint = truth.complaint(self.module)
        if complaint:
            raise Unsupported(complaint)
        precise(self.shape.dtype)
        with torch.no_grad():
            self.cotangent = torch.ones_like(self.module(self.x))

    def metrics(self, mode: str) -> Iterator[tuple[str, Times]]:
        """(metric, times) of a mode; values of "memory" are MiB, each measured once."""
        self.module.train(mode not in ("forward", "step"))
        if mode == "memory":
            yield "saved_mib", once(self._saved())
            if self.device.type == "cuda":
                yield "peak_mib", once(self._peak())
        elif mode == "train":
            yield "ms", self._times(self._train, self.device, self._clear)
        elif mode == "step":
            yield "ms", self._times(self._one_step, torch.device("cpu"))
        else:
            yield "ms", self._times(self._infer, self.device)

    def _times(
        self, call: Callable[[], None], device: torch.device, prepare: Callable[[], None] = lambda: None
    ) -> Times:
        return times_of(call, device, self.repeat, prepare, warm_up=WARM_UP)

    def _infer(self) -> None:
        with torch.no_grad():
            self.module(self.x)

    def _one_step(self) -> None:
        """On the host's clock, until the result is there: what a rollout waits for."""
        with torch.no_grad():
            self.module(self.x[:1])
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.x = self.x.detach().requires_grad_()

    def _train(self) -> None:
        self.module(self.x).backward(self.cotangent)

    def _peak(self) -> float:
        """MiB of device memory that a training step takes at most, beyond weights and input."""
        self._clear()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._train()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _saved(self) -> float:
        """MiB that autograd keeps from the forward to the backward pass, the input and the weights left out."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (self.x, *self.module.parameters())}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = self.module(self.x)
        del out
        return sum(kept.values()) / 2**20


def once(value: float) -> Times:
    return Times(value, value, value, 1)


COLD = """
import time
start = time.perf_counter()
import sys
sys.path.insert(0, {folder!r})
import torch
from providers import PROVIDERS
from shapes import Shape
shape = {shape!r}
device = {device!r}
sizes = (shape.input_size, shape.hidden_size, shape.layers)
base = torch.nn.LSTM(*sizes, bidirectional=shape.directions == 2, device=device)
x = torch.randn(shape.seq_len, shape.batch, shape.input_size, device=device).to(getattr(torch, shape.torch_dtype))
module = PROVIDERS[{provider!r}](base, shape)
out = module(x.requires_grad_())
out.sum().backward()
float(x.grad.sum())
print(1e3 * (time.perf_counter() - start))
"""


def cold_ms(shape: Shape, provider: str, device: torch.device) -> float:
    """A new process with empty compiler caches: imports, one training step, the result read."""
    code = COLD.format(folder=str(Path(__file__).parent), shape=shape, provider=provider, device=device.type)
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **caches}
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(lines[-1])
    return float(done.stdout.split()[-1])
