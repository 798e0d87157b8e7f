"""Classification of sequences, with one, two and three layers: digits row by row, or texts of a CSV file.

    python -m lstm_triton.recipes.classification --out classification
    python -m lstm_triton.recipes.classification --csv reviews.csv --text-column text --label-column sentiment

Without --csv the data are scikit-learn's bundled digits: 1797 images of 8 x 8, of which the network reads a row a step.
Texts are split into words, embedded and read with their lengths, in both directions; the answer is read off the last
states h_n. A fifth of the rows, the same share of every class, is held out.
Writes to --out: loss.png (against steps, for every depth), confusion.png (of the best depth), results.csv, and
layers_N.pt, the best weights of every depth.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .. import LSTM
from ..diagnostics.drawing import BLUE, GREEN, ORANGE, RED, canvas, panels
from .shared.command import Parser, Refused, number, ready, require_memory, run, save_table, whole
from .shared.drawing import heat, save
from .shared.tables import read_columns
from .shared.training import Curve, evaluation, fit, save_checkpoint

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
PAD, UNKNOWN = 0, 1


class Rows(NamedTuple):
    """x [B, T, features] or codes [B, T]; lengths [B]; labels [B]."""

    x: Tensor
    lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(tensor.to(device) for tensor in self))

    def take(self, chosen: Tensor) -> Rows:
        return Rows(*(tensor[chosen] for tensor in self))


class Data(NamedTuple):
    """What is learnt: rows to train on and held out, names of the classes, words (none for images)."""

    train: Rows
    valid: Rows
    classes: list[str]
    words: list[str]

    @property
    def chance(self) -> float:
        """The accuracy of always naming the class that is most frequent in training."""
        most = self.train.labels.bincount().argmax()
        return float((self.valid.labels == most).float().mean())


def split(x: Tensor, lengths: Tensor, labels: Tensor, held_out: float, seed: int) -> tuple[Rows, Rows]:
    """Raises Refused where a class is too small to be split."""
    try:
        train, valid = train_test_split(range(len(labels)), test_size=held_out, stratify=labels, random_state=seed)
    except ValueError as error:
        raise Refused(f"cannot hold out {held_out:.0%} of every class: {error}") from error
    rows = Rows(x, lengths, labels)
    return rows.take(torch.tensor(train)), rows.take(torch.tensor(valid))


def digits(held_out: float, seed: int) -> Data:
    """8 steps of 8 brightnesses in [0, 1]."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target)
    lengths = torch.full_like(labels, 8)
    return Data(*split(images, lengths, labels, held_out, seed), [str(name) for name in bunch.target_names], [])


def texts(options: argparse.Namespace) -> Data:
    """The rows of --csv. The words are those of the training rows, the frequent ones first. Raises Refused."""
    found = read_columns(options.csv, [options.text_column, options.label_column])
    classes = sorted({label for _, label in found})
    if len(classes) < 2:
        raise Refused(f"{options.csv}: all rows have the label {classes[0]!r}")
    split_texts = [WORD.findall(text.lower())[: options.longest] for text, _ in found]
    if not all(split_texts):
        raise Refused(f"{options.csv}, row {1 + [bool(t) for t in split_texts].index(False)}: no word in the text")
    labels = torch.tensor([classes.index(label) for _, label in found])
    number_of_row = torch.arange(len(found))
    train, valid = split(number_of_row, number_of_row, labels, options.held_out, options.seed)
    counts: dict[str, int] = {}
    for row in train.x.tolist():
        for word in split_texts[row]:
            counts[word] = counts.get(word, 0) + 1
    words = sorted((word for word in counts if counts[word] >= options.least), key=lambda word: (-counts[word], word))
    if not words:
        raise Refused(f"the vocabulary is empty: no word stands {options.least} times in the training rows")
    code = {word: i + 2 for i, word in enumerate(words)}

    def rows(part: Rows) -> Rows:
        codes = [torch.tensor([code.get(word, UNKNOWN) for word in split_texts[row]]) for row in part.x.tolist()]
        lengths = torch.tensor([len(row) for row in codes])
        return Rows(pad_sequence(codes, batch_first=True, padding_value=PAD), lengths, part.labels)

    return Data(rows(train), rows(valid), classes, words)


class Classifier(nn.Module):
    """Embedding of words, if there are any; LSTM in both directions; a linear layer on the last layer's h_n."""

    def __init__(self, words: int, features: int, hidden_size: int, layers: int, classes: int, dropout: float,
                 backend: str = "auto") -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(words + 2, features, padding_idx=PAD) if words else nn.Identity()
        between = dropout if layers > 1 else 0.0
        self.lstm = LSTM(
            features, hidden_size, layers, batch_first=True, dropout=between, bidirectional=True, backend=backend
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden_size, classes)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x [B, T, features] or codes [B, T], lengths [B] (None: all T) -> logits [B, classes]."""
        _, (h_n, _) = self.lstm(self.dropout(self.embedding(x)), lengths=lengths)
        return self.head(self.dropout(torch.cat((h_n[-2], h_n[-1]), dim=-1)))


class Result(NamedTuple):
    """A trained depth: share of held-out rows that are right, and what was said of each."""

    layers: int
    accuracy: float
    curve: Curve
    said: Tensor


def classify(data: Data, layers: int, options: argparse.Namespace) -> Result:
    """Train a network of this depth; its best weights are written to --out."""
    torch.manual_seed(options.seed)
    features = options.embedding_size if data.words else data.train.x.shape[-1]
    sizes = (len(data.words), features, options.hidden_size, layers, len(data.classes), options.dropout)
    model = Classifier(*sizes, backend=options.backend)
    device = ready(options, model.lstm)
    model.to(device)
    steps = max(data.train.x.shape[1], data.valid.x.shape[1])
    need = 4 * 12 * options.hidden_size * layers * max(options.batch, len(data.valid.labels)) * steps
    require_memory(need, device, f"a text of {steps} words")
    train, valid = data.train.to(device), data.valid.to(device)
    draw = torch.Generator().manual_seed(options.seed)
    best: dict[str, Tensor] = {}

    def logits_of(rows: Rows) -> Tensor:
        longest = int(rows.lengths.max())
        return model(rows.x[:, :longest], rows.lengths if data.words else None)

    def loss_of(_: int) -> Tensor:
        rows = train.take(torch.randint(len(train.labels), (options.batch,), generator=draw).to(device))
        return F.cross_entropy(logits_of(rows), rows.labels)

    def keep(*_: float) -> None:
        best.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def measure() -> float:
        return float(F.cross_entropy(logits_of(valid), valid.labels))

    curve = fit(model, loss_of, measure, options, keep=keep, name=f"{layers} layers" if layers > 1 else "1 layer")
    model.load_state_dict(best)
    with evaluation(model):
        said = logits_of(valid).argmax(-1).cpu()
    accuracy = float((said == data.valid.labels).float().mean())
    names = ("words", "features", "hidden_size", "layers", "classes", "dropout")
    extra = dict(sizes=dict(zip(names, sizes)), classes=data.classes, words=data.words, accuracy=accuracy)
    save_checkpoint(options.out / f"layers_{layers}.pt", model, **extra)
    return Result(layers, accuracy, curve, said)


def digit_figure(data: Data, shown: int = 8) -> Figure:
    """The first images of the training rows, with their classes."""
    figure, axes = panels(1, shown, shown, 1.4)
    for axis, image, label in zip(axes, data.train.x, data.train.labels):
        axis.imshow(image, cmap="gray_r")
        axis.set_title(data.classes[label])
        axis.axis("off")
    return figure


GOOD, BAD = ("wonderful", "moving", "clever", "a joy"), ("dull", "clumsy", "endless", "a bore")
OPENINGS = ("The film is", "I found it", "To my eyes the second half was", "It is, all in all,")


def write_opinions(path: Path, count: int = 600, seed: int = 0) -> Path:
    """A CSV file of made-up opinions, columns text and label; half of them are turned round by a "not"."""
    draws = random.Random(seed)
    rows = []
    for _ in range(count):
        liked, turned = draws.random() < 0.5, draws.random() < 0.5
        words = draws.choice(GOOD if liked != turned else BAD)
        rows.append((f"{draws.choice(OPENINGS)} {'not ' * turned}{words}.", "good" if liked else "bad"))
    return save_table(path, ("text", "label"), rows)


def loss_figure(results: Sequence[Result]) -> Figure:
    figure, axes = canvas()
    for result, colour in zip(results, itertools.cycle((BLUE, GREEN, RED, "black", ORANGE))):
        label = f"{result.layers} layer{'s' * (result.layers > 1)}: {result.accuracy:.1%} right"
        axes.plot(result.curve.steps, result.curve.valid, marker="o", markersize=3, color=colour, label=label)
        axes.plot(result.curve.steps, result.curve.train, color=colour, alpha=0.4, linestyle="--")
    axes.set(xlabel="optimiser steps", ylabel="loss (nats), dashed: training", title="Held-out rows, by depth")
    axes.set_yscale("log")
    axes.legend()
    return figure


def confusion_figure(data: Data, result: Result) -> Figure:
    """Rows: the true class; columns: what was said."""
    table = confusion_matrix(data.valid.labels, result.said, labels=range(len(data.classes)))
    figure, axes = canvas(5.5, 4.8)
    heat(axes, table, (0, table.max()), rows=data.classes, columns=data.classes, colours="Blues", numbers=False)
    for row, line in enumerate(table):
        for column, count in enumerate(line):
            if count:
                ink = "white" if count > table.max() / 2 else "black"
                axes.text(column, row, count, ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlabel="said", ylabel="true", title=f"{result.layers} layers" if result.layers > 1 else "1 layer")
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("classification", __doc__)
    parser.add_argument("--csv", metavar="FILE", help="texts and labels, in place of the digits")
    parser.option("text_column", "text", str, only_with="csv", metavar="NAME")
    parser.option("label_column", "label", str, only_with="csv", metavar="NAME")
    parser.option("longest", 400, whole(), "words of a text that are read", only_with="csv")
    parser.option("least", 2, whole(), "how often a word must stand in the training rows to be known", only_with="csv")
    parser.option("layers", [1, 2, 3], whole(), "depths to compare", nargs="+", metavar="N", small=[1])
    parser.option("hidden_size", 64, whole(), small=32)
    parser.option("embedding_size", 64, whole(), "of a word", only_with="csv")
    parser.option("dropout", 0.2, number(least=0, below=1))
    parser.option("held_out", 0.2, number(below=1), "share of every class that is not trained on")
    parser.training(steps=600, small_steps=300, batch=64, learning_rate=4e-3)
    parser.common("classification")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("classification", lambda: work(options), options.out)


def load_data(options: argparse.Namespace) -> Data:
    return texts(options) if options.csv is not None else digits(options.held_out, options.seed)


def work(options: argparse.Namespace) -> None:
    data = load_data(options)
    print(
        f"{len(data.train.labels):,} rows to train on, {len(data.valid.labels):,} held out, {len(data.classes)} classes"
    )
    results = [classify(data, layers, options) for layers in options.layers]
    best = max(results, key=lambda result: result.accuracy)
    for result in results:
        print(f"{result.layers} layers: {result.accuracy:.1%} of held-out rows right")
    print(f"most frequent class: {data.chance:.1%}")
    columns = ("layers", "accuracy", "best_loss")
    files = [
        save(loss_figure(results), options.out / "loss.png"),
        save(confusion_figure(data, best), options.out / "confusion.png"),
        save_table(options.out / "results.csv", columns, [(r.layers, r.accuracy, r.curve.best) for r in results]),
    ]
    print(f"written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
