"""The stages for a GPU: wrong arguments, limits, and a rehearsal with nothing installed, on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import read_rows

ROOT = Path(__file__).parents[1]
PERF = ROOT / "perf"


@pytest.mark.parametrize("arguments", [[], ["tests"], ["nonsense", "out"]])
def test_the_stages_refuse_wrong_arguments(arguments: list[str], tmp_path: Path) -> None:
    script = str(PERF / "on_gpu.sh")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage:" in done.stderr or "no stage nonsense" in done.stderr


STAGES = ["first", "tests", "drop-in", "variants", "steps", "small", "home", "open", "users", "scaling", "tune", "peers",
          "soak", "sanitizer"]  # fmt: skip


@pytest.mark.parametrize("limits", ["on", "off"])
def test_every_command_has_a_limit_unless_they_are_off(limits: str, tmp_path: Path) -> None:
    """With commands that only note in what limit they were called; a stage's limits are 8 minutes at most."""
    noted = tmp_path / "noted"
    note = f'echo "${{LIMIT:-none}}" >> {noted}; exit 7'
    for name, text in {
        "timeout": 'LIMIT=$5; export LIMIT; shift 5; exec "$@"',
        "python": f'[ "$1" = -c ] && exec {sys.executable} "$@"; {note}',
        "compute-sanitizer": note,
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LSTM_TRITON_LIMITS": limits}
    environment["PYTHON"] = str(tmp_path / "python")
    environment.pop("LIMIT", None)
    for stage in STAGES:
        command = ["bash", str(PERF / "on_gpu.sh"), stage, str(tmp_path / "out")]
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 7, stage
        found = noted.read_text().split()
        noted.unlink()
        assert limits == "on" or set(found) == {"none"}
        assert limits == "off" or sum(map(int, found)) <= 480


@pytest.mark.parametrize("stage", ["home", "tune", "first"])
def test_a_stage_runs_with_nothing_installed(stage: str, tmp_path: Path) -> None:
    """A sweep with cold starts, and tuning, from a package laid out by the script itself, on this machine's CPU."""
    # The environment's packages without its link to the checkout.
    site = Path(torch.__file__).parents[1]
    bare = tmp_path / "site"
    bare.mkdir()
    for path in site.iterdir():
        if "lstm_triton" not in path.name:
            (bare / path.name).symlink_to(path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{bare}" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    text = (PERF / "on_gpu.sh").read_text()
    assert '--set "$stage"' in text
    text = text.replace('--set "$stage"', "--set tiny --provider nn_lstm ours --mode forward cold --repeat 1")
    assert "--set first --mode forward train" in text
    text = text.replace("--set first --mode forward train", "--set tiny --mode forward")
    text = text.replace('cd "$(dirname "$0")/.."', f'cd "{ROOT}"')
    script = tmp_path / "on_gpu.sh"
    script.write_text(text)
    environment = {**os.environ, "PYTHON": str(python), "LSTM_TRITON_COMMIT": "abc", "LSTM_TRITON_LIMITS": "off"}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(script), stage, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if stage == "tune":
        assert "tuning measures on a GPU: there is none here" in done.stdout, done.stdout + done.stderr
        return
    if stage == "first":  # every part is tried, whatever became of the one before, and its output kept
        assert done.returncode == 2, "the steps of kernels need a GPU"
        out = {name: (tmp_path / "out" / f"{name}.txt").read_text() for name in ("tests", "steps", "host", "first")}
        assert "needs a CUDA device" in out["tests"]
        assert "error" not in out["tests"]
        assert "there is none" in out["steps"]
        assert "training step" in out["host"]
        assert {row.mode for row in read_rows(tmp_path / "out" / "first.csv")} == {"", "forward"}
        return
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_rows(tmp_path / "out" / "home.csv")
    assert not [row.error for row in found if row.error]
    assert {row.mode for row in found} == {"", "forward", "cold"}
    assert {row.commit for row in found} == {"abc"}
