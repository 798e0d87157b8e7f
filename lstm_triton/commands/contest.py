"""Our layers against nn.LSTM on this GPU: where it is the faster one, `backend="auto"` takes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..modules.lstm import LSTM
from ..planning.cudnn import Call, algorithm
from ..planning.device import Device
from ..planning.route import bout_of
from ..planning.table import Bout, Contest
from ..tuning.clock import Times, times_of

STEPS = 128
REPEAT = 15


def calls_of(hidden_size: int, batch: int, directions: int, dtype: str, device: Device) -> list[Call]:
    """A layer of this size; and two, where one alone gets an algorithm of cuDNN that a stack does not."""
    calls = [Call(hidden_size, hidden_size, batch, layers, directions, dtype) for layers in (1, 2)]
    algorithms = [[algorithm(call, device, which).name for which in ("forward", "backward")] for call in calls]
    return calls[:1] if algorithms[0] == algorithms[1] else calls


def hold(call: Call, precision: str, device: Device, where: torch.device) -> Iterator[tuple[Bout, Contest]]:
    """Time the same call on both, for both modes, over one step and over a long sequence."""
    dtype = getattr(torch, call.dtype)
    arguments = (call.input_size, call.hidden_size, call.num_layers)
    options = {"bidirectional": call.directions == 2, "device": where, "dtype": dtype}
    theirs = nn.LSTM(*arguments, **options)
    ours = LSTM(*arguments, backend="triton", precision=precision, **options)
    ours.load_state_dict(theirs.state_dict())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
        for seq_len in (1, STEPS):
            x = torch.randn(seq_len, call.batch, call.input_size, device=where, dtype=dtype)
            for training in (False, True):
                our_times, their_times = (_times(module, x, training) for module in (ours, theirs))
                bout = bout_of(call, precision, training, seq_len == 1, device)
                bounds = our_times.host_bound, their_times.host_bound
                yield bout, Contest(our_times.median, their_times.median, *bounds)


def _times(module: nn.Module, x: torch.Tensor, training: bool) -> Times:
    module.train(training)
    x = x.clone().requires_grad_(training)
    cotangent = torch.ones((), device=x.device, dtype=x.dtype)

    def clear() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None

    def infer() -> None:
        with torch.no_grad():
            module(x)

    def train() -> None:
        output, _ = module(x)
        output.backward(cotangent.expand_as(output))

    return times_of(train if training else infer, x.device, REPEAT, clear)
