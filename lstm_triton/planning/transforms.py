"""What surrounds a call: torch.func's transforms, autocast, exporting, a compiler that traces."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad


def _transforms() -> set[str]:
    """The kinds of torch.func transforms and of forward-mode levels that are active: "vmap", "grad", "jvp", ..."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kinds = {level.key().name.lower() for level in levels}
    return kinds | {"jvp"} if forward_ad._current_level >= 0 else kinds


def refused_transform() -> str:
    """The kernels have vmap and first derivatives in reverse mode: what else is asked of them, if anything."""
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return ""
    kinds = _transforms()
    if "jvp" in kinds:
        return "forward-mode differentiation is active, and the kernels have no forward-mode derivative"
    if kinds - {"vmap", "functionalize"}:
        return "torch.func.grad is active, and the kernels' derivatives are torch.autograd's"
    return ""


def transformed() -> bool:
    """Whether a torch.func transform or forward mode is active."""
    return bool(_transforms())


def grads_are_batched() -> bool:
    """Whether is_grads_batched=True, or jacobian(vectorize=True), is going back: by a vmap that is not torch.func's."""
    return _has_vmap_mode(torch._C._dispatch_tls_local_include_set().raw_repr())


@cache
def _has_vmap_mode(keys: int) -> bool:
    """Of the dispatch keys that are included now: to look one up by its name takes long."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def needs_gradient(tensor: Tensor) -> bool:
    """requires_grad, also of what vmap maps over."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def aten_can() -> bool:
    """Whether PyTorch's own LSTM goes with the active transforms: it has neither vmap nor forward mode on all paths."""
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return True
    return not _transforms() & {"vmap", "jvp"}


def exporting() -> bool:
    """`torch.compiler.is_exporting`, which TorchDynamo of PyTorch 2.11 takes for true wherever it traces."""
    return torch.compiler.is_exporting()


exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
aten_can._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `kernel_refusal`
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # which PyTorch 2.11 does not trace


def autocast_is_on(device_type: str) -> bool:
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """What has been cast stays as it is: some operators, such as layer_norm on CUDA, would be cast once more."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else contextlib.nullcontext()


def rnns_are_traced() -> bool:
    """Whether TorchDynamo has been told to trace nn.LSTM, by `torch._dynamo.config.allow_rnn`."""
    return bool(torch._dynamo.config.allow_rnn)


rnns_are_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_by_fx(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """The call as one node of the graph that torch.fx is tracing, as a call of nn.LSTM is; None if none is traced."""
    tracer: Any = next((value.tracer for value in arguments if isinstance(value, fx.Proxy)), None)
    if tracer is None:
        return None
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)


def untraced(function: Any, *arguments: Any) -> Any:
    """Call a function outside the graph that TorchDynamo is tracing: the graph breaks here.

    Dynamo breaks at every nn.LSTM of its own accord. Here it does where tracing would fail
    (training by oneDNN in PyTorch 2.13, the packing of sequences) or unroll cuDNN's loop.
    """
    return torch.compiler.disable(function)(*arguments)


untraced._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets, without its import
