"""Which path each layer of an LSTM takes on an input, with which configs, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .module import LSTM, LSTMCell
from .planner import PASSES, NoPlan, Plan, Problem, plan
from .routing import compute_dtype, kernel_device, resolve_precision


@dataclass(frozen=True)
class LayerPath:
    """path is "triton" or "torch"; plans holds one `Plan` per pass on the Triton path."""

    layer: int
    path: str
    reason: str
    plans: tuple[Plan, ...] = ()

    def __str__(self) -> str:
        lines = [f"layer {self.layer}: {self.path} ({self.reason})"]
        for which, chosen in zip(PASSES, self.plans):
            lines.append(f"  {which}: {chosen.config.encode()} ({chosen.source})")
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
    layers = module.num_layers if isinstance(module, LSTM) else 1
    reason = module.refusal(data)
    if reason:
        return Explanation(tuple(LayerPath(layer, "torch", reason) for layer in range(layers)))
    device = kernel_device(data.device)
    assert not isinstance(device, NoPlan)
    weight = module.weight_hh_l0 if isinstance(module, LSTM) else module.weight_hh
    dtype = compute_dtype(data.device.type, weight.dtype)  # type: ignore[arg-type]
    plans = []
    for which in PASSES:
        precision = resolve_precision(module.precision or "")
        problem = Problem(which, module.hidden_size, _batch(module, input), _directions(module), dtype, precision)
        chosen = plan(problem, device)
        assert isinstance(chosen, Plan)
        plans.append(chosen)
    why = f"a plan exists for {dtype} on {device.name}"
    return Explanation(tuple(LayerPath(layer, "triton", why, tuple(plans)) for layer in range(layers)))


def _directions(module: LSTM | LSTMCell) -> int:
    return 2 if isinstance(module, LSTM) and module.bidirectional else 1


def _batch(module: LSTM | LSTMCell, input: Tensor | PackedSequence) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return 1
    return input.shape[0] if module.batch_first else input.shape[1]
