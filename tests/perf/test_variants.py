"""perf/variants.py: its loops compute what ours computes, and a wrong result is no figure."""

from __future__ import annotations

import compile_report
import pytest
import torch
import variants

from lstm_triton import LSTM

pytestmark = pytest.mark.usefixtures("own_precision")
SMALL = ["--steps", "3", "--batch", "2", "--hidden-size", "4", "--repeat", "1"]


@pytest.mark.parametrize("name", ["peephole", "coupled_gates", "cell_clip", "layer_norm", "plain"])
def test_loops_compute_what_ours_computes(name: str) -> None:
    ours = variants.ours_of(compile_report.VARIANTS[name], (3, 5))
    x = 3 * torch.randn(6, 2, 3)
    torch.testing.assert_close(variants.loop_of(ours)(x), ours(x)[0])


@pytest.mark.parametrize("name", ["zoneout", "recurrent_dropout", "variational_dropout"])
def test_loops_draw_as_often(name: str) -> None:
    """Masks differ; over many rows means agree."""
    ours = variants.ours_of(compile_report.VARIANTS[name], (3, 5))
    x = torch.randn(4, 1, 3).expand(4, 4000, 3)
    with torch.no_grad():
        found, want = variants.loop_of(ours)(x), ours(x)[0]
    error = ((found.var(1) + want.var(1)) / 4000).sqrt()
    assert ((found.mean(1) - want.mean(1)).abs() <= 5 * error + 1e-6).all()


def test_a_row_for_every_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(variants, "device_here", lambda: torch.device("cpu"))
    assert variants.main(SMALL) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [name for name in compile_report.VARIANTS if name != "plain"]
    assert all(len(row.split()) == (5 if row.split()[0] in variants.LOOPS else 3) for row in rows)


def test_a_wrong_result_is_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(LSTM):
        def forward(self, input, *arguments, **keywords):
            out, state = super().forward(input, *arguments, **keywords)
            return (out * 1.001 if self.backend == "auto" else out), state

    monkeypatch.setattr(variants, "device_here", lambda: torch.device("cpu"))
    monkeypatch.setattr(variants, "LSTM", Wrong)
    assert variants.main([*SMALL, "--variant", "zoneout"]) == 1
    assert "wrong: rms error" in capsys.readouterr().out
