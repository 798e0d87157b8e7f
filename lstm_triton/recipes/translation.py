"""Translation with attention: a bidirectional encoder, an LSTM decoder, and a look at what it attends to.

    python -m lstm_triton.recipes.translation --out translation
    python -m lstm_triton.recipes.translation --pairs my_pairs.tsv --unit word --hidden-size 256

Without --pairs the corpus is generated: numbers in words to digits ("two hundred and five" -> "205") and dates in four
ways of writing them to one ("the 3rd of May 1987" -> "1987-05-03"), character by character. A file of pairs has a line
"source TAB target" for each. The decoder attends after its LSTM (Luong, Pham and Manning, 2015, "general" score), so
that in training the whole target goes through one call.
Writes to --out: best.pt, loss.png, attention.png, translations.csv (held-out source, target, what the model says).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import LSTM
from ..diagnostics.drawing import panels
from .shared.command import Parser, Refused, number, ready, require_memory, run, save_table, whole
from .shared.drawing import heat, save, shorten, visible
from .shared.pairs import END, PAD, START, UNITS, Pair, Vocabulary, generated, read_pairs
from .shared.training import Curve, evaluation, fit, save_checkpoint

State = tuple[Tensor, Tensor]


class Translator(nn.Module):
    """Encoder, attention and decoder; every batch is [B, T]."""

    def __init__(self, sources: int, targets: int, embedding_size: int, hidden_size: int, dropout: float, backend: str):
        super().__init__()
        self.read = nn.Embedding(sources, embedding_size, padding_idx=PAD)
        self.write = nn.Embedding(targets, embedding_size, padding_idx=PAD)
        options: dict[str, Any] = dict(batch_first=True, backend=backend)
        self.encoder = LSTM(embedding_size, hidden_size, bidirectional=True, **options)
        self.bridge = nn.Linear(2 * hidden_size, 2 * hidden_size)
        self.decoder = LSTM(embedding_size, hidden_size, **options)
        self.score = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.combine = nn.Linear(3 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, targets)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """source [B, S], lengths [B] -> states of every step [B, S, 2H] and the decoder's first state [1, B, H]."""
        states, (h_n, _) = self.encoder(self.dropout(self.read(source)), lengths=lengths)
        h_0, c_0 = self.bridge(torch.cat((h_n[0], h_n[1]), dim=-1)).unsqueeze(0).chunk(2, dim=-1)
        return states, (h_0.tanh().contiguous(), c_0.contiguous())

    def decode(self, said: Tensor, states: Tensor, padding: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """said [B, T] -> logits [B, T, targets], attention [B, T, S] (rows sum to 1), the state after the last step."""
        h, state = self.decoder(self.dropout(self.write(said)), state)
        scores = self.score(h) @ states.transpose(1, 2)
        attention = scores.masked_fill(padding.unsqueeze(1), -torch.inf).softmax(-1)
        combined = self.combine(torch.cat((h, attention @ states), dim=-1)).tanh()
        return self.head(self.dropout(combined)), attention, state

    def forward(self, source: Tensor, lengths: Tensor, said: Tensor) -> Tensor:
        """Logits [B, T, targets] for what follows each prefix of `said`."""
        states, state = self.encode(source, lengths)
        return self.decode(said, states, source == PAD, state)[0]

    def translate(self, source: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The likeliest unit at every step: codes [B, T] and attention [B, T, S], T at most `longest`."""
        states, state = self.encode(source, lengths)
        said = source.new_full((len(source), 1), START)
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        codes, looks = [], []
        for _ in range(longest):
            logits, attention, state = self.decode(said, states, source == PAD, state)
            said = logits.argmax(-1)
            codes.append(said)
            looks.append(attention)
            ended |= said.squeeze(1) == END
            if bool(ended.all()):
                break
        return torch.cat(codes, dim=1), torch.cat(looks, dim=1)


class Corpus(NamedTuple):
    """Pairs to train on, pairs held out, and both vocabularies, from the training pairs alone."""

    train: list[Pair]
    valid: list[Pair]
    sources: Vocabulary
    targets: Vocabulary


def corpus_of(options: argparse.Namespace) -> Corpus:
    """The corpus of --pairs, or a generated one. No source is on both sides of the split. Raises Refused."""
    pairs = (
        read_pairs(options.pairs)
        if options.pairs is not None
        else generated(options.kinds, options.count, options.seed)
    )
    sources = sorted({source for source, _ in pairs})
    random.Random(options.seed).shuffle(sources)
    chosen = set(sources[: max(1, round(options.held_out * len(sources)))])
    train = [pair for pair in pairs if pair[0] not in chosen]
    if not train:
        raise Refused(f"{len(sources)} different sources are too few to hold any out")
    vocabularies = [Vocabulary.of(texts, options.unit) for texts in zip(*train)]
    return Corpus(train, [pair for pair in pairs if pair[0] in chosen], *vocabularies)


class Session:
    """A model with its corpus, on a device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.corpus = corpus_of(options)
        self.device = ready(options, LSTM(1, 1, backend=options.backend))
        units = UNITS[options.unit][0]
        lengths = [max(len(units(text)) for text in texts) + 1 for texts in zip(*self.corpus.train, *self.corpus.valid)]
        kept = 12 * options.hidden_size * sum(lengths) + lengths[1] * (lengths[0] + 4 * lengths[1])
        what = f"a source of {lengths[0]:,} and a target of {lengths[1]:,} {options.unit}s"
        require_memory(4 * options.batch * kept, self.device, what)
        self.longest = lengths[1]
        torch.manual_seed(options.seed)
        self.model = Translator(
            len(self.corpus.sources),
            len(self.corpus.targets),
            options.embedding_size,
            options.hidden_size,
            options.dropout,
            options.backend,
        )
        self.model.to(self.device)
        self.random = random.Random(options.seed)

    def encoded(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """Source codes [B, S], their lengths [B], target codes [B, T], on the device."""
        source, lengths = self.corpus.sources.encode([source for source, _ in pairs])
        target, _ = self.corpus.targets.encode([target for _, target in pairs])
        return source.to(self.device), lengths.to(self.device), target.to(self.device)

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """Cross entropy in nats a unit of the target; the model is given what stands before it."""
        source, lengths, target = self.encoded(pairs)
        said = F.pad(target[:, :-1], (1, 0), value=START)
        logits = self.model(source, lengths, said)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)

    def train(self, curve: Curve | None = None) -> Curve:
        """Train; the best weights are in best.pt, and in the model at the end."""
        options, path = self.options, self.options.out / "best.pt"
        sizes = {name: getattr(options, name) for name in ("embedding_size", "hidden_size", "dropout", "unit")}
        sizes |= {"sources": self.corpus.sources.units, "targets": self.corpus.targets.units}
        curve = fit(
            self.model,
            lambda _: self.loss(self.random.choices(self.corpus.train, k=options.batch)),
            lambda: float(self.loss(self.corpus.valid[:512])),
            options,
            keep=lambda step, valid: save_checkpoint(path, self.model, step=step, valid_loss=valid, **sizes),
            curve=curve,
            schedule=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
        )
        self.model.load_state_dict(torch.load(path, weights_only=True)["model"])
        return curve

    def translate(self, texts: Sequence[str]) -> tuple[list[str], list[Tensor]]:
        """What the model makes of each text, and where it looked: [target units, source units], END included."""
        said, looks = [], []
        with evaluation(self.model):
            for start in range(0, len(texts), 256):
                source, lengths = self.corpus.sources.encode(texts[start : start + 256])
                codes, attention = self.model.translate(source.to(self.device), lengths.to(self.device), self.longest)
                for row, look, length in zip(codes.tolist(), attention.cpu(), lengths.tolist()):
                    steps = row.index(END) + 1 if END in row else len(row)
                    said.append(self.corpus.targets.decode(row))
                    looks.append(look[:steps, :length])
        return said, looks

    def exact_matches(self) -> tuple[float, list[str]]:
        """The share of held-out pairs that are translated to the letter, and all translations."""
        said, _ = self.translate([source for source, _ in self.corpus.valid])
        return sum(a == b for a, (_, b) in zip(said, self.corpus.valid)) / len(said), said


def attention_figure(session: Session, texts: Sequence[str]) -> Figure:
    """One heat map a text: which units of the source (columns) each unit of the translation (rows) came from."""
    said, looks = session.translate(texts)
    units, words = UNITS[session.options.unit][0], session.options.unit == "word"
    longest = max(len(look) for look in looks)
    figure, axes = panels(len(texts), 1, 9, max(2.6, 0.19 * longest) * len(texts) + words)
    for axis, text, translation, look in zip(axes, texts, said, looks):
        rows, columns = ([*visible(units(one)), "(end)"] for one in (translation, text))
        image = heat(axis, look, rows=rows[: len(look)], columns=columns)
        title = f"{shorten(text, 60)} \N{RIGHTWARDS ARROW} {shorten(translation, 60)}"
        axis.set_title(title, fontsize=10 if len(title) < 70 else 7, parse_math=False)
        axis.set(xlabel="reads", ylabel="writes")
        axis.tick_params(labelsize=7)
        if words:
            axis.tick_params("x", rotation=60)
        else:
            axis.get_xticklabels()[-1].set(rotation=60)
    figure.colorbar(image, ax=axes, label="attention", shrink=0.6)
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("translation", __doc__)
    parser.add_argument("--pairs", metavar="FILE", help="lines source TAB target, in place of the generated corpus")
    parser.option("kinds", ["dates", "numbers"], str, "what is generated", choices=("dates", "numbers"), nargs="+",
                  metavar="dates|numbers", not_with="pairs")  # fmt: skip
    parser.option("count", 12_000, whole(10, 500_000), "generated pairs", small=1_500, not_with="pairs")
    parser.option("held_out", 0.1, number(below=1), "share of the sources that training does not see")
    parser.add_argument("--unit", choices=tuple(UNITS), default="character", help="default: %(default)s")
    parser.option("embedding_size", 32, whole())
    parser.option("hidden_size", 128, whole(), small=32)
    parser.option("dropout", 0.1, number(least=0, below=1))
    parser.training(steps=1500, small_steps=60, batch=64, learning_rate=4e-3)
    parser.common("translation")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("translation", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    session, curve = Session(options), Curve()
    corpus, out = session.corpus, options.out
    print(
        f"{len(corpus.train):,} pairs to train on, {len(corpus.valid):,} held out; {len(corpus.sources)} units are read"
    )
    try:
        session.train(curve)
    finally:
        if curve.steps:
            save(curve.figure("Translation", f"nats per {options.unit}"), out / "loss.png")
    share, said = session.exact_matches()
    rows = [(source, target, text) for (source, target), text in zip(corpus.valid, said)]
    save_table(out / "translations.csv", ("source", "target", "translation"), rows)
    save(attention_figure(session, [source for source, _ in corpus.valid[:3]]), out / "attention.png")
    for source, target, text in rows[:8]:
        print(f"{'right' if text == target else 'wrong'}  {source} -> {text}")
    print(f"exact matches on held-out pairs: {share:.1%}")
    print(f"written: best.pt, loss.png, attention.png, translations.csv in {out}")


if __name__ == "__main__":
    sys.exit(main())
