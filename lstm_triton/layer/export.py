"""Exported programs without our operators: for exporters and runtimes that know nothing of Triton.

    program = torch.export.export(model, (x,), dynamic_shapes=...)
    program = program.run_decompositions(lstm_triton.decompositions())

Without `decompositions` the program holds our operators, and runs wherever `lstm_triton` is imported: by the kernels
where there are some for its tensors, else in plain PyTorch. With them every `lstm_triton::layer` becomes one `scan`
over its steps, with every feature, any T and any B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import layer as reference
from . import op as op  # registers the operators
from .fallback import by_steps
from .records import Choices, Inputs, LayerResult, read


def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's default table for `ExportedProgram.run_decompositions`, and ours on top."""
    table = torch.export.default_decompositions()
    table[torch.ops.lstm_triton.layer.default] = _layer
    return table


def _layer(*arguments: Any) -> tuple[Tensor, ...]:
    v, choices = read(arguments, Inputs, Choices)
    options = choices.options()
    if options.batch_invariant:
        raise RuntimeError("batch_invariant has no decomposition: no other GEMM promises it")
    from torch._higher_order_ops.scan import scan

    loop = scan if options.layout(v.x).seq_len != 1 else reference._loop
    # Numbers of the cell are constants: TorchDynamo would make inputs of those that differ from an earlier program's.
    with torch._dynamo.config.patch(specialize_float=True, automatic_dynamic_shapes=False):
        return by_steps(v, options, loop)


def layer_for_onnx(v: Inputs, choices: Choices) -> LayerResult:
    """The same at once: `torch.onnx.export` knows no operator of ours, and asks nobody for decompositions."""
    # Without a gradient, of which a `scan` would make a program of its own.
    given = (None if tensor is None else tensor.detach() for tensor in v)
    return LayerResult(*_layer(*given, *choices)[:5])
