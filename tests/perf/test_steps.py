"""Steps measured beside the model's prediction, as far as it runs without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import plot
import pytest
import steps
import torch
from rows import Row, read_rows, write_rows

from lstm_triton.layer import op
from lstm_triton.planning.cost import microseconds_per_step
from lstm_triton.planning.device import INTERPRETER, KNOWN
from lstm_triton.planning.planner import plan
from lstm_triton.tuning.clock import Times
from lstm_triton.tuning.search import Scratch

WHERE = {"device": "a device", "torch": "2", "triton": "3", "date": "2026-01-01"}
BF16 = ("bfloat16", "tf32")


def test_the_first_config_of_each_problem_is_the_default_plan() -> None:
    device = KNOWN["sm_90"]
    found = list(steps.jobs((64, 512), (16, 128), (BF16,), device, best=3))
    by_problem: dict = {}
    for job in found:
        by_problem.setdefault(job.problem, []).append(job.config)
    assert len(by_problem) == 8
    for problem, configs in by_problem.items():
        assert len(set(configs)) == 3
        assert configs[0] == plan(problem, device).config
        times = [microseconds_per_step(config, problem, device) for config in configs]
        assert times == sorted(times)


def test_types_that_a_device_refuses_are_left_out() -> None:
    assert list(steps.jobs((64,), (16,), (("float32", "tf32x3"),), KNOWN["gfx942"], 1)) == []


def test_a_step_is_checked_and_timed() -> None:
    """In the interpreter, where the time says nothing; and a result that is wrong gets no time."""
    (job, _) = steps.jobs((16,), (8,), (("float32", "tf32"),), INTERPRETER, 1)
    scratch = Scratch(job.problem, job.device, torch.device("cpu"), op.layer)
    times = steps.measure(scratch, job)
    assert isinstance(times, Times)
    assert 0 < times.p20 <= times.median <= times.p80
    (row,) = steps.rows_of(job, scratch.layout.seq_len, None, times, WHERE)
    assert float(row.value) == pytest.approx(times.median, rel=1e-4)
    assert (row.provider, row.mode, row.metric, row.dtype) == ("kernel", "forward", "us", "float32-tf32")
    scratch.truth[0] += 1
    assert "wrong" in steps.measure(scratch, job)
    scratch.truth = None
    assert "TypeError" in steps.measure(scratch, job)


def sample(mode: str, measured: float, predicted: float, **changed: str) -> list[Row]:
    row = Row("steps", "grid", "", "512", "16", "512", "1", "1", "bfloat16", "kernel", mode, "us", f"{measured}",
              f"{measured}", f"{measured}", "10", config="c", **WHERE)  # fmt: skip
    row = replace(row, **changed)
    return [row, replace(row, provider="model", value=f"{predicted}")]


def test_rows_are_paired_and_drawn(tmp_path: Path) -> None:
    rows = [*sample("forward", 2.0, 1.0), *sample("backward", 2.2, 2.0), *sample("forward", 3.0, 4.0, config="other")]
    rows.append(replace(rows[0], value="", error="spills", config="a third"))
    assert [(a.value, b.value) for a, b in steps.pairs(rows)] == [("2.0", "1.0"), ("2.2", "2.0"), ("3.0", "4.0")]
    figure = steps.predicted_against_measured(rows)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["forward: measured / predicted 1.22", "backward: measured / predicted 1.10"]
    assert steps.predicted_against_measured(rows[:1]) is None
    assert "predicted    1.00" in steps.line(*rows[:2])
    assert "spills" in steps.line(rows[-1], None)
    write_rows(tmp_path / "steps.csv", rows)
    assert read_rows(tmp_path / "steps.csv") == rows
    assert plot.main(["--rows", str(tmp_path / "steps.csv"), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "steps.png").exists()


@pytest.mark.parametrize("arguments", [["--best", "0"], ["--hidden-size", "-1"], ["--dtype", "int8"], []])
def test_wrong_arguments(arguments: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "steps.csv")] if arguments else []
    with pytest.raises(SystemExit) as ended:
        steps.main([*arguments, *out])
    assert ended.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In this process: in a new one Matplotlib may add how long it takes to find its fonts."""
    assert steps.main(["--out", str(tmp_path / "steps.csv")]) == 2
    assert capsys.readouterr().err == "this script measures on a CUDA device, and there is none\n"
    assert not (tmp_path / "steps.csv").exists()
