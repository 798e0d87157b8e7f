"""Two machines beside each other: only what both have measured, only as ratios."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import beside
import pytest
from rows import read_rows, write_rows

RECORDED = Path(__file__).parents[2] / "perf/results/cpu-amd-epyc/rows.csv"


@pytest.fixture(scope="module")
def recorded():
    return read_rows(RECORDED)


def test_the_same_machine_agrees_with_itself_and_a_slower_one_in_ratios(recorded) -> None:
    slower = [
        replace(row, value=str(2 * float(row.value))) if row.metric == "ms" and row.value else row for row in recorded
    ]
    for here in (recorded, slower):
        points = beside.common(recorded, here, "combined_gates", "train")
        assert len(points) > 10
        assert all(a == pytest.approx(b) for a, b in points)
    figure = beside.beside(recorded, slower)
    assert figure is not None
    assert "combined gates" in " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())


def test_the_command(tmp_path: Path, recorded, capsys) -> None:
    write_rows(tmp_path / "here.csv", recorded)
    arguments = ["--recorded", str(RECORDED), "--here", str(tmp_path / "here.csv")]
    assert beside.main([*arguments, "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for out in (tmp_path / "b.foo", tmp_path / "nowhere/b.png"):
        assert beside.main([*arguments, "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"here.csv", "b.png"}


def test_nothing_in_common(tmp_path: Path, recorded, capsys) -> None:
    write_rows(tmp_path / "here.csv", [replace(row, hidden_size="7") for row in recorded])
    arguments = ["--recorded", str(RECORDED), "--here", str(tmp_path / "here.csv"), "--out", str(tmp_path / "b.png")]
    assert beside.main(arguments) == 2
    assert "no shape and provider in common" in capsys.readouterr().err
    assert beside.main([*arguments[:2], "--here", str(tmp_path / "none.csv"), *arguments[4:]]) == 2
