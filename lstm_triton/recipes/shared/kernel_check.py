"""How far our kernels are from nn.LSTM on a given batch: on the GPU, or in Triton's interpreter.

Without a GPU the kernels run in a process of their own, because Triton decides when a kernel is
defined whether it is interpreted: `python -m lstm_triton.recipes.shared.kernel_check FILE` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.lstm import LSTM

QUANTITIES = ("output", "h_n", "c_n", "input gradient", "weight gradient")


def largest_differences(module: LSTM, x: Tensor) -> tuple[str, dict[str, float]]:
    """Where the kernels ran, and the largest absolute difference of each quantity from nn.LSTM.

    x [T, B, input_size]; the weights are the module's, without dropout.
    """
    if x.is_cuda:
        return torch.cuda.get_device_name(x.device), _differences(*_modules(module), x)
    sizes = dict(num_layers=module.num_layers, bias=module.bias, bidirectional=module.bidirectional)
    problem = {
        "arguments": (module.input_size, module.hidden_size),
        "options": sizes,
        "state": module.state_dict(),
        "x": x.detach().cpu(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "problem.pt")
        torch.save(problem, path)
        done = subprocess.run(
            [sys.executable, "-m", "lstm_triton.recipes.shared.kernel_check", str(path)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"the kernels failed in Triton's interpreter:\n{done.stderr}")
    return "Triton's interpreter (no GPU here)", json.loads(done.stdout)


def _modules(module: LSTM) -> tuple[LSTM, nn.LSTM]:
    """Ours on the kernels and PyTorch's, with the same weights and no dropout."""
    arguments = (
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        False,
        0.0,
        module.bidirectional,
    )
    pair = LSTM(*arguments, backend="triton", precision="ieee"), nn.LSTM(*arguments)
    for other in pair:
        other.load_state_dict(module.state_dict())
        other.to(module.weight_hh_l0.device, module.weight_hh_l0.dtype)  # type: ignore[arg-type]
    return pair


def _differences(ours: LSTM, theirs: nn.LSTM, x: Tensor) -> dict[str, float]:
    results = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for module in (ours, theirs):
            leaf = x.detach().clone().requires_grad_()
            output, (h_n, c_n) = module(leaf)
            (output.square().sum() + h_n.sum() + c_n.sum()).backward()
            weights = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])  # type: ignore[union-attr]
            results.append((output, h_n, c_n, leaf.grad, weights))
    return {name: float((a - b).abs().max()) for name, a, b in zip(QUANTITIES, *results)}


def main(path: str) -> None:
    problem: dict[str, Any] = torch.load(path, weights_only=True)
    module = LSTM(*problem["arguments"], **problem["options"])
    module.load_state_dict(problem["state"])
    print(json.dumps(_differences(*_modules(module), problem["x"])))


if __name__ == "__main__":
    main(sys.argv[1])
