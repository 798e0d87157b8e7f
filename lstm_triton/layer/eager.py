"""A layer without PyTorch's dispatcher: what `op.layer` computes, for a fraction of the time before the launch.

An operator of `torch.library` is for those who look at a program: compilers, exporters, vmap, dispatch modes,
subclasses of tensors, profilers. In a plain eager call there is nobody to look, and the detour takes as long as a
short sequence does on a GPU (`python perf/host_overhead.py`). Both run the same functions, with the same rule for the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..planning.memory import Memory
from ..planning.transforms import grads_are_batched
from . import op
from .records import Choices, Inputs, LayerResult, read

PLAIN_TYPES = (Tensor, nn.Parameter)


def nobody_observes() -> bool:
    """Whether nothing is active that could see an operator on any tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or grads_are_batched()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def unobserved(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing but autograd could see an operator on these tensors, or would have to make them plain for it."""
    if not nobody_observes():
        return False
    for tensor in tensors:
        # What the dispatcher would not hand to a kernel as it is.
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True


class LSTMLayer(torch.autograd.Function):
    """`op.layer` for autograd alone."""

    @staticmethod
    def forward(ctx, memory, *arguments):
        v, choices = read(arguments, Inputs, Choices)
        output = op.layer_by_kernels(v, choices.options(), memory)
        op.setup_context(ctx, arguments, output)
        ctx.memory = memory
        return output

    @staticmethod
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors  # once: checkpointing computes them when they are asked for
        run: Any = op.layer_backward
        if unobserved((*cotangents, *saved)):
            run = partial(op.compute_layer_backward, memory=ctx.memory)
        return None, *op.gradients(ctx, saved, cotangents, ctx.needs_input_grad[1:], run)


def layer(v: Inputs, choices: Choices, memory: Memory | None = None) -> LayerResult:
    """A layer that the kernels run: by the operator only where that would be noticed.

    memory: of calls with these choices and tensors of these kinds, if it is known already that nobody observes.
    """
    if memory is None and not unobserved(v):
        found = op.layer(*v, *choices)
    elif torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in v):
        found = LSTMLayer.apply(memory, *v, *choices)
    else:
        return LayerResult(*op.by_kernels(v, choices.options(), memory)[:5])
    out, h_n, c_n, gates, cells, _ = found
    return LayerResult(out, h_n, c_n, gates, cells)
