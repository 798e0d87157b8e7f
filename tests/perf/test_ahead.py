"""Kernels compiled ahead are those that are launched: nothing is compiled once more, by Triton's own cache on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ahead
import launches
import pytest
import torch
from host_overhead import without_launches

from lstm_triton import LSTM
from lstm_triton.kernels import launch
from lstm_triton.kernels.backward import lstm_backward_kernel
from lstm_triton.kernels.forward import lstm_forward_kernel
from lstm_triton.planning.device import KNOWN

pytestmark = pytest.mark.aot
ARCH, CPU = "sm_90", torch.device("cpu")


class Cache:
    """Triton's, on disk alone: what this process has compiled is forgotten at every count."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch

    def count(self) -> int:
        self.patch.setattr(launch, "_binaries", {})
        for kernel in (lstm_forward_kernel, lstm_backward_kernel):
            self.patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        return len(list(self.folder.glob("*/lstm_*_kernel.cubin")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = Cache(tmp_path, monkeypatch)
    assert found.count() == 0
    return found


def inputs(state: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    h, c = (torch.randn(1, 5, 64).bfloat16() for _ in range(2))
    return torch.randn(3, 5, 8).bfloat16(), (h, c) if state else None


@pytest.mark.parametrize("state", [False, True])
def test_forward_passes_find_what_is_compiled_ahead(state: bool, cache: Cache) -> None:
    """Training and inference of a module, through all of our Python but the launch."""
    for binary in ahead.of_call(KNOWN[ARCH], 64, 5, "bfloat16", state=state, modes=("training", "inference")):
        if binary.which == "forward":
            ahead.compile_binary(binary, ARCH)
    assert cache.count() == 2
    module = LSTM(8, 64, backend="triton").bfloat16()
    x, hx = inputs(state)
    with without_launches(ARCH):
        module(x, hx)
        with torch.no_grad():
            module(x, hx)
        assert cache.count() == 2
        LSTM(8, 80, backend="triton").bfloat16()(x)  # else nothing would be seen
        assert cache.count() == 3


@pytest.mark.parametrize("state", [False, True])
def test_backward_passes_find_what_is_compiled_ahead(state: bool, cache: Cache) -> None:
    for binary in ahead.of_call(KNOWN[ARCH], 64, 5, "bfloat16", state=state):
        ahead.compile_binary(binary, ARCH)
    assert cache.count() == 2
    module = LSTM(8, 64, backend="triton").bfloat16()
    with without_launches(ARCH):
        out, (h_n, c_n) = module(*inputs(state))
        (out.sum() + (h_n + c_n).sum() if state else out.sum()).backward()
    assert cache.count() == 2


def test_the_launches_of_the_doctor_find_theirs(cache: Cache) -> None:
    (case, *_) = launches.cases(KNOWN[ARCH])
    for binary in ahead.of_doctor(KNOWN[ARCH]):
        if binary.config in case.configs.values() and binary.dtype == case.dtype:
            ahead.compile_binary(binary, ARCH)
    assert cache.count() == 2
    with without_launches(ARCH):
        assert "wrong" in launches.complaint(case, CPU), "nothing was launched"
    assert cache.count() == 2


@pytest.mark.parametrize("arch", ahead.NVIDIA)
def test_what_the_stages_launch(arch: str) -> None:
    """On every target; each binary once, and what the doctor launches is not all of it."""
    doctor, first = (ahead.binaries([stage], KNOWN[arch]) for stage in ahead.STAGES)
    assert len(doctor) == 10
    assert len(first) > 150
    both = ahead.binaries(list(ahead.STAGES), KNOWN[arch])
    assert len(both) == len(set(doctor) | set(first))
    kinds = {(binary.config.placement, binary.config.protocol, binary.which) for binary in both}
    assert len(kinds) == 8, "local, stepwise and two protocols of the grid, each in both passes"


def test_the_command(cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In a process of its own each: one that compiles, and one that cannot be."""
    good, *_ = ahead.of_call(KNOWN[ARCH], 16, 5, "bfloat16")
    bad = ahead.replace(good, dtype="nonsense")
    monkeypatch.setattr(ahead, "binaries", lambda stages, device: [good, bad])
    assert ahead.main(["--arch", ARCH, "--workers", "1"]) == 1
    head, failure, total = capsys.readouterr().out.splitlines()
    assert head.startswith("2 kernels for H100 (sm_90)")
    assert failure.startswith("FAILED: Binary(which='forward'")
    assert "nonsense" in failure
    assert total == f"1 of 2 kernels are in {cache.folder}"
    assert cache.count() == 1


def test_wrong_arguments(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--arch", "gfx942"], ["--workers", "0"], ["--stage", "tests"]):
        with pytest.raises(SystemExit) as ended:
            ahead.main(arguments)
        assert ended.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_a_target_must_be_named(capsys: pytest.CaptureFixture) -> None:
    assert ahead.main([]) == 2
    assert "--arch says for which one" in capsys.readouterr().err
