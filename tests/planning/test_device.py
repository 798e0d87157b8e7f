"""The one place that asks what a tensor is on, and what becomes of a driver that does not start."""

from __future__ import annotations

import ast
import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

import lstm_triton
from lstm_triton import LSTM
from lstm_triton.commands import doctor
from lstm_triton.planning import device, route
from lstm_triton.planning.planner import NoPlan

PACKAGE = Path(lstm_triton.__file__).parent
KERNELS = Path(lstm_triton.kernels.__path__[0])
# Where CUDA is named: the place that asks, clocks and reports of GPUs, and the driver's version.
NAMED = {"commands/doctor.py", "layer/first_use.py", "planning/device.py", "tuning/clock.py"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in (PACKAGE, KERNELS):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            if not name.startswith(("recipes/", "kernels/")):
                yield name, ast.parse(path.read_text())


def test_nobody_else_asks_for_cuda() -> None:
    """Then tests can put something in a GPU's place, and no branch is left that only a GPU reaches."""
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            asks = isinstance(node, ast.Attribute) and node.attr == "is_cuda"
            named = isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda.")
            constants = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            compared = any(isinstance(one, ast.Constant) and one.value == "cuda" for one in constants)
            if asks or named or compared:
                found.add(name)
    assert found - {"cell.py", "alarm.py"} == NAMED  # tl.target_info.is_cuda(); pinned memory, for which CUDA is needed


@pytest.fixture
def gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch sees an H100, Triton finds no compiler for its own part of the driver."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(route, "is_interpreted", lambda kernel: False)

    class Absent:
        @property
        def utils(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(triton.runtime.driver, "_active", Absent())
    device._device_of.cache_clear()
    yield
    device._device_of.cache_clear()


def test_a_driver_that_does_not_start_is_a_reason(gpu_without_a_driver: None, caplog: pytest.LogCaptureFixture) -> None:
    reason = "Triton's driver does not start: RuntimeError: Failed to find C compiler"
    request = ("cuda", 0, "float32", "tf32", 64, 1)
    assert reason in route.possible_refusal(route.Request("auto", *request))
    assert reason in str(route.kernel_device(torch.device("cuda")))
    with caplog.at_level(logging.INFO, "lstm_triton"):
        assert reason in route.kernel_refusal("auto", *request)
    assert [message for message in caplog.messages if reason in message]
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        route.kernel_refusal("triton", *request)
    assert any(reason in line for line in doctor.report().splitlines())


def test_strict_says_so_too(gpu_without_a_driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        route.kernel_refusal("auto", "cuda", 0, "float32", "tf32", 64, 1)


def test_whoever_asks_for_pytorch_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "kernel_device", None)  # would raise
    assert (
        route.possible_refusal(route.Request("torch", "cuda", 0, "float32", "", 64, 1)) == 'backend="torch" asks for it'
    )
    assert "are on cpu" in route.possible_refusal(route.Request("auto", "cpu", None, "float32", "", 64, 1))
    module = LSTM(3, 4, backend="torch")
    assert "asks for it" in module.refusal(torch.empty(1, 1, 3))
    module.flatten_parameters()


@pytest.mark.parametrize("answer", [0, 1])
def test_a_device_is_asked_whether_it_can(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attribute(found, which, index) -> int:
        asked.append((which, index))
        found._obj.value = answer
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDeviceGetAttribute=attribute))
    assert device._is_cooperative(3) == bool(answer)
    assert asked == [(95, 3)]


def test_a_device_that_cannot_be_asked_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert device._is_cooperative(0)


def test_a_device_that_has_refused_plans_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_refused", set())
    here, other = torch.device("cuda", 0), torch.device("cuda", 1)
    found = device.KNOWN["sm_90"]
    device.plan_without_waiting(here)
    assert not device._limited(found, here).cooperative
    assert device._limited(found, other).cooperative
    monkeypatch.setenv("LSTM_TRITON_COOPERATIVE", "0")
    assert not device._limited(found, other).cooperative


def test_what_is_being_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the stream of the tensors' device, which need not be the current one."""
    entered = []

    class Guard:
        def __init__(self, where) -> None:
            self.where = where

        def __enter__(self) -> None:
            entered.append(self.where)

        def __exit__(self, *_) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not device.is_capturing(torch.device("cpu"))
    assert device.is_capturing(torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1), None]


def test_misspelt_variables_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LSTM_TRITON_STRCIT", "1")
    monkeypatch.setenv("LSTM_TRITON_LIMITS", "off")  # read by a script
    route._warn_of_misspelt_variables.cache_clear()
    for _ in range(2):
        route.possible_refusal(route.Request("triton", "cpu", None, "float32", "", 64, 1))
    route._warn_of_misspelt_variables.cache_clear()
    assert [text for text in caplog.messages if "STRCIT" in text and "doctor" in text] == caplog.messages
    assert len(caplog.messages) == 1
    assert "LSTM_TRITON_STRCIT" in doctor.report()


def test_no_device_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    assert not device.on_gpu(torch.device("cpu"))
    assert not device.on_gpu(torch.device("meta"))
    assert device.on_gpu(torch.device("cuda", 1))
    assert device.gpu_here() is None or torch.cuda.is_available()
    assert isinstance(route.kernel_device(torch.device("meta")), NoPlan)
