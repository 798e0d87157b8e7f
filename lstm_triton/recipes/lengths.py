"""Sequences of different lengths: padded, packed, or with `lengths=`; what each costs, and that they agree.

    python -m lstm_triton.recipes.lengths --out lengths

One batch of rows whose lengths are spread widely goes through a layer in both directions in five ways: padded as it is
(wrong: the reverse direction and h_n begin in the padding), row by row without any padding (the truth), packed for
nn.LSTM, with lengths= for ours, and as a nested tensor. Times are of forward and backward on this machine.
Writes to --out: lengths.png, results.csv.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from .. import LSTM
from ..diagnostics.drawing import BLUE, RED, panels
from .shared.command import Parser, Refused, ready, require_memory, run, save_table, whole
from .shared.drawing import save

Rows = list[Tensor]


class Result(NamedTuple):
    """padded [B, T, 2H], 0 beyond each length; h_n [2, B, H]."""

    output: Tensor
    h_n: Tensor


class Way(NamedTuple):
    """One way of reading rows."""

    name: str
    call: Callable[[], Result]


class Outcome(NamedTuple):
    """error: largest absolute difference of output and h_n from the rows one by one. seconds: of a training step."""

    name: str
    error: float
    seconds: float


def draw(batch: int, longest: int, input_size: int, seed: int) -> Rows:
    """Rows [length, input_size] with lengths that are log-uniform from 1 to `longest`, one of which is `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest ** torch.rand(batch, generator=generator)).round().long().clamp(1, longest)
    lengths[0] = longest
    return [torch.randn(int(length), input_size, generator=generator) for length in lengths]


def ways(rows: Rows, ours: LSTM, theirs: nn.LSTM) -> list[Way]:
    """All ways, the truth first; both modules are batch_first, in both directions, with the same weights."""
    lengths = torch.tensor([len(row) for row in rows])
    x = pad_sequence(rows, batch_first=True)
    batch, longest = x.shape[:2]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    on_device = lengths.to(x.device)

    def one_by_one() -> Result:
        results = [theirs(row) for row in rows]
        return Result(
            pad_sequence([out for out, _ in results], batch_first=True), torch.stack([s[0] for _, s in results], 1)
        )

    def as_it_is() -> Result:
        output, (h_n, _) = theirs(x)
        return Result(output, h_n)

    def packed() -> Result:
        packed, (h_n, _) = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return Result(pad_packed_sequence(packed, batch_first=True)[0], h_n)

    def with_lengths() -> Result:
        output, (h_n, _) = ours(x, lengths=on_device)
        return Result(output, h_n)

    def as_nested() -> Result:
        output, (h_n, _) = ours(nested)
        return Result(output.to_padded_tensor(0.0, output_size=(batch, longest, output.shape[-1])), h_n)

    return [
        Way("one by one", one_by_one),
        Way("padded, as it is", as_it_is),
        Way("packed (nn.LSTM)", packed),
        Way("lengths= (ours)", with_lengths),
        Way("nested (ours)", as_nested),
    ]


def training_step(way: Way, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.zero_grad()
    result = way.call()
    (result.output.square().mean() + result.h_n.square().mean()).backward()


def seconds(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def compare(options: argparse.Namespace) -> tuple[Rows, list[Outcome]]:
    """Every way on the same rows and weights. Raises Refused."""
    device = ready(options, LSTM(1, 1, backend=options.backend))
    need = 4 * options.batch * options.longest * (12 * options.hidden_size + 2 * options.input_size)
    require_memory(need, device, f"{options.batch} rows of up to {options.longest} steps")
    sizes = (options.input_size, options.hidden_size)
    ours = LSTM(*sizes, batch_first=True, bidirectional=True, backend=options.backend).to(device)
    theirs = nn.LSTM(*sizes, batch_first=True, bidirectional=True).to(device)
    theirs.load_state_dict(ours.state_dict())
    # PyTorch 2.13 warns of a function that its own nested tensors call.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    rows = [row.to(device) for row in draw(options.batch, options.longest, options.input_size, options.seed)]
    outcomes: list[Outcome] = []
    truth: Result | None = None
    for way in ways(rows, ours, theirs):
        with torch.no_grad():
            result = way.call()
        truth = truth or result
        error = max(float((a - b).abs().max()) for a, b in zip(result, truth))
        spent = seconds(lambda way=way: training_step(way, (ours, theirs)), device, options.repeats)  # type: ignore[misc]
        outcomes.append(Outcome(way.name, error, spent))
    return rows, outcomes


def padded_share(lengths: Sequence[int], batch: int, bucketed: bool) -> float:
    """The share of steps that is padding when rows are batched as they come, or with others of about their length."""
    order = sorted(lengths) if bucketed else list(lengths)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return 1 - sum(order) / sum(len(rows) * max(rows) for rows in batches)


def length_figure(rows: Rows, outcomes: Sequence[Outcome]) -> Figure:
    figure, axes = panels(1, 2, 11, 4)
    lengths = sorted((len(row) for row in rows), reverse=True)
    axes[0].bar(range(len(lengths)), [lengths[0]] * len(lengths), 1.0, color="#dddddd", label="padding")
    axes[0].bar(range(len(lengths)), lengths, 1.0, color=BLUE, label="real steps")
    axes[0].set(
        xlabel="row",
        ylabel="steps",
        title=f"{1 - sum(lengths) / (lengths[0] * len(lengths)):.0%} of a padded batch is padding",
    )
    axes[0].legend()
    names = [outcome.name for outcome in outcomes]
    colours = [RED if outcome.error > 1e-3 else BLUE for outcome in outcomes]
    bars = axes[1].barh(names, [1e3 * outcome.seconds for outcome in outcomes], color=colours)
    axes[1].bar_label(bars, [f" differs by {outcome.error:.0e}" for outcome in outcomes], fontsize=8)
    axes[1].set(xlabel="ms, forward and backward, here", title="red: wrong")
    axes[1].invert_yaxis()
    axes[1].margins(x=0.35)
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("lengths", __doc__)
    parser.option("batch", 64, whole(), "rows", small=8)
    parser.option("longest", 200, whole(), "steps of the longest row", small=24)
    parser.option("input_size", 32, whole())
    parser.option("hidden_size", 64, whole(), small=16)
    parser.option("repeats", 5, whole(), "of every timing; the median counts", small=1)
    parser.common("lengths", bar=False)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("lengths", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    rows, outcomes = compare(options)
    for outcome in outcomes:
        print(f"{outcome.name:20} {1e3 * outcome.seconds:8.1f} ms here, differs by {outcome.error:.1e}")
    lengths = [len(row) for row in draw(64 * options.batch, options.longest, 1, options.seed)]
    mixed, alike = (padded_share(lengths, options.batch, bucketed) for bucketed in (False, True))
    print(f"padding in batches of {options.batch}: {mixed:.0%} as rows come, {alike:.0%} with rows of about one length")
    wrong = [outcome.name for outcome in outcomes if outcome.error > 1e-3 and outcome.name != "padded, as it is"]
    if wrong:
        raise Refused(f"{', '.join(wrong)} disagrees with the rows one by one")
    columns = ("way", "error", "seconds")
    files = [save(length_figure(rows, outcomes), options.out / "lengths.png"),
             save_table(options.out / "results.csv", columns, outcomes)]  # fmt: skip
    print(f"written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
