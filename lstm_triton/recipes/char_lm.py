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
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import LSTM, explain
from .kernel_check import largest_differences
from .text import Corpus, CorpusError, batches, default_text, read_text

State = tuple[Tensor, Tensor]


class Diverged(ArithmeticError):
    """Training has left the finite numbers; the message is one line for the user."""


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
    """Mean loss in nats per character; the state runs on over the whole text."""
    training, state, total, count = model.training, None, 0.0, 0
    model.eval()
    for inputs, targets in batches(codes, batch, seq_len):
        logits, state = model(inputs, state)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    model.train(training)
    return total / count


@torch.no_grad()
def generate(model: CharLM, alphabet: str, length: int, temperature: float, seed: int = 0) -> str:
    """Draw `length` characters; a lower temperature draws the likelier ones more often."""
    training = model.training
    model.eval()
    device = model.decoder.weight.device
    generator = torch.Generator().manual_seed(seed)
    code, state, drawn = torch.zeros((1, 1), dtype=torch.long, device=device), None, []
    code.fill_(max(alphabet.find("\n"), 0))
    for _ in range(length):
        logits, state = model(code, state)
        probabilities = (logits[0, 0].float().cpu() / temperature).softmax(0)
        drawn.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        code.fill_(drawn[-1])
    model.train(training)
    return "".join(alphabet[code] for code in drawn)


def write_atomically(path: Path, write: Any) -> None:
    """Let write(temporary path) make the file, then move it into place: a reader never sees half of it."""
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


@dataclass
class History:
    """Losses in nats per character, against the number of characters trained on."""

    unigram: float
    trained: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)

    def plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        axes.plot(self.trained, self.train, marker="o", markersize=3, label="training")
        axes.plot(self.trained, self.valid, marker="o", markersize=3, label="validation")
        axes.axhline(self.unigram, color="grey", linestyle="--", label="unigram baseline")
        axes.set(xlabel="characters trained on", ylabel="loss (nats per character)", title="Character language model")
        axes.legend()
        axes.grid(alpha=0.3)
        write_atomically(path, lambda part: figure.savefig(part, dpi=150))
        pyplot.close(figure)


def train(model: CharLM, corpus: Corpus, options: argparse.Namespace, history: History, out: Path) -> None:
    """Train for options.steps windows; keep the best checkpoint in out / "best.pt"."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    stream: Iterator[tuple[Tensor, Tensor]] = iter(())
    state: State | None = None
    losses: list[float] = []
    best, seen = math.inf, 0
    every = max(1, options.steps // options.evaluations)
    started, validating = time.perf_counter(), 0.0
    with tqdm(total=options.steps, unit="step", disable=options.quiet) as bar:
        for step in range(1, options.steps + 1):
            window = next(stream, None)
            if window is None:  # the text from its beginning again, with a fresh state
                stream, state = batches(corpus.train, options.batch, options.seq_len), None
                window = next(stream)
            inputs, targets = window
            logits, state = model(inputs, None if state is None else (state[0].detach(), state[1].detach()))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step}; try a lower --learning-rate")
            seen += targets.numel()
            speed = seen / (time.perf_counter() - started - validating)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} characters/s", refresh=False)
            bar.update()
            if step % every == 0 or step == options.steps:
                before = time.perf_counter()
                valid = evaluate(model, corpus.valid, options.batch, options.seq_len)
                validating += time.perf_counter() - before
                if not math.isfinite(valid):
                    raise Diverged(f"the validation loss is {valid} at step {step}; try a lower --learning-rate")
                scheduler.step(valid)
                history.trained.append(seen)
                history.train.append(sum(losses) / len(losses))
                history.valid.append(valid)
                losses = []
                perplexities = f"perplexity {perplexity(history.train[-1])}, in validation {perplexity(valid)}"
                bar.write(f"step {step}: loss {history.train[-1]:.3f}, {perplexities}", file=sys.stdout)
                if valid < best:
                    best = valid
                    checkpoint = {
                        "model": model.state_dict(),
                        "sizes": model_sizes(options, corpus),
                        "alphabet": corpus.alphabet,
                        "step": step,
                        "valid_loss": valid,
                    }
                    write_atomically(out / "best.pt", lambda part, saved=checkpoint: torch.save(saved, part))


def model_sizes(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    return {
        "characters": len(corpus.alphabet),
        "embedding_size": options.embedding_size,
        "hidden_size": options.hidden_size,
        "layers": options.layers,
        "dropout": options.dropout,
        "tie": options.tie,
    }


def load(path: Path) -> tuple[CharLM, str]:
    """The model of a checkpoint, in evaluation mode, and its alphabet."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = CharLM(**checkpoint["sizes"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["alphabet"]


def report(model: CharLM, corpus: Corpus, history: History) -> str:
    """The closing table: perplexities, the path of every layer, and our kernels against nn.LSTM."""
    inputs = corpus.valid[: 4 * 16].view(4, 16).t()  # small: it may run in the interpreter
    embedded = model.embedding(inputs).detach()
    where, differences = largest_differences(model.lstm, embedded)
    lines = [
        f"{'validation perplexity':28} {perplexity(min(history.valid))}",
        f"{'unigram baseline':28} {perplexity(history.unigram)}",
        *(
            f"{'path of layer ' + str(layer.layer):28} {layer.path}: {layer.reason}"
            for layer in explain(model.lstm, embedded).layers
        ),
        f"{'kernels ran on':28} {where}",
        *(f"{'largest difference, ' + name:28} {value:.1e} from nn.LSTM" for name, value in differences.items()),
    ]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: Python's documentation)")
    parser.add_argument(
        "--out", type=Path, default=Path("char_lm"), help="folder for the results (default: %(default)s)"
    )
    integers = dict(
        steps=600, evaluations=10, batch=32, seq_len=64, hidden_size=256, embedding_size=64, layers=2, sample=600
    )
    for name, default in integers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help="default: %(default)s"
        )
    for name, value in dict(dropout=0.1, learning_rate=4e-3, clip=1.0, temperature=0.7).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, metavar="X", help="default: %(default)s"
        )
    parser.add_argument("--tie", action="store_true", help="share the weights of embedding and decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    for name in integers:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("learning_rate", "clip", "temperature"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be in [0, 2^63), got {options.seed}")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be in [0, 1), got {options.dropout}")
    return options


def prepare(options: argparse.Namespace) -> tuple[Corpus, CharLM]:
    """The corpus and the model, on the device. Raises CorpusError, OSError or RuntimeError for wrong input."""
    text = default_text() if options.text is None else read_text(options.text)
    corpus = Corpus.from_text(text, shortest=2 * options.batch)
    corpus = Corpus(corpus.alphabet, corpus.train.to(options.device), corpus.valid.to(options.device))
    model = CharLM(**model_sizes(options, corpus), backend=options.backend).to(options.device)
    model.lstm.refusal(model.decoder.weight)  # raises where --backend triton is not possible
    options.out.mkdir(parents=True, exist_ok=True)
    return corpus, model


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    try:
        corpus, model = prepare(options)
    except (CorpusError, OSError, RuntimeError, AssertionError) as error:  # torch asserts that CUDA is there
        print(f"char_lm: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    history = History(corpus.unigram_loss())
    try:
        run(model, corpus, options, history)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the best checkpoint so far, if there is one, is in {options.out}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"char_lm: {error}", file=sys.stderr)
        return 1
    return 0


def run(model: CharLM, corpus: Corpus, options: argparse.Namespace, history: History) -> None:
    """Train, plot whatever happens, sample from the best checkpoint and report."""
    characters = len(corpus.train) + len(corpus.valid)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{characters:,} characters, {len(corpus.alphabet)} different ones, {parameters:,} parameters, {options.device}"
    )
    try:
        train(model, corpus, options, history, options.out)
    finally:
        if history.trained:
            history.plot(options.out / "loss.png")
    best, alphabet = load(options.out / "best.pt")
    sample = generate(best, alphabet, options.sample, options.temperature, options.seed)
    write_atomically(options.out / "sample.txt", lambda part: part.write_text(sample, encoding="utf-8"))
    print(f"\n--- {options.sample} characters at temperature {options.temperature} ---\n{sample}\n---\n")
    print(report(model, corpus, history))
    print(f"\nwritten: {', '.join(str(options.out / name) for name in ('best.pt', 'loss.png', 'sample.txt'))}")


if __name__ == "__main__":
    sys.exit(main())
