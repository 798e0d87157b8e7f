"""What the commands of all recipes have in common: options, errors in one line, exit statuses, whole files."""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modules.lstm import LSTM


class Refused(ValueError):
    """What was asked for cannot be done; the message is one line for the user, the exit status 2."""


class Diverged(ArithmeticError):
    """Training has left the finite numbers; the message is one line for the user, the exit status 1."""


def whole(least: int = 1, most: int = 2**60) -> Callable[[str], int]:
    """The type of an option: an integer from `least` to `most`."""

    def integer(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {f'at least {least}' if value < least else f'at most {most}'}")
        return value

    return integer


def number(above: float = 0.0, below: float = math.inf, least: float | None = None) -> Callable[[str], float]:
    """The type of an option: a number between two others, or from `least` on."""

    def real(text: str) -> float:
        value = float(text)
        if not (above < value if least is None else least <= value) or not value < below:
            start = f"above {above:g}" if least is None else f"at least {least:g}"
            end = f" and below {below:g}" if below < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"must be {start}{end}")
        return value

    return real


class Parser(argparse.ArgumentParser):
    """An argparse parser whose options know a small value too, for `--small`, and whose errors are one line.

    doc: the recipe's docstring, whose command names it: `python -m lstm_triton.recipes.NAME`.
    """

    def __init__(self, name: str, doc: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=name, description=doc, formatter_class=formatter, allow_abbrev=False)
        self.small: dict[str, Any] = {}
        self.only: list[tuple[str, str, bool]] = []
        self.add_argument("--small", action="store_true", help="sizes for a look, in seconds; other options go before")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def option(
        self,
        name: str,
        default: Any,
        kind: Callable[[str], Any],
        text: str = "",
        small: Any = None,
        *,
        only_with: str = "",
        not_with: str = "",
        **more: Any,
    ) -> None:
        """Add --name with a default, and another default under --small.

        only_with, not_with: another option, by the presence or absence of which this one would be ignored: an error.
        """
        letter = {int: "N", float: "X"}.get(type(default), "VALUE")
        more = {"default": default, "type": kind, "metavar": letter} | more
        shown = "default: %(default)s" + (f", small: {small}" if small is not None else "")
        self.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({shown})" if text else shown, **more)
        if small is not None:
            self.small[name] = small
        if only_with or not_with:
            self.only.append((name, only_with or not_with, bool(only_with)))

    def training(self, steps: int, small_steps: int, batch: int, learning_rate: float, evaluations: int = 10) -> None:
        """The options of `training.fit`."""
        self.option("steps", steps, whole(), "steps of the optimiser", small=small_steps)
        self.option("evaluations", evaluations, whole(), "how often the model is evaluated meanwhile")
        self.option("batch", batch, whole(), "rows of a batch")
        self.option("learning_rate", learning_rate, number(), "of Adam")
        self.option("clip", 1.0, number(), "largest norm of all gradients")

    def common(self, out: str, bar: bool = True, backend: bool = True) -> None:
        """The options of every recipe. bar: whether it shows one; backend: whether there is a choice."""
        self.option("out", Path(out), Path, "folder for the results", metavar="FOLDER")
        self.option("seed", 0, whole(0, 2**31 - 1), "of weights and data")
        if backend:
            self.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
        self.add_argument(
            "--device",
            metavar="cpu|cuda|cuda:N",
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="default: cuda if there is one",
        )
        if bar:
            self.add_argument("--quiet", action="store_true", help="no progress bar")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Options from `arguments`, or from the command line. Exits with status 2 where they are wrong."""
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        if "--small" in arguments:
            self.set_defaults(**self.small)
        options = self.parse_args(arguments)
        for name, other, wanted in self.only:
            option = f"--{name.replace('_', '-')}"
            given = any(word == option or word.startswith(f"{option}=") for word in arguments)
            if given and wanted != bool(getattr(options, other) not in (None, False)):
                flag, partner = (f"--{of.replace('_', '-')}" for of in (name, other))
                self.error(f"argument {flag}: {'goes only' if wanted else 'does not go'} with {partner}")
        if "device" in options and options.device.partition(":")[0] not in ("cpu", "cuda"):
            self.error(f"argument --device: must be cpu, cuda or cuda:N, got {options.device}")
        return options


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ready(options: argparse.Namespace, *layers: LSTM) -> torch.device:
    """Seed the generators, make the folder, move `layers` there and return the device. Raises Refused."""
    torch.manual_seed(options.seed)
    try:
        device = torch.empty(0, device=options.device).device
        for lstm in layers:
            weight = lstm.to(device).weight_ih_l0
            assert isinstance(weight, Tensor)
            lstm.refusal(weight)  # raises where --backend triton is not possible
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA is there
        raise Refused(first_line(error)) from error
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass  # now, and not when there is something to be written
    except OSError as error:
        raise Refused(f"cannot write to {options.out}: {error.strerror}") from error
    return device


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise Refused if `what` needs more bytes than the device or this machine has at all."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise Refused(f"{what} needs about {needed / 2**30:,.0f} GiB of memory; here are {there / 2**30:,.0f}")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write(temporary path) make the file, then move it into place: a reader never sees half of it."""
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a CSV file whole; the path, for the report."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)

    write_atomically(path, write)
    return path


def run(name: str, body: Callable[[], object], out: Path, speaks: bool = True) -> int:
    """Run a command's body; the exit status, with one line on stderr, if it `speaks`, for what the user can mend."""

    def say(line: str) -> None:
        if speaks:
            print(line, file=sys.stderr)

    try:
        body()
    except KeyboardInterrupt:
        say(f"\n{name}: interrupted; what was finished before is in {out}")
        return 130
    except Diverged as error:
        say(f"{name}: {error}")
        return 1
    except (Refused, OSError) as error:
        say(f"{name}: {first_line(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say(f"{name}: out of memory; smaller sizes need less")
        return 2
    return 0


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has a type for it on a GPU, and only a text on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in ("can't allocate memory", "Storage size calculation overflowed")
    )
