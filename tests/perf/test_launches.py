"""The tiny launches of the stage `doctor`, as far as they run without a GPU: in the interpreter, by an H100's configs."""

from __future__ import annotations

import launches
import pytest
import torch

from lstm_triton.planning.device import KNOWN
from lstm_triton.testing.interpreter import cooperative

CPU = torch.device("cpu")
NAMES = ["local", "stepwise", "grid mailbox", "grid flags"]


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not multiply bfloat16; and no more than it takes."""
    monkeypatch.setattr(launches, "KINDS", dict.fromkeys(launches.KINDS, "float16"))
    for name, size in (("HIDDEN", 32), ("BATCH", 3), ("STEPS", 2)):
        monkeypatch.setattr(launches, name, size)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_placement_and_protocol_is_launched_on_each_nvidia_gpu(arch: str) -> None:
    found = list(launches.cases(KNOWN[arch]))
    assert [case.name for case in found] == NAMES
    assert {case.dtype for case in found} == {"bfloat16", "float16"}
    for case in found:
        assert {f"{c.placement} {c.protocol}".removesuffix(" none") for c in case.configs.values()} == {case.name}


def test_each_is_named_before_it_starts(half: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen, real = [], launches.lstm

    def noting(*given, **options):
        seen.append(capsys.readouterr().out.splitlines()[-1])
        return real(*given, **options)

    monkeypatch.setattr(launches, "lstm", noting)
    with cooperative(0):
        assert launches.run(KNOWN["sm_90"], CPU) == 0
    assert seen == [f"{name}, float16, forward and backward ..." for name in NAMES]
    assert capsys.readouterr().out.strip() == "as good as nn.LSTM"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda out: out + 0.01, "wrong: result 0 has an rms error of"),
        (lambda out: out * float("nan"), "wrong: result 0 has an rms error of nan"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_one_that_fails_leaves_the_others(spoil, complaint: str, half: None, monkeypatch, capsys) -> None:
    real, calls = launches.lstm, []

    def spoilt(*given, **options):
        calls.append(given)
        out, *state = real(*given, **options)
        return (spoil(out) if len(calls) == 2 else out, *state)

    monkeypatch.setattr(launches, "lstm", spoilt)
    with cooperative(0):
        assert launches.run(KNOWN["sm_90"], CPU) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].strip().startswith(complaint)
    assert [line.strip() for line in lines[1::2] if line != lines[3]] == ["as good as nn.LSTM"] * 3


def test_what_a_gpu_cannot_run_is_said(half: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(launches, "complaint", lambda case, where: "")
    assert launches.run(KNOWN["gfx942"], CPU) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"{name}: not for MI300X" for name in NAMES[1:]]
