"""Inside a trained character model: what its gates do over a sentence, and what its cell state keeps track of.

    python -m lstm_triton.recipes.char_lm --out demo
    python -m lstm_triton.recipes.char_lm_inside --checkpoint demo/best.pt --out inside

Reads a checkpoint of `char_lm`. Which characters make the model forget is the mean of its forget gates at each of
them, over the validation text. For properties of the text (the position in the line, being inside quotes or
parentheses, the length of the word so far ...) the unit of the cell state is sought that correlates most with each on
one half of the text, and confirmed on the other half (after Karpathy, Johnson and Fei-Fei, 2015).
Writes to --out: gates.png, temperatures.txt, and where the text has frequent characters and properties that change,
forgetting.png and tracking.png.
"""

from __future__ import annotations

import argparse
import pickle
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..diagnostics.drawing import BLUE, RED, panels
from .char_lm import CharLM, generate, load
from .shared.command import Parser, Refused, number, ready, run, whole, write_atomically
from .shared.drawing import heat, save, visible
from .shared.text import Corpus, default_text, read_text

# What torch.load raises for the many kinds of files that are none of its own, and a dictionary of something else.
UNREADABLE = (pickle.UnpicklingError, struct.error, RuntimeError, LookupError, TypeError, ValueError, AttributeError,
              EOFError)  # fmt: skip
SENTENCE = 'The "yield" statement (see section Yield expressions) suspends the function.\n'


class Trace(NamedTuple):
    """A text of N characters through the model, one layer: c [N, H], gates i, f, g, o [N, 4, H], surprise [N].

    surprise: -log p of each character after what stood before it, in nats; that of the first is 0.
    """

    text: str
    c: Tensor
    gates: Tensor
    surprise: Tensor


@torch.no_grad()
def trace(model: CharLM, alphabet: str, text: str, layer: int = -1) -> Trace:
    """Characters that the model does not know are left out. Raises Refused where fewer than two are left."""
    known = "".join(character for character in text if character in alphabet)
    if len(known) < 2:
        raise Refused("the text has fewer than two characters that the model knows")
    codes = torch.tensor([alphabet.index(character) for character in known]).unsqueeze(1)
    codes = codes.to(model.decoder.weight.device)
    h, _, states = model.lstm(model.embedding(codes), return_states=("c", "gates"))
    logs = model.decoder(h).log_softmax(-1)[:-1, 0]
    surprise = torch.cat((logs.new_zeros(1), -logs.gather(1, codes[1:])[:, 0]))
    return Trace(known, states.c[layer][:, 0].cpu(), states.gates[layer][:, 0, 0].cpu(), surprise.cpu())


def forgetting(seen: Trace, least: int | None = None) -> list[tuple[str, float]]:
    """Mean forget gate at each character that stands at least `least` times, the most forgetful one first.

    By default one in 200 of the text: the mean of a few says more of where they stand than of the character.
    """
    means = seen.gates[:, 1].mean(1)
    least = max(10, len(seen.text) // 200) if least is None else least
    found = []
    for character in sorted(set(seen.text)):
        at = torch.tensor([other == character for other in seen.text])
        if int(at.sum()) >= least:
            found.append((character, float(means[at].mean())))
    return sorted(found, key=lambda pair: pair[1])


def properties(text: str) -> dict[str, Tensor]:
    """What a reader could keep track of, as numbers [N] for every character of a text."""
    names = ("position in the line", "length of the word so far", "inside double quotes", "inside parentheses",
             "inside backquotes", "indentation", "line is empty so far")  # fmt: skip
    rows = []
    column = word = depth = indent = 0
    quoted = backquoted = False
    blank = True
    for character in text:
        if character == "\n":
            column = word = depth = indent = 0
            quoted, blank = False, True
        else:
            column += 1
            word = word + 1 if character.isalnum() else 0
            quoted ^= character == '"'
            backquoted ^= character == "`"
            depth = max(0, depth + (character == "(") - (character == ")"))
            blank &= character == " "
            indent = column if blank else indent
        rows.append((column, word, quoted, depth > 0, backquoted, indent, blank))
    return dict(zip(names, torch.tensor(rows, dtype=torch.float32).unbind(1)))


def correlations(c: Tensor, values: Tensor) -> Tensor:
    """Pearson's correlation of every unit c [N, H] with values [N]: [H]; 0 where one of both is constant."""
    c, values = c - c.mean(0), values - values.mean()
    return (c * values[:, None]).sum(0) / (c.norm(dim=0) * values.norm()).clamp(min=1e-12)


class Tracker(NamedTuple):
    """The unit whose c goes most with a property; the correlation in the half where it was found, and in the other."""

    name: str
    unit: int
    found: float
    confirmed: float


def trackers(seen: Trace) -> list[Tracker]:
    """One for every property that changes in both halves, the best confirmed first."""
    half = len(seen.text) // 2
    result = []
    for name, values in properties(seen.text).items():
        if any(part.min() == part.max() for part in (values[:half], values[half:])):
            continue
        first = correlations(seen.c[:half], values[:half])
        unit = int(first.abs().argmax())
        second = correlations(seen.c[half:, unit : unit + 1], values[half:])
        result.append(Tracker(name, unit, float(first[unit]), float(second[0])))
    return sorted(result, key=lambda tracker: -abs(tracker.confirmed))


def gate_figure(seen: Trace, units: int = 24) -> Figure:
    """Forget gates of the units that change most, their mean, and the surprise, character by character."""
    forget = seen.gates[:, 1]
    chosen = forget.std(0).argsort(descending=True)[:units]
    figure, axes = panels(3, 1, 14, 7.5, height_ratios=(4, 1.4, 1.4))
    letters = visible(seen.text)
    image = heat(axes[0], forget[:, chosen].t(), columns=letters, colours="RdYlBu")
    axes[0].set(ylabel=f"{len(chosen)} of {forget.shape[1]} units", title="forget gate: red forgets, blue keeps")
    figure.colorbar(image, ax=axes[0], pad=0.01)
    places = range(len(letters))
    axes[1].bar(places, forget.mean(1), color=BLUE)
    axes[1].set(ylabel="mean forget", ylim=(float(forget.mean(1).min()) - 0.05, float(forget.mean(1).max()) + 0.02))
    axes[2].bar(places, seen.surprise, color=RED)
    axes[2].set(ylabel="surprise (nats)")
    for axis in axes:
        axis.set_xticks(places, letters, fontsize=7)
        axis.set_xlim(-0.5, len(letters) - 0.5)
    return figure


def forgetting_figure(found: Sequence[tuple[str, float]], shown: int = 30) -> Figure:
    """The most and the least forgetful characters, on either side of the mean of all."""
    shown = min(shown, len(found) // 2)
    chosen = [*found[:shown], *found[len(found) - shown :]] if shown else list(found)
    mean = sum(value for _, value in found) / len(found)
    figure, (axes,) = panels(1, 1, 12, 3.6)
    for colour, side in ((RED, "forgets more"), (BLUE, "keeps more")):
        places = [at for at, (_, value) in enumerate(chosen) if (value < mean) == (colour == RED)]
        axes.vlines(places, mean, [chosen[at][1] for at in places], color=colour, linewidth=1.5)
        axes.plot(places, [chosen[at][1] for at in places], "o", color=colour, label=side)
    axes.axhline(mean, color="grey", linestyle="--", label="mean of these characters")
    axes.set_xticks(range(len(chosen)), visible("".join(character for character, _ in chosen)), fontsize=8)
    axes.set(ylabel="mean forget gate", title="at which characters it forgets")
    axes.legend(fontsize=8)
    return figure


def liveliest(values: Sequence[Tensor], start: int, length: int) -> int:
    """Where from `start` on a piece of a text begins in which all of the values [N] change, and how often most."""
    changes = torch.stack([(one[1:] != one[:-1]).float() for one in values])[:, start:]
    window = min(length, changes.shape[1])
    counts = changes.unfold(1, window, max(1, window // 4)).sum(-1)  # [values, places]
    best = ((counts > 0).sum(0) * window + counts.amin(0)).argmax()
    return start + int(best) * max(1, window // 4)


def tracking_figure(seen: Trace, found: Sequence[Tracker], shown: int = 3, length: int = 220) -> Figure:
    """The best trackers' cell states along a piece of the half that they were not chosen by, with their properties."""
    found = found[:shown]
    known = properties(seen.text)
    start = liveliest([known[tracker.name] for tracker in found], len(seen.text) // 2, length)
    piece = slice(start, start + length)
    figure, axes = panels(len(found), 1, 14, 2.4 * len(found))
    letters = visible(seen.text[piece])
    for axis, tracker in zip(axes, found):
        c, values = seen.c[piece, tracker.unit], known[tracker.name][piece]
        axis.plot(c, color=BLUE)
        axis.set_title(
            f"{tracker.name}: correlation {tracker.found:.2f}, in the other half {tracker.confirmed:.2f}", fontsize=9
        )
        axis.set_xticks(range(len(letters)), letters, fontsize=5)
        axis.set_xlim(-0.5, len(letters) - 0.5)
        axis.set_ylabel(f"c of unit {tracker.unit}", color=BLUE, fontsize=8)
        other = axis.twinx()
        other.plot(values, color=RED, linewidth=1, alpha=0.7, drawstyle="steps-mid")
        other.set_ylabel(tracker.name, color=RED, fontsize=8)
        other.tick_params(labelcolor=RED, labelsize=7)
        axis.tick_params(axis="y", labelcolor=BLUE, labelsize=7)
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("char_lm_inside", __doc__)
    parser.add_argument(
        "--checkpoint", metavar="FILE", default="demo/best.pt", help="of char_lm (default: %(default)s)"
    )
    parser.add_argument("--text", metavar="FILE", help="the text it was trained on (default: Python's documentation)")
    parser.option("sentence", SENTENCE, str, "whose gates are drawn", metavar="TEXT")
    parser.option("characters", 20_000, whole(200), "of the validation text that are looked at", small=2_000)
    parser.option("layer", -1, int, "to look at, counted from 0; -1 is the last", metavar="N")
    parser.option("temperature", [0.3, 0.7, 1.0, 1.3], number(), "of the samples", nargs="+", metavar="X")
    parser.option("sample", 300, whole(), "characters of a sample", small=80)
    parser.common("char_lm_inside", bar=False)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("char_lm_inside", lambda: work(options), options.out)


def open_checkpoint(path: str, backend: str = "auto") -> tuple[CharLM, str]:
    """Raises Refused, in one line, for a file that is missing or is none of char_lm's."""
    try:
        return load(Path(path), backend)
    except OSError as error:
        raise Refused(
            f"cannot read {path}: {error.strerror}; `python -m lstm_triton.recipes.char_lm` writes one"
        ) from error
    except UNREADABLE as error:
        raise Refused(f"{path} is no checkpoint of char_lm") from error


def work(options: argparse.Namespace) -> None:
    model, alphabet = open_checkpoint(options.checkpoint, options.backend)
    if not -model.lstm.num_layers <= options.layer < model.lstm.num_layers:
        raise Refused(f"--layer {options.layer}: the model has {model.lstm.num_layers} layers")
    text = default_text() if options.text is None else read_text(options.text)
    valid = text[len(Corpus.from_text(text, 1).train) :][: options.characters]
    model.to(ready(options, model.lstm))
    out = options.out
    files = [save(gate_figure(trace(model, alphabet, options.sentence, options.layer)), out / "gates.png")]
    seen = trace(model, alphabet, valid, options.layer)
    found, tracked = forgetting(seen), trackers(seen)
    if found:
        files.append(save(forgetting_figure(found), out / "forgetting.png"))
        print("most forgetful:", ", ".join(f"{character!r} {value:.2f}" for character, value in found[:8]))
        print("least forgetful:", ", ".join(f"{character!r} {value:.2f}" for character, value in found[-8:]))
    if tracked:
        files.append(save(tracking_figure(seen, tracked), out / "tracking.png"))
    for tracker in tracked:
        by = f"correlation {tracker.found:5.2f}, confirmed {tracker.confirmed:5.2f}"
        print(f"{tracker.name:28} unit {tracker.unit:4}: {by}")
    samples = [(t, generate(model, alphabet, options.sample, t, options.seed)) for t in options.temperature]
    written = "\n\n".join(f"--- temperature {t} ---\n{sample}" for t, sample in samples)
    write_atomically(out / "temperatures.txt", lambda part: part.write_text(written + "\n", encoding="utf-8"))
    names = ", ".join(path.name for path in [*files, out / "temperatures.txt"])
    print(f"\n{written}\n\nwritten: {names} in {out}")


if __name__ == "__main__":
    sys.exit(main())
