"""Translation: pairs and vocabularies, what the model may see, and what it reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lstm_triton.recipes import translation
from lstm_triton.recipes.shared import pairs
from lstm_triton.recipes.shared.command import Refused


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"), (13, "thirteen"), (20, "twenty"), (99, "ninety-nine"), (100, "one hundred"),
        (205, "two hundred and five"), (340, "three hundred and forty"), (1000, "one thousand"),
        (1205, "one thousand two hundred and five"), (2007, "two thousand and seven"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)  # fmt: skip
def test_numbers_in_words(number: int, words: str) -> None:
    assert pairs.in_words(number) == words


def test_words_are_unique() -> None:
    assert len({pairs.in_words(number) for number in range(5000)}) == 5000


def test_generated_pairs() -> None:
    found = pairs.generated(["dates", "numbers"], 500, seed=1)
    assert len(dict(found)) == 500
    assert found == pairs.generated(["dates", "numbers"], 500, seed=1)
    dates = [target for _, target in found if "-" in target]
    assert 150 < len(dates) < 350
    assert all(len(date) == 10 for date in dates)
    assert [pairs.ordinal(day) for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd"]
    )


@pytest.mark.parametrize("kind", ["character", "word"])
def test_vocabulary(kind: str) -> None:
    vocabulary = pairs.Vocabulary.of(["a b", "b c d"], kind)
    codes, lengths = vocabulary.encode(["b a", "d", "b ?"])
    assert codes.shape == (3, int(lengths.max()))
    assert [vocabulary.decode(row) for row in codes.tolist()][:2] == ["b a", "d"]
    assert pairs.UNKNOWN in codes[2]
    assert (codes[1, lengths[1] :] == pairs.PAD).all()
    with pytest.raises(Refused, match="the vocabulary is empty"):
        pairs.Vocabulary.of([], kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a\tb\nno tab\n", "line 2: expected"),
        (b"a\tb\tc\n", "line 1: expected"),
        (b"a\t \n", "line 1: expected"),
        (b"\xff\xfe\t", "is not UTF-8"),
        (b"a\tb\n", "1 different sources are too few"),
    ],
)
def test_wrong_pairs_are_one_line_and_status_2(tmp_path: Path, content: bytes | None, message: str, capsys) -> None:
    path = tmp_path / "pairs.tsv"
    if content is not None:
        path.write_bytes(content)
    assert translation.main(["--pairs", str(path), "--quiet", "--small", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_more_pairs_than_there_are(tmp_path: Path, capsys) -> None:
    arguments = ["--kinds", "dates", "--count", "500000", "--quiet", "--out", str(tmp_path)]
    assert translation.main(arguments) == 2
    assert "different dates; lower --count" in capsys.readouterr().err


def test_signs_of_mathematics_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"it costs $x{i}^ and $y_\t0 $a$ $b^$\n" for i in range(20)))
    arguments = ["--pairs", str(path), "--small", "--steps", "2", "--hidden-size", "4", "--quiet"]
    assert translation.main([*arguments, "--out", str(tmp_path / "out")]) == 0


def test_a_line_longer_than_memory(tmp_path: Path, capsys) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{letter}{'x' * 300_000}\t{letter}\n" for letter in "abc"))
    assert (
        translation.main(["--pairs", str(path), "--quiet", "--hidden-size", "65536", "--out", str(tmp_path / "o")]) == 2
    )
    assert "GiB of memory" in capsys.readouterr().err


def session(tmp_path: Path, *arguments: str) -> translation.Session:
    return translation.Session(translation.parse(["--small", "--quiet", "--out", str(tmp_path), *arguments]))


def test_no_source_is_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"s{i % 30}\tt{i}\n" for i in range(90)))  # three translations of each
    corpus = translation.corpus_of(translation.parse(["--pairs", str(path), "--held-out", "0.2"]))
    assert len(corpus.valid) == 18
    assert not {source for source, _ in corpus.train} & {source for source, _ in corpus.valid}


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """A source alone, and beside a longer one: the same logits; attention is 0 on the padding and sums to 1."""
    model = session(tmp_path, "--count", "50").model.eval()
    source, said = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[1, 5, 6]])
    beside = torch.tensor([[5, 6, 7, 2, 0, 0], [4, 5, 6, 7, 8, 2]])
    alone = model(source, torch.tensor([4]), said)
    both = model(beside, torch.tensor([4, 6]), said.expand(2, -1))
    torch.testing.assert_close(both[:1], alone)
    _, attention = model.translate(beside, torch.tensor([4, 6]), 5)
    assert not attention[0, :, 4:].any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))


def test_one_unit_at_a_time_is_the_same_as_all_at_once(tmp_path: Path) -> None:
    """Decoding step by step gives what teacher forcing gives on its own translation."""
    model = session(tmp_path, "--count", "50").model.eval()
    source, lengths = torch.randint(4, 12, (3, 7)), torch.tensor([7, 7, 7])
    codes, _ = model.translate(source, lengths, 6)
    said = torch.cat((torch.full((3, 1), pairs.START), codes[:, :-1]), 1)
    assert torch.equal(model(source, lengths, said).argmax(-1), codes)


def test_it_reaches_its_target(tmp_path: Path) -> None:
    """At least 95% of held-out dates to the letter; and the figure has a map for every text."""
    arguments = ["--kinds", "dates", "--count", "2000", "--hidden-size", "32", "--steps", "150", "--evaluations", "2"]
    found = session(tmp_path, *arguments, "--learning-rate", "0.015", "--dropout", "0")
    found.train()
    share, said = found.exact_matches()
    assert len(said) == len(found.corpus.valid) == 200
    assert share >= 0.95
    assert len(translation.attention_figure(found, ["May 3 1987", "the 1st of June 1901"]).axes) == 3
