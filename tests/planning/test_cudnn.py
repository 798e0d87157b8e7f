"""What PyTorch asks cuDNN for, case by case of `get_algo`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lstm_triton.planning.cudnn import ALGORITHMS, Call, algorithm
from lstm_triton.planning.device import KNOWN, Device

HOME = Call(input_size=256, hidden_size=1024, batch=64, num_layers=1, directions=1, dtype="float16")
H100 = KNOWN["sm_90"]


def test_home() -> None:
    assert [algorithm(HOME, H100, which).name for which in ("forward", "backward")] == ["persistent", "persistent"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="bfloat16"), "cuDNN has no persistent kernel for bfloat16"),
        (dict(dtype="float32"), "float32, not float16"),
        (dict(num_layers=2), "more than one layer"),
        (dict(directions=2), "two directions"),
        (dict(hidden_size=1152), "H > 1024"),
        (dict(hidden_size=650), "H is no multiple of 128"),
        (dict(input_size=80), "the input size is no multiple of 128"),
        (dict(batch=63), "B is no multiple of 8"),
        (dict(batch=136), "B > 128"),
        (dict(proj_size=64), "projections"),
        (dict(packed=True), "a packed input"),
    ],
)
def test_open_water(change: dict, reason: str) -> None:
    for which in ("forward", "backward"):
        found = algorithm(replace(HOME, **change), H100, which)
        assert (found.name, found.reason) == ("standard", reason)


@pytest.mark.parametrize(
    ("hidden_size", "forward", "backward"),
    [
        (64, "persistent-small", "persistent-small"),
        (128, "persistent-small", "persistent-small"),
        (129, "persistent-small", "standard"),
        (192, "persistent-small", "standard"),
        (193, "standard", "standard"),
        (256, "persistent", "persistent"),
    ],
)
def test_small(hidden_size: int, forward: str, backward: str) -> None:
    call = replace(HOME, hidden_size=hidden_size)
    assert algorithm(call, H100, "forward").name == forward
    assert algorithm(call, H100, "backward").name == backward
    assert {forward, backward} <= set(ALGORITHMS)


def test_small_in_float16_and_float32() -> None:
    call = replace(HOME, hidden_size=64, num_layers=3, directions=2)
    for dtype in ("float16", "float32"):
        assert algorithm(replace(call, dtype=dtype), H100, "backward").name == "persistent-small"
    for dtype in ("bfloat16", "float64"):
        assert algorithm(replace(call, dtype=dtype), H100, "forward").name == "standard"


def test_gpus_without_the_persistent_kernel() -> None:
    assert algorithm(HOME, KNOWN["sm_80"], "forward").name == "persistent"
    assert algorithm(HOME, KNOWN["sm_86"], "forward").reason == "sm_86 is excluded"
    part = Device("A100 MIG", "sm_80", 42, 163 * 1024)
    assert algorithm(HOME, part, "forward").reason == "42 multiprocessors, fewer than 98"
