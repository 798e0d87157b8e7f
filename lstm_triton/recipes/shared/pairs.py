"""Pairs of texts to translate: number words and dates that are generated here, or a file of pairs."""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .command import Refused
from .text import read_text

Pair = tuple[str, str]
PAD, START, END, UNKNOWN = range(4)
ONES = (
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    + ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
)  # fmt: skip
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MONTHS = [calendar.month_name[month] for month in range(1, 13)]
UNITS: dict[str, tuple[Callable[[str], list[str]], str]] = {"character": (list, ""), "word": (str.split, " ")}


def in_words(number: int) -> str:
    """0 <= number < 1,000,000 in English words: 1205 is "one thousand two hundred and five"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    joint = " and " if 0 < rest < 100 else " "
    return f"{in_words(number // size)} {name}" + (joint + in_words(rest) if rest else "")


def ordinal(day: int) -> str:
    return f"{day}{'th' if 11 <= day <= 13 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def a_date(draw: random.Random) -> Pair:
    """A date between 1900 and 2099 in one of four ways of writing it, and in that of ISO 8601."""
    year, month, day = draw.randrange(1900, 2100), draw.randrange(12), draw.randrange(1, 29)
    name = MONTHS[month]
    ways = (
        f"{day} {name} {year}",
        f"{name} {ordinal(day)}, {year}",
        f"the {ordinal(day)} of {name} {year}",
        f"{name[:3]} {day} {year}",
    )
    return draw.choice(ways), f"{year}-{month + 1:02}-{day:02}"


def a_number(draw: random.Random) -> Pair:
    """A number below a million in words, short ones as likely as long ones, and in digits."""
    number = draw.randrange(10 ** draw.randrange(1, 7))
    return in_words(number), str(number)


def generated(kinds: Sequence[str], count: int, seed: int) -> list[Pair]:
    """`count` different pairs, of "dates" and "numbers" alike where both are asked for."""
    draw = random.Random(seed)
    makers = {"dates": a_date, "numbers": a_number}
    found: dict[str, str] = {}
    fruitless = 0
    while len(found) < count:
        source, target = makers[draw.choice(list(kinds))](draw)
        fruitless = fruitless + 1 if source in found else 0
        if fruitless == 1_000:
            raise Refused(f"there are hardly more than {len(found):,} different {' and '.join(kinds)}; lower --count")
        found[source] = target
    return list(found.items())


def read_pairs(path: str) -> list[Pair]:
    """Lines "source TAB target" of a UTF-8 file, empty lines left out. Raises Refused in one line for anything else."""
    text = read_text(path)
    found = []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise Refused(f'{path}, line {i}: expected "source TAB target", got {line[:40]!r}')
        found.append((parts[0].strip(), parts[1].strip()))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Vocabulary:
    """The units (characters or words) of one side, after four signs of its own."""

    units: tuple[str, ...]
    kind: str

    @classmethod
    def of(cls, texts: Iterable[str], kind: str, most: int = 20_000) -> Vocabulary:
        """The `most` frequent units, the likeliest first."""
        counts: dict[str, int] = {}
        for text in texts:
            for unit in UNITS[kind][0](text):
                counts[unit] = counts.get(unit, 0) + 1
        if not counts:
            raise Refused("the vocabulary is empty: there is no text to train on")
        return cls(tuple(sorted(counts, key=lambda unit: (-counts[unit], unit))[:most]), kind)

    def __len__(self) -> int:
        return len(self.units) + 4

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Codes [B, T], padded with PAD and ended with END, and lengths [B], END included."""
        number = {unit: i + 4 for i, unit in enumerate(self.units)}
        rows = [[*(number.get(unit, UNKNOWN) for unit in UNITS[self.kind][0](text)), END] for text in texts]
        codes = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
        return codes, torch.tensor([len(row) for row in rows])

    def decode(self, codes: Iterable[int]) -> str:
        """The text up to END."""
        units = []
        for code in codes:
            if code == END:
                break
            units.append(self.units[code - 4] if code >= 4 else "\N{REPLACEMENT CHARACTER}")
        return UNITS[self.kind][1].join(units)
