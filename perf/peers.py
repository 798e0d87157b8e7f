"""Third-party LSTMs, called as they are: imported only where installed, and checked like everything else.

flashrnn (1.0.8 read): its fused CUDA kernel, which it compiles at its first call. torchrl (0.14.1 read): the Triton
recurrence behind its LSTMModule. Both do one layer in one direction.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F


class Unsupported(Exception):
    """Why a provider has no result for a shape; it becomes the row's error."""


class Peer(nn.Module):
    """The weights of a one-layer nn.LSTM in some type."""

    package = ""

    def __init__(self, base: nn.LSTM, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        if importlib.util.find_spec(self.package) is None:
            raise Unsupported(f"{self.package} is not installed")
        if not base.weight_ih_l0.is_cuda:
            raise Unsupported("needs a CUDA device")
        if shape.layers > 1 or shape.directions > 1:
            raise Unsupported("one layer in one direction")
        for name, parameter in base.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().to(dtype)))


class FlashRNN(Peer):
    """Its kernel adds the recurrent part and the bias to a projected input [B, T, 4, heads, H]: one head is an LSTM."""

    package = "flashrnn"

    def __init__(self, base: nn.LSTM, shape: Shape) -> None:
        super().__init__(base, shape, getattr(torch, shape.torch_dtype))
        module = importlib.import_module("flashrnn.flashrnn.flashrnn")
        # Its own query is a C++ extension that CUDA 13 does not compile; these are all the keys it reads.
        module.get_gpu_info = _gpu_info

    def forward(self, x: Tensor) -> Tensor:
        from flashrnn import flashrnn

        (seq_len, batch, inputs), hidden = x.shape, self.weight_hh_l0.shape[1]
        # The order of gates and units that its kernel wants: the projection writes it, nothing is transposed after.
        weight = self.weight_ih_l0.view(4, hidden, inputs).transpose(0, 1).reshape(4 * hidden, inputs)
        projected = F.linear(x, weight).view(seq_len, batch, 1, hidden, 4).permute(1, 0, 4, 2, 3)
        recurrent = self.weight_hh_l0.view(4, 1, hidden, hidden)
        bias = (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, hidden)
        dtype = str(x.dtype).removeprefix("torch.")
        states, _ = flashrnn(projected, recurrent, bias, function="lstm", backend="cuda_fused", dtype=dtype)
        return states[0, :, :, 0].transpose(0, 1)


def _gpu_info(device_id: int) -> dict[str, int]:
    properties = torch.cuda.get_device_properties(device_id)
    return {
        "maxThreadsPerBlock": 1024,
        "regsPerMultiprocessor": properties.regs_per_multiprocessor,
        "multiProcessorCount": properties.multi_processor_count,
        "sharedMemPerBlockOptin": properties.shared_memory_per_block_optin,
    }


class TorchRL(Peer):
    """Its recurrence takes the raw input, reset marks and a reset state for every step: here none and zeros.

    Weights and states are float32; in bfloat16 only its products are.
    """

    package = "torchrl"

    def __init__(self, base: nn.LSTM, shape: Shape) -> None:
        if shape.torch_dtype == "float16":
            raise Unsupported("computes in float32 or bfloat16")
        if shape.hidden_size >= 512:
            raise Unsupported("from H = 512 on its backward takes many minutes to compile")
        super().__init__(base, shape, torch.float32)
        device = base.weight_ih_l0.device
        sizes = (shape.batch, shape.seq_len)
        self.zeros = torch.zeros(*sizes, shape.hidden_size, device=device)
        self.marks = torch.zeros(*sizes, device=device, dtype=torch.bool)
        self.options = {"compute_dtype": getattr(torch, shape.torch_dtype), "input_precision": shape.precision}

    def forward(self, x: Tensor) -> Tensor:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        seq_len = x.shape[0]
        zeros, marks = self.zeros[:, :seq_len], self.marks[:, :seq_len]
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        out, *_ = lstm_triton(x.float().transpose(0, 1), zeros, zeros, *weights, marks, **self.options)
        return out.transpose(0, 1)
