"""Which of cuDNN's algorithms nn.LSTM runs by.

PyTorch asks by the rules of `get_algo` in aten/src/ATen/native/cudnn/RNN.cpp (read at commit 00fc08a): by the type, the
sizes and the GPU, and nobody can override them. cuDNN may not grant it: for bfloat16, where PyTorch asks for the small
persistent kernel, profiles show the standard algorithm (torch 2.13 with cuDNN 9.2, a development build of 2.14 with
9.24; and 12.6 us a step of H=64 on an RTX 5090 with 9.20).
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import Device

ALGORITHMS = ("persistent", "persistent-small", "standard")


# Whatever type autocast is asked for: aten/src/ATen/cudnn/AutocastRNN.cpp casts to half; profiles of torch 2.13 agree.
UNDER_AUTOCAST = "float16"


@dataclass(frozen=True)
class Algorithm:
    """name: one of ALGORITHMS, for CUDNN_RNN_ALGO_PERSIST_STATIC, _PERSIST_STATIC_SMALL_H and _STANDARD."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True)
class Call:
    """What of a call to nn.LSTM the choice depends on. packed: the input is a PackedSequence."""

    input_size: int
    hidden_size: int
    batch: int
    num_layers: int
    directions: int
    dtype: str
    proj_size: int = 0
    packed: bool = False


def algorithm(call: Call, device: Device, which: str) -> Algorithm:
    """The algorithm of the "forward" or "backward" pass of a call on an NVIDIA GPU.

    From H = 129 to 192 the small persistent kernel of the forward pass was 2 to 6 times slower than the standard
    algorithm for 44 rows and more (data of PyTorch's pull request 62143, 2021): nn.LSTM takes it all the same.
    """
    if call.proj_size:
        return Algorithm("standard", "projections")
    if call.packed:
        return Algorithm("standard", "a packed input")
    most = 192 if which == "forward" else 128
    if call.dtype == "bfloat16":
        return Algorithm("standard", "cuDNN has no persistent kernel for bfloat16")
    if call.dtype != "float64" and call.hidden_size <= most:
        return Algorithm("persistent-small", f"H <= {most} in the {which} pass")
    against = _against_persistent(call, device)
    if against:
        return Algorithm("standard", against)
    return Algorithm("persistent", "float16, one layer, one direction, and sizes it takes")


def _against_persistent(call: Call, device: Device) -> str:
    """Why the large persistent kernel is not asked for; "" if it is."""
    capability = int(device.arch[3:]) if device.is_nvidia else 0
    checks = (
        (call.dtype != "float16", f"{call.dtype}, not float16"),
        (call.num_layers > 1, "more than one layer"),
        (call.directions > 1, "two directions"),
        (call.hidden_size > 1024, "H > 1024"),
        (call.hidden_size % 128 != 0, "H is no multiple of 128"),
        (call.input_size % 128 != 0, "the input size is no multiple of 128"),
        (call.batch % 8 != 0, "B is no multiple of 8"),
        (call.batch > 128, "B > 128"),
        (capability % 10 == 6 and capability >= 80, f"{device.arch} is excluded"),
        (device.multiprocessors < 98, f"{device.multiprocessors} multiprocessors, fewer than 98"),
    )
    return next((reason for holds, reason in checks if holds), "")
