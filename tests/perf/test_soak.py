"""The soak, as far as it runs without a GPU: what it launches gives the same bits under any schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch

from lstm_triton.testing.interpreter import cooperative


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [8, 16])
def test_what_the_soak_runs_gives_the_same_bits_under_any_schedule(
    rows: int, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("HIDDEN", 64), ("BATCH", 4), ("STEPS", 3)):
        monkeypatch.setattr(soak, name, size)
    call = soak.recurrences("mailbox", rows, norm, 0, "cpu")
    results = []
    for schedule in range(2):
        with cooperative(schedule):
            results.append(call())
    assert all(torch.isfinite(one).all() for one in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_soak_says_so() -> None:
    done = subprocess.run([sys.executable, str(Path(soak.__file__))], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "this script measures on a CUDA device, and there is none"
