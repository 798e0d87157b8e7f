"""The character language model: it learns, its files are whole, and wrong input ends in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lstm_triton.recipes import char_lm
from lstm_triton.recipes.shared import text as text_module
from lstm_triton.recipes.shared.training import Curve

SMALL = ["--batch", "8", "--seq-len", "16", "--hidden-size", "24", "--sample", "40", "--quiet"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question.\n" * 80, encoding="utf-8")
    return path


def run(out: Path, *arguments: str) -> int:
    return char_lm.main([*SMALL, "--out", str(out), *arguments])


@pytest.mark.parametrize("options", [[], ["--tie", "--layers", "1"], ["--layers", "3", "--dropout", "0"]])
def test_it_learns_and_writes_everything(tmp_path: Path, text: Path, options: list[str], capsys) -> None:
    assert (
        run(
            tmp_path / "out",
            "--text",
            str(text),
            "--steps",
            "250",
            "--evaluations",
            "3",
            "--learning-rate",
            "0.01",
            *options,
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "validation perplexity" in printed
    assert "path of layer 0              torch: the tensors are on cpu" in printed
    assert "largest difference, output" in printed
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "loss.png", "sample.txt"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_text()) == 40
    model, alphabet = char_lm.load(out / "best.pt")
    corpus = text_module.Corpus.from_text(text.read_text(), 16)
    assert alphabet == corpus.alphabet
    assert char_lm.evaluate(model, corpus.valid, 8, 16) < corpus.unigram_loss() - 0.5


def test_it_reaches_its_target(tmp_path: Path) -> None:
    """On Python's documentation, at a smaller size: a perplexity below a fifth of that by frequencies."""
    arguments = [
        "--hidden-size",
        "96",
        "--layers",
        "1",
        "--seq-len",
        "32",
        "--steps",
        "500",
        "--learning-rate",
        "0.015",
    ]
    options = char_lm.parse([*arguments, "--evaluations", "5", "--quiet", "--out", str(tmp_path)])
    corpus, model = char_lm.prepare(options)
    curve = Curve()
    char_lm.train(model, corpus, options, curve)
    assert curve.best < corpus.unigram_loss() - math.log(5)


def test_a_sample_goes_on_from_its_prompt() -> None:
    torch.manual_seed(0)
    model = char_lm.CharLM(3, 4, 8, 1, 0.0, False)
    with torch.no_grad():
        codes = torch.tensor([0, 1, 2]).unsqueeze(1)
        likeliest = "abc"[int(model.eval()(codes)[0][-1, 0].argmax())]
    assert char_lm.generate(model, "abc", 1, 1e-3, prompt="a?bc") == likeliest
    assert char_lm.generate(model, "abc", 9, 1.0, prompt="a") == char_lm.generate(model, "abc", 9, 1.0)


def test_the_shortest_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("to be or not" * 7)
    arguments = ["--text", str(tmp_path / "text.txt"), "--steps", "2", "--evaluations", "1", "--batch", "4"]
    assert run(tmp_path / "out", *arguments, "--temperature", "1e-320") == 0


def test_the_same_seed_gives_the_same_text(tmp_path: Path, text: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, "--text", str(text), "--steps", "10", "--evaluations", "1")
    assert (tmp_path / "a/sample.txt").read_text() == (tmp_path / "b/sample.txt").read_text()


def test_temperature(text: Path) -> None:
    """Close to 0 it is the likeliest character; high, it is nearly uniform."""
    torch.manual_seed(0)
    model = char_lm.CharLM(5, 4, 8, 1, 0.0, False)
    model.decoder.bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])
    assert char_lm.generate(model, "abcde", 50, 0.01) == "c" * 50
    assert len(set(char_lm.generate(model, "abcde", 50, 100.0))) == 5


def test_unigram_baseline() -> None:
    corpus = text_module.Corpus("ab", torch.tensor([0, 0, 0, 1] * 5000), torch.tensor([0, 0, 0, 1]))
    want = -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert abs(corpus.unigram_loss() - want) < 1e-3


def test_windows_are_consecutive() -> None:
    """Every stream reads on where the last window ended, and targets are the next characters."""
    codes = torch.arange(41)
    windows = list(text_module.batches(codes, batch=2, seq_len=6))
    inputs, targets = (torch.cat([window[i] for window in windows]) for i in (0, 1))
    assert inputs.t().tolist() == [list(range(20)), list(range(20, 40))]
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00\x81", "is not UTF-8 text"),
        (b"abc\0def" * 1000, "is a binary file"),
        (b"too short", "the text is too short: 9 characters, at least 160 are needed"),
    ],
)
def test_wrong_text_is_one_line_and_status_2(tmp_path: Path, content: bytes | None, message: str, capsys) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert run(tmp_path / "out", "--text", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_text(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "out", "--text", str(tmp_path)) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--dropout", "1"],
        ["--temperature", "0"],
        ["--clip", "nan"],
        ["--layers", "two"],
        ["--seed", "-1"],
        ["--device", "meta"],
    ],
)
def test_wrong_options_are_status_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        char_lm.main(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_interrupt_keeps_the_best_checkpoint(tmp_path: Path, text: Path, monkeypatch, capsys) -> None:
    """Ctrl-C after the second validation: best.pt loads, the plot is there, no half-written file."""
    calls = []
    original = char_lm.evaluate

    def evaluate(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(original(*arguments))
        return calls[-1]

    monkeypatch.setattr(char_lm, "evaluate", evaluate)
    assert run(tmp_path / "out", "--text", str(text), "--steps", "40", "--evaluations", "4") == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best.pt", "loss.png"]
    char_lm.load(tmp_path / "out/best.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_text("old")

    def write(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        char_lm.write_atomically(path, write)
    assert path.read_text() == "old"


def test_the_default_text_ships_with_python() -> None:
    assert len(text_module.default_text()) > 400_000


@pytest.mark.parametrize("options", [["--backend", "triton"], ["--device", "cuda"], ["--device", "cpu:x"]])
def test_what_cannot_run_is_one_line_and_status_2(
    tmp_path: Path, text: Path, options: list[str], capsys, monkeypatch
) -> None:
    from lstm_triton.modules import lstm as module

    def refuse(*_):
        raise RuntimeError('backend="triton" is not possible: no GPU')

    if "triton" in options:  # in these tests the interpreter makes it possible
        monkeypatch.setattr(module, "kernel_refusal", refuse)
    elif torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert run(tmp_path / "out", "--text", str(text), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("char_lm: ")
    assert error.count("\n") == 1


def test_an_impossible_folder_is_one_line_and_status_2(tmp_path: Path, text: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "--text", str(text)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_divergence_is_one_line_and_status_1(tmp_path: Path, text: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(char_lm.F, "cross_entropy", lambda logits, targets, **_: logits.sum() * float("nan"))
    assert run(tmp_path / "out", "--text", str(text), "--steps", "5") == 1
    assert "the loss is nan at step 1; try a lower --learning-rate" in capsys.readouterr().err
    assert char_lm.perplexity(1e6) == "e^1000000"


def test_interrupt_before_the_first_validation_and_while_sampling(
    tmp_path: Path, text: Path, monkeypatch, capsys
) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name, left in (("evaluate", []), ("generate", ["best.pt", "loss.png"])):
        with monkeypatch.context() as patch:
            patch.setattr(char_lm, name, interrupt)
            assert run(tmp_path / name, "--text", str(text), "--steps", "4", "--evaluations", "1") == 130
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == left
        assert "interrupted" in capsys.readouterr().err
