"""Which path a call of an `LSTM` takes: that of the last call like it, or of nn.LSTM as it would do the call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.checks import State
from ..functional.decision import Marks, Stack, signature_of
from ..planning import cudnn
from ..planning.device import on_gpu
from ..planning.memory import Memory, memory
from ..planning.precision import resolve_precision
from ..planning.route import compute_dtype
from ..planning.transforms import aten_can, autocast_is_on


def stack_of(module: Any, batch_first: bool, return_states: Sequence[str]) -> Stack:
    """The options of a call of the module."""
    return Stack(
        module.bias, module.num_layers, module.proj_size, module.dropout, module.training, module.bidirectional,
        batch_first, return_states, module.recompute, module.batch_invariant, module.variant, module.backend,
        module.precision or "",
    )  # fmt: skip


EXPANDED = "the weights are those of torch.nn.utils' per-sample gradients, which only PyTorch's own LSTM computes"


def weights_are_expanded(module: Any) -> bool:
    """Whether `call_for_per_sample_grads` has put its ExpandedWeights in the parameters' place."""
    return any(type(tensor).__name__ == "ExpandedWeight" for tensor in module._parameters.values())


class Call(NamedTuple):
    """An eager call on a batch: what `functional.decision` makes of it, and where its path is remembered.

    memory[key]: "torch" or "kernels", the path of calls like this one.
    """

    stack: Stack
    weights: list[Tensor]
    signature: Hashable
    memory: Memory
    key: Hashable

    @classmethod
    def of(cls, module: Any, input: Any, hx: State | None, marks: Marks, return_states: Sequence[str]) -> Call | None:
        """None where every call is looked at anew: see `signature_of`; or where weights are computed when read."""
        if not isinstance(input, Tensor) or input.dim() != 3:
            return None
        state = () if hx is None else hx
        if isinstance(hx, Tensor) or [isinstance(each, Tensor) for each in state] not in ([], [True, True]):
            return None
        try:  # the parameters themselves, without the search for replaced ones that `_flat_weights` would need
            weights = [module._parameters[name] for name in module._flat_weights_names]
        except KeyError:
            return None
        stack = stack_of(module, module.batch_first, return_states)
        signature = signature_of(input, hx, weights, stack, marks)
        if signature is None:
            return None
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *state, *weights))
        return cls(stack, weights, signature, memory(), ("module", signature, trained))


def rival(module: Any, input: Tensor, hx: State | None = None) -> tuple[cudnn.Call, str, bool, int] | None:
    """The call as nn.LSTM could do it on a GPU: itself, precision, whether it is trained, T; else None.

    Of projections nothing is known. cuDNN has no backward pass in evaluation, no vmap, and its own types.
    """
    if module.backend != "auto" or not on_gpu(input.device) or input.dim() not in (2, 3) or module.proj_size:
        return None
    dropped = module.training and module.variant.weight_dropout
    if module.batch_invariant or module.recompute != "none" or dropped or not aten_can():
        return None
    if module.variant.kind(module.training) != "plain" or not _computed_alike(module, input):
        return None
    tensors: list[Any] = [input, *(hx or ()), *module._flat_weights]
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if trained and not module.training:
        return None
    sizes = (input.shape[0], 1) if input.dim() == 2 else input.shape[:2]
    seq_len, batch = sizes[::-1] if module.batch_first and input.dim() == 3 else sizes
    dtype = compute_dtype(input.device.type, module._flat_weights[0].dtype)
    directions = 2 if module.bidirectional else 1
    call = cudnn.Call(module.input_size, module.hidden_size, batch, module.num_layers, directions, dtype)
    return call, module.precision or "", trained, seq_len


def _computed_alike(module: Any, input: Tensor) -> bool:
    """Whether nn.LSTM would compute in the same type and precision, and so give results of the same kind."""
    kind = input.device.type
    if autocast_is_on(kind) and str(torch.get_autocast_dtype(kind)) != f"torch.{cudnn.UNDER_AUTOCAST}":
        return False
    of_float32 = module._flat_weights[0].dtype == torch.float32
    return not (of_float32 and module.precision) or module.precision == resolve_precision("")
