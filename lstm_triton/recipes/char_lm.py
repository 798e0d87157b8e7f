"""A character language model on real text: the whole way from a file to generated text.

    python -m lstm_triton.recipes.char_lm --out demo
    python -m lstm_triton.recipes.char_lm --text my_book.txt --layers 3 --hidden-size 512

Embedding, stacked LSTM with dropout, optional weight tying; Adam, gradient clipping,
ReduceLROnPlateau, truncated backpropagation through time with the state carried and detached.
Writes to --out: best.pt (the checkpoint with the lowest validation loss), loss.png, sample.txt.
The default text is the documentation that ships inside every CPython.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import LSTM, explain
from .shared.command import Parser, number, ready, require_memory, run, whole, write_atomically
from .shared.drawing import save
from .shared.kernel_check import largest_differences
from .shared.text import Corpus, batches, default_text, read_text
from .shared.training import Curve, evaluation, fit, save_checkpoint

State = tuple[Tensor, Tensor]


def perplexity(loss: float) -> str:
    """exp of a loss in nats per character, as text."""
    return f"{math.exp(min(loss, 700.0)):.2f}" if loss < 20 else f"e^{loss:.0f}"


class CharLM(nn.Module):
    """Embedding, LSTM, dropout and a decoder, which shares the embedding's weight if `tie`."""

    def __init__(
        self,
        characters: int,
        embedding_size: int,
        hidden_size: int,
        layers: int,
        dropout: float,
        tie: bool,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden_size if tie else embedding_size)
        between = dropout if layers > 1 else 0.0
        self.lstm = LSTM(self.embedding.embedding_dim, hidden_size, layers, dropout=between, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden_size, characters)
        if tie:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
            self.embedding.weight = self.decoder.weight

    def forward(self, codes: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """codes [T, B] -> logits [T, B, characters] and the state after the last step."""
        output, state = self.lstm(self.embedding(codes), state)
        return self.decoder(self.dropout(output)), state


@torch.no_grad()
def evaluate(model: CharLM, codes: Tensor, batch: int, seq_len: int) -> float:
    """Mean loss in nats per character, in the model's mode; the state runs on over the whole text."""
    state, total, count = None, 0.0, 0
    for inputs, targets in batches(codes, batch, seq_len):
        logits, state = model(inputs, state)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count


def generate(model: CharLM, alphabet: str, length: int, temperature: float, seed: int = 0, prompt: str = "\n") -> str:
    """Draw `length` characters after a prompt, of which characters that the model does not know are left out.

    A lower temperature draws the likelier ones more often.
    """
    generator = torch.Generator().manual_seed(seed)
    known = [alphabet.index(character) for character in prompt if character in alphabet] or [0]
    codes, state, drawn = torch.tensor(known, device=model.decoder.weight.device).unsqueeze(1), None, []
    with evaluation(model):
        for _ in range(length):
            logits, state = model(codes, state)
            scores = logits[-1, 0].double().cpu()
            probabilities = ((scores - scores.max()) / temperature).softmax(0)
            drawn.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            codes = codes[:1].fill_(drawn[-1])
    return "".join(alphabet[code] for code in drawn)


def perplexity_figure(curve: Curve, unigram: float) -> Figure:
    """Losses against characters trained on, with perplexity on the right."""
    figure = curve.figure("Character language model", "nats per character", {"unigram baseline": unigram})
    right = figure.axes[0].secondary_yaxis("right", functions=(np.exp, lambda p: np.log(np.maximum(p, 1e-9))))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_formatter("{x:.3g}")
    return figure


def train(model: CharLM, corpus: Corpus, options: argparse.Namespace, curve: Curve) -> None:
    """Train for options.steps windows; keep the best checkpoint in options.out / "best.pt"."""
    stream: Iterator[tuple[Tensor, Tensor]] = iter(())
    state: State | None = None

    def loss_of(_: int) -> Tensor:
        nonlocal stream, state
        window = next(stream, None)
        if window is None:  # the text from its beginning again, with a fresh state
            stream, state = batches(corpus.train, options.batch, options.seq_len), None
            window = next(stream)
        inputs, targets = window
        logits, state = model(inputs, None if state is None else (state[0].detach(), state[1].detach()))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def keep(step: int, valid: float) -> None:
        more = {"sizes": model_sizes(options, corpus), "alphabet": corpus.alphabet, "step": step, "valid_loss": valid}
        save_checkpoint(options.out / "best.pt", model, **more)

    fit(
        model,
        loss_of,
        lambda: evaluate(model, corpus.valid, options.batch, options.seq_len),
        options,
        keep=keep,
        curve=curve,
        schedule=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
        unit="character",
        per_step=options.batch * min(options.seq_len, len(corpus.train) // options.batch),
    )


def model_sizes(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    return {
        "characters": len(corpus.alphabet),
        "embedding_size": options.embedding_size,
        "hidden_size": options.hidden_size,
        "layers": options.layers,
        "dropout": options.dropout,
        "tie": options.tie,
    }


def load(path: Path, backend: str = "auto") -> tuple[CharLM, str]:
    """The model of a checkpoint, in evaluation mode, and its alphabet."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = CharLM(**checkpoint["sizes"], backend=backend)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["alphabet"]


def report(model: CharLM, corpus: Corpus, curve: Curve) -> str:
    """The closing table: perplexities, the path of every layer, and our kernels against nn.LSTM."""
    steps = min(16, len(corpus.valid) // 2)
    rows = min(4, len(corpus.valid) // steps)
    inputs = corpus.valid[: rows * steps].view(rows, steps).t()  # small: it may run in the interpreter
    embedded = model.embedding(inputs).detach()
    where, differences = largest_differences(model.lstm, embedded)
    lines = [
        f"{'validation perplexity':28} {perplexity(curve.best)}",
        f"{'unigram baseline':28} {perplexity(corpus.unigram_loss())}",
        *(
            f"{'path of layer ' + str(layer.layer):28} {layer.path}: {layer.reason}"
            for layer in explain(model.lstm, embedded).layers
        ),
        f"{'kernels ran on':28} {where}",
        *(f"{'largest difference, ' + name:28} {value:.1e} from nn.LSTM" for name, value in differences.items()),
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("char_lm", __doc__)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: Python's documentation)")
    parser.training(steps=600, small_steps=60, batch=32, learning_rate=4e-3)
    parser.option("seq_len", 64, whole(), "characters of a window", small=32)
    parser.option("hidden_size", 256, whole(), small=64)
    parser.option("embedding_size", 64, whole(), small=16, not_with="tie")
    parser.option("layers", 2, whole(), small=1)
    parser.option("dropout", 0.1, number(least=0, below=1))
    parser.add_argument("--tie", action="store_true", help="share the weights of embedding and decoder")
    parser.option("sample", 600, whole(), "characters to draw afterwards", small=200)
    parser.option("temperature", 0.7, number(), "of the draw: lower is surer, higher is more varied")
    parser.common("char_lm")
    return parser.parse(arguments)


def prepare(options: argparse.Namespace) -> tuple[Corpus, CharLM]:
    """The corpus and the model, on the device. Raises Refused for wrong input."""
    text = default_text() if options.text is None else read_text(options.text)
    corpus = Corpus.from_text(text, shortest=2 * options.batch)
    torch.manual_seed(options.seed)
    model = CharLM(**model_sizes(options, corpus), backend=options.backend)
    steps = min(options.seq_len, len(corpus.train) // options.batch)
    device = ready(options, model.lstm)
    states = 6 * options.hidden_size * options.layers + len(corpus.alphabet)  # kept floats a character: see the README
    require_memory(4 * steps * options.batch * states, device, f"a window of {steps} characters")
    corpus = Corpus(corpus.alphabet, corpus.train.to(device), corpus.valid.to(device))
    return corpus, model.to(device)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("char_lm", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    """Train, plot whatever happens, sample from the best checkpoint and report."""
    corpus, model = prepare(options)
    curve = Curve()
    characters = len(corpus.train) + len(corpus.valid)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{characters:,} characters, {len(corpus.alphabet)} different ones, {parameters:,} parameters, {options.device}"
    )
    try:
        train(model, corpus, options, curve)
    finally:
        if curve.steps:
            save(perplexity_figure(curve, corpus.unigram_loss()), options.out / "loss.png")
    best, alphabet = load(options.out / "best.pt")
    sample = generate(best, alphabet, options.sample, options.temperature, options.seed)
    write_atomically(options.out / "sample.txt", lambda part: part.write_text(sample, encoding="utf-8"))
    print(f"\n--- {options.sample} characters at temperature {options.temperature} ---\n{sample}\n---\n")
    print(report(model, corpus, curve))
    print(f"\nwritten: {', '.join(str(options.out / name) for name in ('best.pt', 'loss.png', 'sample.txt'))}")


if __name__ == "__main__":
    sys.exit(main())
