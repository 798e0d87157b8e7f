"""Inside a character model: properties of texts, units that track them, gates at characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lstm_triton.recipes import char_lm, char_lm_inside
from lstm_triton.recipes.char_lm_inside import Trace
from lstm_triton.recipes.shared.command import Refused

TEXT = 'He said "go (now)".\n  So be it.\n' * 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    (out / "text.txt").write_text(TEXT)
    arguments = ["--text", str(out / "text.txt"), "--steps", "30", "--hidden-size", "12", "--batch", "8", "--quiet"]
    options = char_lm.parse([*arguments, "--seq-len", "16", "--layers", "2", "--out", str(out)])
    corpus, model = char_lm.prepare(options)
    char_lm.train(model, corpus, options, char_lm.Curve())
    return out / "best.pt"


def test_properties() -> None:
    known = char_lm_inside.properties('  a "b(c`d`e)"\nfg')
    assert known["position in the line"].tolist() == [*range(1, 15), 0, 1, 2]
    assert known["indentation"].tolist() == [1, 2] + [2] * 12 + [0, 0, 0]
    assert known["inside double quotes"].tolist() == [0] * 4 + [1] * 9 + [0] * 4
    assert known["inside parentheses"].tolist() == [0] * 6 + [1] * 6 + [0] * 5
    assert known["inside backquotes"].tolist() == [0] * 8 + [1, 1] + [0] * 7
    assert known["length of the word so far"].tolist()[-2:] == [1, 2]
    assert known["line is empty so far"].tolist() == [1, 1] + [0] * 12 + [1, 0, 0]


def test_a_planted_tracker_is_found() -> None:
    torch.manual_seed(0)
    c = torch.randn(len(TEXT), 9)
    c[:, 4] = 0.3 * c[:, 4] - char_lm_inside.properties(TEXT)["inside double quotes"]
    seen = Trace(TEXT, c, torch.rand(len(TEXT), 4, 9), torch.zeros(len(TEXT)))
    best = char_lm_inside.trackers(seen)[0]
    assert (best.name, best.unit) == ("inside double quotes", 4)
    assert best.found < -0.7
    assert best.confirmed < -0.7
    assert len(char_lm_inside.tracking_figure(seen, [best]).axes) == 2


def test_correlations() -> None:
    values = torch.arange(10.0)
    c = torch.stack((2 * values - 3, -values, torch.ones(10)), 1)
    torch.testing.assert_close(char_lm_inside.correlations(c, values), torch.tensor([1.0, -1.0, 0.0]))


def test_forgetting() -> None:
    gates = torch.full((60, 4, 2), 0.5)
    text = "ab" * 25 + "c" * 10
    gates[[character == "b" for character in text], 1] = 0.1
    found = char_lm_inside.forgetting(Trace(text, torch.zeros(60, 2), gates, torch.zeros(60)), least=20)
    assert [character for character, _ in found] == ["b", "a"]  # "c" is too rare
    assert found[0][1] == pytest.approx(0.1)


def test_a_trace_is_the_models(checkpoint: Path) -> None:
    model, alphabet = char_lm.load(checkpoint)
    seen = char_lm_inside.trace(model, alphabet, "He said ?so", layer=0)
    assert seen.text == "He said so"
    codes = torch.tensor([alphabet.index(character) for character in seen.text]).unsqueeze(1)
    with torch.no_grad():
        logits, _ = model(codes)
    torch.testing.assert_close(seen.surprise[1:], F.cross_entropy(logits[:-1, 0], codes[1:, 0], reduction="none"))
    i, f, g, _ = seen.gates.unbind(1)
    torch.testing.assert_close(seen.c[1:], f[1:] * seen.c[:-1] + i[1:] * g[1:])
    assert len(char_lm_inside.gate_figure(seen, units=5).axes) == 4
    with pytest.raises(Refused, match="fewer than two characters"):
        char_lm_inside.trace(model, alphabet, "??")


def test_the_whole_way(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--text", str(checkpoint.parent / "text.txt"), "--small"]
    assert char_lm_inside.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gates.png", "forgetting.png", "tracking.png", "temperatures.txt"}
    printed = capsys.readouterr().out
    assert "most forgetful:" in printed
    assert "written: gates.png, forgetting.png, tracking.png, temperatures.txt in" in printed
    assert char_lm_inside.main([*arguments, "--layer", "2", "--out", str(tmp_path / "out")]) == 2
    assert "--layer 2: the model has 2 layers" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"\x80\x02J\x01.", "weights only", "a tensor"])
def test_wrong_checkpoints_are_one_line_and_status_2(tmp_path: Path, content, capsys) -> None:
    path = tmp_path / "best.pt"
    if content == "weights only":
        torch.save({"weight": torch.ones(1)}, path)
    elif content == "a tensor":
        torch.save(torch.zeros(3), path)
    elif content is not None:
        path.write_bytes(content)
    assert char_lm_inside.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert ("cannot read" in error) if content is None else ("is no checkpoint of char_lm" in error)
    assert error.count("\n") == 1
