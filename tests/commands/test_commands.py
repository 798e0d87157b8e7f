"""python -m lstm_triton: what explain and doctor say, and how wrong input ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planning.test_table import table

from lstm_triton.__main__ import main
from lstm_triton.commands import tune
from lstm_triton.planning.settings import VARIABLES
from lstm_triton.planning.table import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_TRITON_CACHE_DIR", str(tmp_path / "cache"))


def test_explain_for_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture) -> None:
    arguments = "explain --input-size 256 --hidden-size 1024 --num-layers 2 --batch 16 --dtype bfloat16 --gpu sm_90"
    assert main(arguments.split()) == 0
    text = capsys.readouterr().out
    assert text.count("triton (a plan exists for bfloat16 on H100; nn.LSTM is ") == 2
    assert text.count("times slower, predicted, not measured (`python -m lstm_triton tune` measures), by ") == 2
    assert "forward: grid, exchange by mailbox, W_hh resident on chip, plan from heuristic" in text
    assert "placement=grid" in text
    # 2 * 16 * 1024 * 4096 operations; ten [16, 1024] tensors of two bytes; 64 programs read the tile.
    assert "a step: 134 MFLOP, 320 KiB of memory traffic, 2 MiB through L2; estimated" in text
    assert (
        "nn.LSTM would run cuDNN's: forward standard (cuDNN has no persistent kernel for bfloat16), backward standard"
        in text
    )


def test_explain_says_why_not(capsys: pytest.CaptureFixture) -> None:
    assert main(["explain", "--input-size", "8", "--hidden-size", "16", "--proj-size", "4", "--gpu", "sm_80"]) == 0
    text = capsys.readouterr().out
    assert "layer 0: triton (a plan exists for float32 on A100" in text
    assert "standard (projections)" in text
    assert main(["explain", "--input-size", "8", "--hidden-size", "600", "--gpu", "gfx942"]) == 0
    assert "layer 0: torch (on MI300X the kernels run only where W_hh fits one program" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["", "frobnicate", "explain --input-size 8", "explain --input-size 0 --hidden-size 4", "tune --dtype int8",
     "explain --input-size 8 --hidden-size 4 --gpu sm_42"],
)  # fmt: skip
def test_wrong_arguments_end_with_2(arguments: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("0x4", "'0x4' is no shape HxB or HxBxD"),
        ("512x32x3", "'512x32x3' is no shape"),
        ("shapes.txt", "no such file"),
    ],
)
def test_wrong_shapes_are_one_line(words: str, complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["tune", "--shapes", *words.split()]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_files_of_shapes(tmp_path: Path) -> None:
    file = tmp_path / "shapes.txt"
    file.write_text("# recurrent policies\n512x64  128x256x2 # two\n\n512x64\n")
    shapes = tune.parse_shapes([str(file), "64x8"], ["bfloat16", "float32-ieee"])
    assert [(s.hidden_size, s.batch, s.directions, s.dtype, s.precision) for s in shapes] == [
        (512, 64, 1, "bfloat16", "tf32"),
        (512, 64, 1, "float32", "ieee"),
        (128, 256, 2, "bfloat16", "tf32"),
        (128, 256, 2, "float32", "ieee"),
        (64, 8, 1, "bfloat16", "tf32"),
        (64, 8, 1, "float32", "ieee"),
    ]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no shapes to tune"):
        tune.parse_shapes([str(file)], ["bfloat16"])
    file.write_text("512x64 512by64\n")
    with pytest.raises(ValueError, match="'512by64' is no shape"):
        tune.parse_shapes([str(file)], ["bfloat16"])


TUNE = ["tune", "--shapes", "4x2", "--dtype", "float32-ieee", "--out"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from lstm_triton.tuning import clock, search

    monkeypatch.setattr(search, "REPEAT", 1)
    monkeypatch.setattr(clock, "WARM_UP", 0)  # read when a call is timed, see tests/tuning/test_clock.py


def test_tune_writes_a_table_and_goes_on_from_it(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "deep" / "t.json"
    assert main([*TUNE, str(out)]) == 0
    first = load(out)
    assert len(first.entries) == 2
    assert all(entry.complete for entry in first.entries.values())
    assert "us a step, of 4 configs (0 left out)" in capsys.readouterr().out
    assert main([*TUNE, str(out)]) == 0
    assert load(out).entries == first.entries, "nothing was measured again"
    assert main([*TUNE, str(out), "--again"]) == 0
    assert load(out).entries != first.entries


def test_tune_says_where_it_measured_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from lstm_triton.tuning.clock import Times
    from lstm_triton.tuning.search import Scratch

    times = iter([Times(1.0, 2.0, 3.0, 1, host_bound=True), *[Times(3.0, 4.0, 5.0, 1)] * 7])
    monkeypatch.setattr(Scratch, "times_per_step", lambda self, config: next(times))
    out = tmp_path / "t.json"
    assert main([*TUNE, str(out)]) == 0
    forward, backward = capsys.readouterr().out.splitlines()
    assert "2.00 us a step (host-bound), of 4 configs" in forward
    assert "4.00 us a step, of 4 configs" in backward
    first, second = load(out).entries.values()
    assert first.host_bound == (first.config.encode(),)
    assert second.host_bound == ()


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_tuning_keeps_what_it_has(
    at: int, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C during the second config of the first pass, and the first of the second."""
    from lstm_triton.tuning.search import Scratch

    real, calls = Scratch.times_per_step, []

    def interrupted(self, config):
        calls.append(config)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, config)

    monkeypatch.setattr(Scratch, "times_per_step", interrupted)
    out = tmp_path / "t.json"
    assert main([*TUNE, str(out)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    (entry,) = load(out).entries.values()
    assert len(entry.measured) == at - 1
    assert main([*TUNE, str(out)]) == 0
    assert [len(entry.measured) for entry in load(out).entries.values()] == [4, 4]
    assert len(calls) == 9, "nothing was measured twice but the one interrupted"


def test_two_processes_tuning_into_one_file(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other wrote meanwhile stays."""
    out, real = tmp_path / "t.json", tune.search

    def meanwhile(*arguments):
        if not out.exists():
            monkeypatch.setattr(tune, "search", real)
            assert main(["tune", "--shapes", "20x2", "--dtype", "float32-ieee", "--out", str(out)]) == 0
        return real(*arguments)

    monkeypatch.setattr(tune, "search", meanwhile)
    assert main([*TUNE, str(out)]) == 0
    assert {bucket.hidden_size for bucket in load(out).entries} == {16, 32}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no table"),
        (table().dump(), "is of no use here, it was tuned on H100"),
        (json.dumps({"format": 99}), "format 99"),
    ],
)
def test_tune_overwrites_nothing_it_cannot_use(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "t.json"
    out.write_text(text)
    assert main([*TUNE, str(out)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert out.read_text() == text


def test_tune_into_a_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert main([*TUNE, str(tmp_path / "file" / "t.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_tune_without_a_gpu_says_so() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lstm_triton", "tune"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "lstm_triton tune: tuning measures on a GPU: there is none here"


def test_explain_raises_what_the_call_would(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments, complaint in (
        ("--hidden-size 16 --dtype float64 --gpu sm_90 --backend triton", "is not possible: float64"),
        ("--hidden-size 16 --proj-size -3 --gpu sm_90", "proj_size must be at least 0 and less than hidden_size"),
        ("--hidden-size 16 --proj-size 16 --gpu sm_90", "proj_size must be"),
    ):
        assert main(["explain", "--input-size", "8", *arguments.split()]) == 2
        assert complaint in capsys.readouterr().err
    monkeypatch.setenv("LSTM_TRITON_STRICT", "1")
    assert main(["explain", "--input-size", "8", "--hidden-size", "16", "--dtype", "float64", "--gpu", "sm_90"]) == 2
    assert "float64" in capsys.readouterr().err


def test_the_self_check_of_the_doctor() -> None:
    from lstm_triton.commands.doctor import self_check

    assert self_check(torch.device("cpu")).startswith("kernels ran; largest difference from nn.LSTM")


def test_doctor(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_TRITON_STRICT", "perhaps")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("lstm_triton ", "torch ", "triton ", "cuDNN ", "LSTM_TRITON_AUTOTUNE = cached"):
        assert word in text
    assert "LSTM_TRITON_STRICT = WRONG: LSTM_TRITON_STRICT should be one of 0, 1, got: 'perhaps'" in text


def test_every_variable_is_documented_on_one_page() -> None:
    page = (ROOT / "README.md").read_text()
    for variable in VARIABLES:
        assert f"| `{variable.name}` | {variable.default or 'unset'} |" in page
    written = {word for file in (ROOT / "lstm_triton").rglob("*.py") for word in _variables(file.read_text())}
    assert written == {variable.name for variable in VARIABLES}


def _variables(text: str) -> set[str]:
    import re

    return set(re.findall(r"LSTM_TRITON_[A-Z_]+", text))
