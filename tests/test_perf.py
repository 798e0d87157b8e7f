"""The measuring scripts, as far as they run without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import cooperative

PERF = Path(__file__).parents[1] / "perf"
sys.path.insert(0, str(PERF))


@pytest.mark.parametrize("protocol", ["flags", "mailbox"])
def test_the_floor_kernel_exchanges_every_tile(protocol: str) -> None:
    import floor

    with cooperative(2):
        sums = floor.run(4, 5, protocol, "cpu")
    assert torch.equal(sums, torch.full((4,), floor.expected_sum(4, 5)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("script", ["floor.py", "first_table.py", "soak.py"])
def test_without_a_gpu_they_say_so(script: str, tmp_path: Path) -> None:
    out = [] if script == "soak.py" else ["--out", str(tmp_path / "rows.csv")]
    done = subprocess.run([sys.executable, str(PERF / script), *out], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "this script measures on a CUDA device, and there is none"
    assert not any(tmp_path.iterdir())
