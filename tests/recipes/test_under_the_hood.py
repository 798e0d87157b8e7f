"""What is shown of the kernels is what they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lstm_triton.recipes import under_the_hood


@pytest.fixture(scope="module")
def runs() -> list[under_the_hood.Run]:
    return [under_the_hood.record(hidden_size=40, seq_len=3, seed=seed) for seed in (0, 1)]


def test_schedules_differ_and_results_do_not(runs) -> None:
    assert runs[0].forward != runs[1].forward
    for a, b in zip(runs[0].results, runs[1].results):
        assert torch.equal(a, b)
    lstm = torch.nn.LSTM(8, 40)
    generator = torch.Generator().manual_seed(0)
    x, *weights = (
        torch.randn(size, generator=generator).mul_(0.2) for size in ((3, 3, 8), (160, 8), (160, 40), (160,), (160,))
    )
    weights[3].zero_()
    with torch.no_grad():
        for parameter, weight in zip(lstm.parameters(), weights):
            parameter.copy_(weight)
    torch.testing.assert_close(runs[0].results[0], lstm(x)[0].detach())


def test_what_programs_do(runs) -> None:
    """Three programs publish once in each step that another one follows, and nobody is ever two steps ahead."""
    for run in runs:
        for events in (run.forward, run.backward):
            assert {event.program for event in events} == {0, 1, 2}
            assert under_the_hood.furthest_lead(events) == 1
            published = [(event.program, event.step) for event in events if event.what == "publish"]
            assert len(published) == len(set(published))
            assert {program for program, _ in published} == {0, 1, 2}
        assert under_the_hood.one_step(run.forward)["publish"] == 1


def test_without_flags_the_data_is_published_by_itself() -> None:
    runs = [under_the_hood.record(hidden_size=40, seq_len=3, seed=seed, protocol="mailbox") for seed in (0, 1)]
    assert runs[0].forward != runs[1].forward
    assert all(torch.equal(a, b) for a, b in zip(runs[0].results, runs[1].results))
    for run in runs:
        for events in (run.forward, run.backward):
            assert {event.what for event in events} == {"store", "publish", "poll"}
            published = sorted((event.program, event.step) for event in events if event.what == "publish")
            assert published == [(program, step) for program in range(3) for step in range(3)]
            assert under_the_hood.furthest_lead(events) == 1


def test_lead() -> None:
    events = [under_the_hood.Event(n, p, what, s) for n, (p, what, s) in enumerate(
        [(0, "publish", 0), (0, "publish", 1), (1, "poll", 0), (1, "publish", 0), (1, "publish", 1)])]  # fmt: skip
    assert under_the_hood.furthest_lead(events) == 2


def test_residence() -> None:
    found = {row.hidden_size: row for row in under_the_hood.residence((64, 512, 1024, 4096))}
    assert (found[64].protocol, found[64].tiles, found[1024].protocol) == ("none", 1, "mailbox")
    assert (found[64].placement, found[64].programs, found[64].slice) == ("local", 2, found[64].matrix)
    assert found[1024].resident
    assert found[1024].slice * found[1024].programs == found[1024].matrix == 4 * 1024 * 1024 * 2
    assert not found[4096].resident
    for row in found.values():
        assert row.shared <= row.limit


def test_it_needs_the_interpreter() -> None:
    code = "from lstm_triton.recipes import under_the_hood; under_the_hood.record(16, 2)"
    environment = {"PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path.cwd())
    assert "set TRITON_INTERPRET=1 before" in done.stderr


def test_it_starts_the_interpreter_by_itself(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    arguments = ["--hidden-size", "20", "--seq-len", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert under_the_hood.main(arguments) == 0
    assert "the same bits" in capfd.readouterr().out
    assert under_the_hood.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert capfd.readouterr().err == "under_the_hood: the interpreter runs on the CPU: --device cpu\n"
