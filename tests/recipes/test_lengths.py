"""All right ways to read rows of different lengths agree, and the wrong one is seen to be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lstm_triton.recipes import lengths


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_they_agree(tmp_path: Path, backend: str) -> None:
    options = lengths.parse(["--small", "--batch", "5", "--longest", "7", "--backend", backend, "--out", str(tmp_path)])
    rows, outcomes = lengths.compare(options)
    assert max(len(row) for row in rows) == 7
    errors = {outcome.name: outcome.error for outcome in outcomes}
    assert errors.pop("padded, as it is") > 0.01
    assert len(errors) == 4
    assert max(errors.values()) < 1e-6
    assert len(lengths.length_figure(rows, outcomes).axes) == 2


def test_padding() -> None:
    assert lengths.padded_share([4, 1, 4, 1], 2, bucketed=False) == pytest.approx(1 - 10 / 16)
    assert lengths.padded_share([4, 1, 4, 1], 2, bucketed=True) == 0.0
