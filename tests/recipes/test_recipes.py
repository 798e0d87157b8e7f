"""What all recipes have in common: their commands, wrong input, interrupts, whole files, the loop that trains them."""

from __future__ import annotations

import argparse
import importlib
import math
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lstm_triton import LSTM, recipes
from lstm_triton.recipes import copy_task
from lstm_triton.recipes.shared import command, training

ROOT = Path(__file__).resolve().parents[2]
# The smallest sizes that go the whole way, and the files that they leave.
TINY = {
    "char_lm": (["--steps", "3", "--sample", "5", "--hidden-size", "8"], {"best.pt", "loss.png", "sample.txt"}),
    "classification": (
        ["--steps", "4", "--hidden-size", "4", "--layers", "1", "2"],
        {"loss.png", "confusion.png", "results.csv", "layers_1.pt", "layers_2.pt"},
    ),
    "copy_task": (
        ["--delays", "0", "2", "--bits", "1", "--steps", "4", "--gradient-steps", "5"],
        {"accuracy.png", "gradients.png", "results.csv"},
    ),
    "debugging": (["--steps", "80"], {"symptoms.csv", "losses.png", "vanishing.png", "growing.png", "tiny.png", "exploding.png", "saturated.png",
                                      "dead.png", "leak.png"}),
    "forecast": (["--steps", "4", "--hidden-size", "4"], {"forecast.png", "errors.png", "errors.csv", "best.pt"}),
    "from_scratch": (["--hidden-size", "4"], {"flow.png", "step.png", "sequence.png"}),
    "lengths": (["--batch", "3", "--longest", "6", "--hidden-size", "4"], {"lengths.png", "results.csv"}),
    "recurrent_rl": (
        ["--updates", "3", "--batch", "4", "--corridor", "1", "--seq-len", "8"],
        {"returns.png", "returns.csv", "policy.pt"},
    ),
    "translation": (
        ["--steps", "4", "--count", "40", "--hidden-size", "8"],
        {"best.pt", "loss.png", "attention.png", "translations.csv"},
    ),
    "under_the_hood": (
        ["--hidden-size", "20", "--seq-len", "2"],
        {"schedule_forward.png", "schedule_backward.png", "step.png", "residence.png"},
    ),
}  # fmt: skip
OTHERS = {"char_lm_inside", "distributed"}  # need a checkpoint, and torchrun: tested in files of their own
COMMANDS = sorted({*TINY, *OTHERS})
WITHOUT_BAR = {"debugging", "from_scratch", "lengths", "under_the_hood"}


def tiny(name: str, out: Path) -> list[str]:
    quiet = [] if name in WITHOUT_BAR else ["--quiet"]
    return [*TINY[name][0], *quiet, "--small", "--device", "cpu", "--out", str(out)]


def module_of(name: str):
    return importlib.import_module(f"lstm_triton.recipes.{name}")


def test_every_recipe_is_tested_here() -> None:
    found = {info.name for info in pkgutil.iter_modules(recipes.__path__) if hasattr(module_of(info.name), "parse")}
    assert found == {*TINY, *OTHERS}


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_whole_way(name: str, tmp_path: Path, capsys) -> None:
    """Status 0, every file whole, and the closing line names what was written."""
    _, files = TINY[name]
    assert module_of(name).main(tiny(name, tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "written: " in captured.out.splitlines()[-1]
    assert captured.err == ""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--what"], ["--device", "meta"], ["--out"]])
def test_wrong_options_are_one_line_and_status_2(name: str, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        module_of(name).main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: ")
    assert error.count("\n") == 1
    assert arguments[0] in error


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_is_written(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        module_of(name).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m lstm_triton.recipes.{name}" in text.replace("torchrun --nproc-per-node 2 -m", "python -m")
    assert "--out" in text
    assert "default:" in text


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_folder_that_cannot_be(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert module_of(name).main(tiny(name, tmp_path / "file")) == 2
    assert capsys.readouterr().err.startswith(f"{name}: ")
    assert module_of(name).main(tiny(name, Path("/proc/self"))) == 2  # is there, and takes no file, whoever asks
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("copy_task", ["--delays", "1000000000000"]),
        ("lengths", ["--longest", "1000000000000"]),
        ("lengths", ["--input-size", "1000000000000000000"]),
        ("recurrent_rl", ["--seq-len", "1000000000000"]),
        ("classification", ["--batch", "1000000000000"]),
    ],
)
def test_more_than_there_is_memory_for(name: str, arguments: list[str], tmp_path: Path, capsys) -> None:
    assert module_of(name).main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "GiB of memory" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (command.Refused("no such thing\nand more"), 2, "no such thing"),
        (command.Diverged("the loss is nan"), 1, "the loss is nan"),
        (OSError(28, "No space left"), 2, "No space left"),
        (MemoryError(), 2, "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            2,
            "out of memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_the_exit_status_says_what_happened(error: BaseException, status: int, text: str, capsys) -> None:
    def body() -> None:
        raise error

    assert command.run("name", body, Path("out")) == status
    assert text in capsys.readouterr().err


def test_a_defect_is_not_hidden() -> None:
    def body() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        command.run("name", body, Path("out"))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "x"])
def test_options_of_whole_numbers(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        command.whole(1)(text)


def test_options_of_numbers() -> None:
    assert command.number(least=0, below=1)("0") == 0
    for text in ("nan", "inf", "-0.1", "1"):
        with pytest.raises(argparse.ArgumentTypeError):
            command.number(least=0, below=1)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0 and finite"):
        command.number()("0")


def test_small_gives_way_to_what_is_asked() -> None:
    options = copy_task.parse(["--steps", "7", "--small"])
    assert (options.steps, options.delays) == (7, [5, 20])
    assert copy_task.parse([]).delays == [10, 50, 100, 200]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("char_lm", ["--tie", "--embedding-size", "7"], "argument --embedding-size: does not go with --tie"),
        ("forecast", ["--column", "x"], "argument --column: goes only with --csv"),
        ("classification", ["--least", "3"], "argument --least: goes only with --csv"),
        ("translation", ["--pairs", "x", "--count", "11"], "argument --count: does not go with --pairs"),
        ("recurrent_rl", ["--updates", "1", "--corridor", "100"], "must leave time for an episode"),
        ("under_the_hood", ["--backend", "torch"], "unrecognized arguments: --backend torch"),
        ("lengths", ["--quiet"], "unrecognized arguments: --quiet"),
    ],
)
def test_nothing_is_accepted_and_ignored(name: str, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        module_of(name).main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "option"), [("forecast", "csv"), ("classification", "csv"), ("translation", "pairs")])
def test_an_empty_name_is_no_default(name: str, option: str, tmp_path: Path, capsys) -> None:
    assert module_of(name).main([f"--{option}", "", "--out", str(tmp_path / "out")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["from_scratch", "lengths", "copy_task"])
def test_a_seed_gives_the_same_again(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert module_of(name).main(tiny(name, tmp_path / folder)) == 0
    for path in (tmp_path / "a").glob("*.png"):
        if name != "lengths":  # whose figure has times
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    if name == "lengths":
        columns = [
            [line.split(",")[:2] for line in (tmp_path / f / "results.csv").read_text().splitlines()] for f in "ab"
        ]
        assert columns[0] == columns[1]


def test_a_backend_that_cannot_run(tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(*_):
        raise RuntimeError('backend="triton" is not possible: no GPU')

    monkeypatch.setattr(LSTM, "refusal", refuse)
    assert copy_task.main(["--small", "--backend", "triton", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == 'copy_task: backend="triton" is not possible: no GPU\n'
    assert not (tmp_path / "out").exists()


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**(dict(steps=100, evaluations=10, learning_rate=0.1, clip=1.0, quiet=True) | changes))


def test_fit_descends_and_keeps_the_best() -> None:
    model, kept = Line(), []

    def measure() -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        return float(model.weight.square())

    curve = training.fit(
        model, lambda _: model.weight.square(), measure, options(), keep=lambda *best: kept.append(best)
    )
    assert curve.steps == list(range(10, 101, 10))
    assert model.training
    assert curve.best == min(curve.valid) < 0.1 < curve.valid[0]
    assert kept[-1][1] == curve.best
    assert [loss for _, loss in kept] == sorted((loss for _, loss in kept), reverse=True)


def test_fit_ends_when_it_is_enough_and_where_it_diverges() -> None:
    model = Line()
    curve = training.fit(model, lambda _: model.weight.square(), lambda: 0.5, options(), enough=0.5)
    assert curve.steps == [10]
    model = Line()
    with pytest.raises(command.Diverged, match="the loss is nan at step 3; try a lower --learning-rate"):
        training.fit(model, lambda step: model.weight * (math.nan if step == 3 else 1), lambda: 0.0, options())
    model = Line()
    with pytest.raises(command.Diverged, match="the validation loss is inf at step 10"):
        training.fit(model, lambda _: model.weight.square(), lambda: math.inf, options())


def test_an_interrupted_training_leaves_its_curve() -> None:
    model, curve = Line(), training.Curve()

    def loss_of(step: int) -> torch.Tensor:
        if step == 25:
            raise KeyboardInterrupt
        return model.weight.square()

    with pytest.raises(KeyboardInterrupt):
        training.fit(model, loss_of, lambda: 1.0, options(), curve=curve)
    assert curve.steps == [10, 20]


def test_tables_are_whole_or_not_there(tmp_path: Path) -> None:
    path = command.save_table(tmp_path / "t.csv", ("a", "b"), [(1, "x, y"), (2, "z")])
    assert path.read_text() == 'a,b\n1,"x, y"\n2,z\n'

    def rows():
        yield (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.save_table(path, ("a", "b"), rows())
    assert path.read_text().startswith("a,b")
    assert [other.name for other in tmp_path.iterdir()] == ["t.csv"]


def test_every_recipe_has_its_page_and_its_place() -> None:
    """In the index of notebooks; what is no program lies in recipes/shared."""
    index = (ROOT / "notebooks/README.md").read_text()
    for name in COMMANDS:
        assert f"lstm_triton.recipes.{name}" in index, name
    for path in (ROOT / "lstm_triton/recipes").glob("*.py"):
        assert path.stem == "__init__" or f"lstm_triton.recipes.{path.stem}" in index, path
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"]({path.name})" in index, path


@pytest.mark.parametrize("name", ["from_scratch", "char_lm"])
@pytest.mark.parametrize("size", ["1152921504606846976", "4611686018427387904"])
def test_sizes_beyond_all_numbers(name: str, size: str, tmp_path: Path, capsys) -> None:
    try:
        status = module_of(name).main(["--hidden-size", size, "--device", "cpu", "--out", str(tmp_path)])
    except SystemExit as ended:  # argparse's
        status = ended.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_option_that_would_be_ignored_is_refused_whatever_its_value(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        module_of("forecast").main(["--column", "value", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "forecast: argument --column: goes only with --csv\n"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert module_of("lengths").main(["--small", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err
