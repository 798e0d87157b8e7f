"""The predictions as tables, and how measured rows move them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import rules
import torch
from rows import Row, read_rows, write_rows

from lstm_triton.planning import prediction
from lstm_triton.planning.cudnn import Call
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.prediction import predict

H100 = KNOWN["sm_90"]


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(prediction, "CORRECTIONS", tmp_path / "corrections.json")
    prediction.corrections.cache_clear()
    yield
    prediction.corrections.cache_clear()


def test_tables(capsys: pytest.CaptureFixture) -> None:
    assert rules.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Predicted, not measured.")
    assert text.count(" routed away; ") == 9
    for said in text.split("the slowest that auto takes: ")[1:]:
        assert float(said.split()[0]) >= 1 / 1.2
    assert "KernelBench" in text


def made(factors: dict[str, float]) -> list[Row]:
    """Rows as if each kind took so many times what is predicted."""
    found = []
    for call in rules.SHAPES:
        for provider in ("nn_lstm", "nn_lstm_graph", "ours_kernels_graph"):
            for mode, training in rules.MODES.items():
                told = predict(call, H100, "tf32", training, rules.STEPS, provider.endswith("graph"))
                assert told is not None
                kind = "ours" if provider.startswith("ours") else told.steps[0].kind
                kind = "launches" if provider == "nn_lstm" else kind
                time = (told.ours if kind == "ours" else told.torch) * factors.get(kind, 1.0)
                found.append(replace(rules.blank(call, provider, mode), value=f"{time / 1e3}"))
    return [*found, replace(found[0], region="open"), replace(found[0], value="", error="RuntimeError: none")]


def test_measured_rows_move_the_predictions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wanted = {"launches": 0.6, "products": 1.5, "persistent": 0.8, "small": 1.2, "ours": 1.1}
    write_rows(tmp_path / "rules.csv", made(wanted))
    arguments = ["--rows", str(tmp_path / "rules.csv"), "--gpu", "sm_90"]
    assert rules.main(arguments) == 0
    assert not prediction.CORRECTIONS.exists()
    assert rules.main([*arguments, "--write"]) == 0
    written = json.loads(prediction.CORRECTIONS.read_text())
    assert written == {"sm_90": pytest.approx(wanted, abs=1e-3)}
    assert "predicted" in capsys.readouterr().out


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert rules.main(["--rows", str(tmp_path / "none.csv"), "--gpu", "sm_90"]) == 2
    write_rows(tmp_path / "empty.csv", [])
    assert rules.main(["--rows", str(tmp_path / "empty.csv"), "--gpu", "sm_90"]) == 2
    if not torch.cuda.is_available():
        assert rules.main(["--rows", str(tmp_path / "empty.csv")]) == 2
        assert rules.main(["--measure", str(tmp_path / "rules.csv")]) == 2
    assert capsys.readouterr().err.count("rules.py: ") == 3 - torch.cuda.is_available()
    for changes in (dict(mode="forward_backward"), dict(dtype="float8")):
        write_rows(tmp_path / "odd.csv", [replace(made({})[0], **changes)])
        assert rules.main(["--rows", str(tmp_path / "odd.csv"), "--gpu", "sm_90"]) == 2
        assert "unknown mode or type" in capsys.readouterr().err
    for wrong in (["--write"], ["--measure", "a.csv", "--rows", "b.csv"]):
        with pytest.raises(SystemExit):
            rules.main(wrong)


def test_every_shape_is_measured_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where kernels are interpreted and there are no graphs: these rows say why they are empty."""
    monkeypatch.setattr(rules, "SHAPES", [Call(4, 4, 2, 1, 1, "float32"), Call(3, 4, 2, 2, 1, "float32")])
    monkeypatch.setattr(rules, "STEPS", 2)
    monkeypatch.setattr(rules, "REPEAT", 2)
    path = tmp_path / "rules.csv"
    rules.measured_rows(path, torch.device("cpu"))
    rows = read_rows(path)
    assert len(rows) == 2 * 2 * 2 * 2
    assert all(float(row.value) > 0 for row in rows if not row.provider.endswith("_graph"))
    if not torch.cuda.is_available():
        assert all(row.error for row in rows if row.provider.endswith("_graph"))


def test_a_graph_is_captured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            done.append("wait")

    @contextlib.contextmanager
    def inside(what: object):
        done.append(f"into {type(what).__name__}")
        yield
        done.append("out")

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    cuda = SimpleNamespace(Stream=Stream, current_stream=Stream, stream=inside, CUDAGraph=Graph, graph=inside)
    monkeypatch.setattr(torch, "cuda", cuda)
    module, x = torch.nn.Linear(2, 2), torch.randn(2, requires_grad=True)
    module.weight.grad = torch.zeros(2, 2)
    rules.in_a_graph(lambda: done.append("run"), module, x)()
    assert done == ["wait", "into Stream", *["run"] * 3, "out", "wait", "into Graph", "run", "out", "replay"]
    assert module.weight.grad is None
