"""Classification: what it reaches on the digits, and texts of a user's CSV file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lstm_triton.recipes import classification
from lstm_triton.recipes.shared import tables
from lstm_triton.recipes.shared.command import Refused


def parse(tmp_path: Path, *arguments: str):
    return classification.parse(["--small", "--quiet", "--out", str(tmp_path), *arguments])


def test_digits(tmp_path: Path) -> None:
    options = parse(tmp_path)
    data = classification.digits(0.2, 0)
    assert (len(data.train.labels), len(data.valid.labels)) == (1437, 360)
    assert data.train.x.shape[1:] == (8, 8)
    result = classification.classify(data, 1, options)
    assert result.accuracy >= 0.9  # 0.96 after the 600 steps of the full size
    assert data.chance < 0.15
    checkpoint = torch.load(tmp_path / "layers_1.pt", weights_only=True)
    model = classification.Classifier(**checkpoint["sizes"])
    model.load_state_dict(checkpoint["model"])
    said = model.eval()(data.valid.x, None).argmax(-1)
    assert torch.equal(said, result.said)
    assert len(classification.confusion_figure(data, result).axes[0].images) == 1
    assert len(classification.loss_figure([result]).axes[0].lines) == 2


def opinions(path: Path, rows: int = 200) -> Path:
    draw = random.Random(0)
    lines = ["id,text,label"]
    for i in range(rows):
        liked = draw.random() < 0.5
        filler = " ".join(draw.choice(["the", "film", "was", "so", "very"]) for _ in range(draw.randrange(6)))
        lines.append(f'{i},"{filler}, {"lovely" if liked else "dreadful"}",{"good" if liked else "bad"}')
    path.write_text("\n".join(lines) + "\n")
    return path


def test_texts(tmp_path: Path) -> None:
    options = parse(tmp_path, "--csv", str(opinions(tmp_path / "t.csv")), "--steps", "60", "--hidden-size", "16")
    data = classification.load_data(options)
    assert data.classes == ["bad", "good"]
    assert {"lovely", "dreadful", ","} <= set(data.words)
    assert data.train.lengths.min() >= 2
    assert classification.classify(data, 1, options).accuracy == 1.0


def test_made_up_opinions(tmp_path: Path) -> None:
    """Only both words together say what was meant: neither "not" nor the adjective does alone."""
    path = classification.write_opinions(tmp_path / "opinions.csv", count=400)
    rows = [line.rsplit(",", 1) for line in path.read_text().splitlines()[1:]]
    assert len(rows) == 400
    for text, label in rows:
        kind = any(word in text for word in classification.GOOD)
        assert kind != any(word in text for word in classification.BAD)
        assert (label == "good") == (kind != (" not " in text))
    assert 0.3 < sum(label == "good" for _, label in rows) / 400 < 0.7


def test_the_digits_are_drawn() -> None:
    data = classification.digits(0.2, 0)
    axes = classification.digit_figure(data, shown=3).axes
    assert [axis.get_title() for axis in axes] == [data.classes[label] for label in data.train.labels[:3]]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = classification.Classifier(5, 4, 3, 2, 2, 0.0).eval()
    short = model(torch.tensor([[2, 3, 4]]), torch.tensor([3]))
    both = model(torch.tensor([[2, 3, 4, 0, 0], [6, 5, 4, 3, 2]]), torch.tensor([3, 5]))
    torch.testing.assert_close(short, both[:1])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "cannot read"),
        (b"", [], "has no column 'text'; its columns: none"),
        (b"text,label\n", [], "has no rows"),
        (b"text,label\na,\n", [], "line 2: no value for 'label'"),
        (b"text,kind\na,b\n", [], "has no column 'label'; its columns: 'text', 'kind'"),
        (b"text,label\na b,x\nc d,x\n", [], "all rows have the label 'x'"),
        (b"text,label\na b,x\nc d,y\n", [], "cannot hold out 20% of every class"),
        (b"text,label\n" + b"a,x\nb,y\n" * 20 + b'" ",x\n', [], "no value for 'text'"),
        (b"text,label\n" + b"a,x\nb,y\n" * 20, ["--least", "100"], "the vocabulary is empty"),
        (b"\xff\xfe\x00,", [], "is not UTF-8"),
        (b"text,label\ngood film, really,x\n", [], "line 2: more values than columns"),
        (b'text,label\n"a,b\n', [], "no value for 'label'"),
    ],
)
def test_wrong_files_are_one_line_and_status_2(tmp_path: Path, content, arguments, message: str, capsys) -> None:
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content)
    assert classification.main(["--csv", str(path), "--quiet", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_columns_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffa,b\n1,"x, y"\n 2.5 ,z\n', encoding="utf-8")
    assert tables.read_columns(str(path), ["b", "a"]) == [("x, y", "1"), ("z", "2.5")]
    assert tables.numbers(str(path), "a") == [1.0, 2.5]
    with pytest.raises(Refused, match="row 1: 'b' is 'x, y', not a number"):
        tables.numbers(str(path), "b")
    path.write_text("a\n1\ninf\n")
    with pytest.raises(Refused, match="row 2: 'a' is inf"):
        tables.numbers(str(path), "a")
