"""PyTorch's own test samples for nn.LSTM and nn.LSTMCell, run on ours.

`torch.testing._internal.common_modules` ships in the wheel; its samples compare batched with
unbatched runs, and its error inputs name the exception and its message.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal import common_modules

from lstm_triton import LSTM, LSTMCell

OURS = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in OURS}


def samples(theirs: type, dtype: torch.dtype, training: bool) -> list:
    info = INFOS[theirs]
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert found
    return found


def build(theirs: type, sample, backend: str, dtype: torch.dtype, training: bool) -> tuple[nn.Module, nn.Module]:
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    pair = theirs(*arguments, **options), OURS[theirs](*arguments, **options, backend=backend)
    for module in pair:
        module.to(dtype).train(training)
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def assert_same_gradients(theirs: nn.Module, ours: nn.Module, arguments: tuple, options: dict) -> None:
    """Through all outputs at once, to every input and parameter."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((arguments, options)) if leaf.requires_grad]
    assert leaves
    grads = []
    for module in (theirs, ours):
        outputs = torch.utils._pytree.tree_leaves(module(*arguments, **options))
        total = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        grads.append(torch.autograd.grad(total, [*leaves, *module.parameters()]))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
def test_samples(theirs: type, backend: str, training: bool) -> None:
    """Forward, PyTorch's reference for the sample, and the gradients of inputs and parameters: PyTorch's path by
    gradcheck, the kernels (whose operators have their own) against nn.LSTM's, where gradcheck takes minutes."""
    ran = 0
    for sample in samples(theirs, torch.float64, training):
        reference, module = build(theirs, sample, backend, torch.float64, training)
        arguments, options = sample.forward_input.args, sample.forward_input.kwargs
        outputs = module(*arguments, **options)
        torch.testing.assert_close(outputs, reference(*arguments, **options))
        if sample.reference_fn is not None:
            torch.testing.assert_close(outputs, sample.reference_fn(module, *arguments, **options))
        if backend == "triton":
            assert_same_gradients(reference, module, arguments, options)
            ran += 1
            continue
        names, parameters = zip(*module.named_parameters())

        def call(*leaves, module=module, arguments=arguments, options=options, names=names):
            values, inputs = leaves[: len(names)], leaves[len(names) :]
            given = (inputs[0], (inputs[1], inputs[2])) if len(inputs) == 3 else inputs
            del arguments
            out = torch.func.functional_call(module, dict(zip(names, values)), given, options)
            return torch.utils._pytree.tree_leaves(out)

        leaves = torch.utils._pytree.tree_leaves(arguments)
        assert torch.autograd.gradcheck(call, (*parameters, *leaves), fast_mode=True)
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
def test_error_inputs(theirs: type, backend: str) -> None:
    info = INFOS[theirs]
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    ran = 0
    for error in found:
        sample = error.module_error_input
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[theirs](*arguments, **options, backend=backend)
        else:
            module = OURS[theirs](*arguments, **options, backend=backend)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
        ran += 1
    assert ran >= 4
