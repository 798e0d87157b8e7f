"""The persistent kernel, taken apart: what is hoisted, where the weights live, what crosses between programs.

    python -m lstm_triton.recipes.under_the_hood --out under_the_hood

The kernels run in Triton's interpreter under a scheduler that draws which program goes on next, at every store, atomic
and volatile load, so that one can watch programs of one launch wait for each other. Nothing here is a time on a GPU.
Writes to --out: schedule_forward.png and schedule_backward.png (who does what when), residence.png (where W_hh is at
each hidden size), step.png (what one program does in one step).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import functional
from ..diagnostics.drawing import BLUE, ORANGE, canvas, panels
from ..kernels.config import Config
from ..planning.cost import shared_bytes
from ..planning.device import KNOWN
from ..planning.planner import NoPlan, plan
from ..planning.problem import Problem, ceil_div
from ..testing.interpreter import cooperative
from .shared.command import Parser, Refused, ready, run, whole
from .shared.drawing import save

MODULE = "lstm_triton.recipes.under_the_hood"
# What a program does when it hands over to another.
WORDS = {"store": "store", "xchg": "publish", "poll": "poll", "add": "acquire"}
# Without flags it publishes by storing: of so many stores of a step, the one that completes the tile others wait for.
STORES = {"forward": (6, 0), "backward": (4, 3)}  # h, four gates, c; the gradients of four gates
COLOURS = {"store": BLUE, "publish": "black", "poll": "#cccccc", "acquire": ORANGE}


class Event(NamedTuple):
    """Program `program` did `what`, as the number-th switch of its launch, in step `step` (of its own count)."""

    number: int
    program: int
    what: str
    step: int


class Run(NamedTuple):
    """One forward and one backward pass under one schedule: results and gradients, and the events of both launches."""

    results: list[Tensor]
    forward: list[Event]
    backward: list[Event]


def record(
    hidden_size: int, seq_len: int, block_h: int = 16, seed: int = 0, batch: int = 3, protocol: str = "flags"
) -> Run:
    """Run a layer with one program for every `block_h` units, its programs interleaved as `seed` says."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before lstm_triton is imported: kernels are interpreted or compiled")
    generator = torch.Generator().manual_seed(0)  # data are the same under every schedule
    sizes = ((seq_len, batch, 8), (4 * hidden_size, 8), (4 * hidden_size, hidden_size), (4 * hidden_size,))
    x, w_ih, w_hh, bias = (torch.randn(size, generator=generator).mul_(0.2).requires_grad_() for size in sizes)
    config = Config("grid", protocol, True, False, 1, 16, block_h, 32, 4).encode()
    with cooperative(seed) as scheduler:
        results = functional.lstm(
            x,
            None,
            [w_ih, w_hh, bias, torch.zeros_like(bias)],
            backend="triton",
            precision="ieee",
            plan=f"{config}|{config}",
        )
        ended = len(scheduler.events)
        gradients = torch.autograd.grad(sum(result.square().sum() for result in results), (x, w_ih, w_hh, bias))
    passes = {"forward": scheduler.events[:ended], "backward": scheduler.events[ended:]}
    by_storing = {which: stores if protocol == "mailbox" else None for which, stores in STORES.items()}
    events = (_events(recorded, seq_len, by_storing[which]) for which, recorded in passes.items())
    return Run([result.detach() for result in (*results, *gradients)], *events)


def _events(
    recorded: Sequence[tuple[tuple[int, ...], str]], seq_len: int, by_storing: tuple[int, int] | None
) -> list[Event]:
    """Of a launch: programs numbered as they are found in the grid, steps counted by what a program has published.

    by_storing: one of STORES, where there are no flags.
    """
    programs = {index: number for number, index in enumerate(sorted({index for index, _ in recorded}))}
    published: Counter[int] = Counter()
    stored: Counter[int] = Counter()
    found = []
    for number, (index, event) in enumerate(recorded):
        program = programs[index]
        what = WORDS.get(event)
        if what == "store" and by_storing is not None:
            count, completes = by_storing
            if stored[program] < seq_len * count and stored[program] % count == completes:
                what = "publish"
            stored[program] += 1
        if what is not None:
            found.append(Event(number, program, what, published[program]))
        published[program] += what == "publish"
    return found


def furthest_lead(events: Sequence[Event]) -> int:
    """By how many steps one program has ever been ahead of another."""
    steps = dict.fromkeys({event.program for event in events}, 0)
    lead = 0
    for event in events:
        steps[event.program] = event.step + (event.what == "publish")
        lead = max(lead, max(steps.values()) - min(steps.values()))
    return lead


def one_step(events: Sequence[Event], program: int = 0, step: int = 1) -> dict[str, int]:
    """How often a program polls, acquires, stores and publishes in one of its steps, in the order of the first time."""
    return dict(Counter(event.what for event in events if (event.program, event.step) == (program, step)))


def schedule_figure(passes: dict[str, Sequence[Event]]) -> Figure:
    """A row of squares for every program: what it did at which switch; numbers are steps of the sequence."""
    figure, axes = panels(len(passes), 1, 12, 2.6 * len(passes))
    for axis, (title, events) in zip(axes, passes.items()):
        axis.grid(False)
        for what, colour in COLOURS.items():
            at = [event.number for event in events if event.what == what]
            rows = [event.program for event in events if event.what == what]
            size, marker = (14 if what == "poll" else 42), ("^" if what == "publish" else "s")
            axis.scatter(at, rows, size, color=colour, label=what, marker=marker)
        for event in events:
            if event.what == "publish":
                axis.annotate(f"{event.step}", (event.number, event.program - 0.4), fontsize=7, ha="center")
        programs = sorted({event.program for event in events})
        axis.set_yticks(programs, [f"program {program}" for program in programs])
        axis.set(title=title, ylim=(-0.8, programs[-1] + 0.6))
        axis.invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside upper right")
    axes[-1].set_xlabel("switch of the scheduler (no time: who went on is drawn at random)")
    return figure


class Residence(NamedTuple):
    """Where W_hh is at a hidden size: bytes of all of it, of a program's slice, and of all that a program needs.

    tiles: programs that share the hidden units of a row; programs: those of all rows.
    """

    hidden_size: int
    placement: str
    protocol: str
    tiles: int
    programs: int
    matrix: int
    slice: int
    shared: int
    limit: int
    resident: bool


def residence(
    hidden_sizes: Sequence[int], batch: int = 16, dtype: str = "bfloat16", arch: str = "sm_90"
) -> list[Residence]:
    """The forward plans for a GPU that need not be here. Sizes without a plan are left out."""
    device, found = KNOWN[arch], []
    for hidden_size in hidden_sizes:
        problem = Problem("forward", hidden_size, batch, 1, dtype, "ieee")
        chosen = plan(problem, device)
        if isinstance(chosen, NoPlan):
            continue
        config, matrix = chosen.config, 4 * hidden_size**2 * problem.element_size
        tiles = ceil_div(hidden_size, config.block_h) if config.placement != "local" else 1
        programs = tiles * ceil_div(batch, config.block_b)
        row = (config.placement, config.protocol, tiles, programs, matrix, ceil_div(matrix, tiles))
        found.append(Residence(hidden_size, *row, shared_bytes(config, problem), device.shared_memory, config.resident))
    return found


def residence_figure(found: Sequence[Residence]) -> Figure:
    figure, axes = canvas(8)
    places = range(len(found))
    axes.bar(places, [row.matrix / 1024 for row in found], color="#dddddd", label="all of W_hh")
    colours = [BLUE if row.resident else ORANGE for row in found]
    axes.bar(
        places,
        [row.slice / 1024 for row in found],
        0.5,
        color=colours,
        label="slice of one program, on chip (orange: read every step)",
    )
    axes.axhline(found[0].limit / 1024, color="black", linestyle="--", label="shared memory that a program may ask for")
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{row.hidden_size}\n{row.programs} x {row.placement}" for row in found], fontsize=8)
    axes.set(xlabel="hidden size; programs and placement", ylabel="KiB")
    axes.legend(fontsize=8)
    return figure


class Hoisting(NamedTuple):
    """The input projection as one product over the sequence, and step by step: seconds here, and bytes of W_ih read."""

    once: float
    step_by_step: float
    bytes_once: int
    bytes_step_by_step: int


def hoisting(seq_len: int = 100, batch: int = 16, input_size: int = 128, hidden_size: int = 128) -> Hoisting:
    """Median of 5 runs each, on the CPU, in fp32."""
    x, weight = torch.randn(seq_len, batch, input_size), torch.randn(4 * hidden_size, input_size)

    def median(call) -> float:
        times = []
        for _ in range(6):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return sorted(times[1:])[2]

    size = weight.numel() * weight.element_size()
    return Hoisting(median(lambda: x @ weight.T), median(lambda: [x_t @ weight.T for x_t in x]), size, seq_len * size)


def step_figure(forward: Sequence[Event], backward: Sequence[Event]) -> Figure:
    """Every event of program 0's second step, in order, for both passes."""
    figure, axes = panels(2, 1, 9, 3.2)
    for axis, (title, events) in zip(axes, {"forward": forward, "backward": backward}.items()):
        mine = [event for event in events if (event.program, event.step) == (0, 1)]
        for place, event in enumerate(mine):
            axis.barh(0, 0.9, left=place, color=COLOURS[event.what])
            colour = "white" if event.what in ("publish", "store") else "black"
            axis.text(place + 0.45, 0, event.what, ha="center", va="center", fontsize=7, rotation=90, color=colour)
        axis.set(title=f"{title}: one step of one program", yticks=[], xticks=[], xlim=(-0.2, max(len(mine), 8) + 0.2))
        axis.grid(False)
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("under_the_hood", __doc__)
    parser.option("hidden_size", 64, whole(1, 256), "one program for every 16 units", small=32)
    parser.option("seq_len", 6, whole(2, 64), "steps", small=3)
    parser.common("under_the_hood", bar=False, backend=False)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton decides when a kernel is defined: in a process of its own
        given = sys.argv[1:] if arguments is None else list(arguments)
        try:
            command = [sys.executable, "-m", MODULE, *given]
            return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
        except KeyboardInterrupt:  # the process has said so
            return 130
    return run("under_the_hood", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        raise Refused("the interpreter runs on the CPU: --device cpu")
    ready(options)
    runs = [record(options.hidden_size, options.seq_len, seed=options.seed + number) for number in range(2)]
    same = all(torch.equal(a, b) for a, b in zip(runs[0].results, runs[1].results))
    print(f"two schedules, {'the same' if same else 'DIFFERENT'} bits in all outputs and gradients")
    for name, passes in (("forward", [one.forward for one in runs]), ("backward", [one.backward for one in runs])):
        for number, events in enumerate(passes):
            polls = sum(event.what == "poll" for event in events)
            print(f"{name}, schedule {number}: {len(events)} events, {polls} of them polls, "
                  f"a program was ahead by at most {furthest_lead(events)} step")  # fmt: skip
        print(f"{name}, one step of one program: {one_step(passes[0])}")
        figure = schedule_figure({f"{name}, schedule {number}": events for number, events in enumerate(passes)})
        save(figure, options.out / f"schedule_{name}.png")
    save(step_figure(runs[0].forward, runs[0].backward), options.out / "step.png")
    save(residence_figure(residence((64, 128, 256, 512, 768, 1024, 1536, 2048))), options.out / "residence.png")
    found = hoisting()
    print(f"input projection, one product against one a step: {found.step_by_step / found.once:.1f} times as fast here")
    print(f"written: schedule_forward.png, schedule_backward.png, step.png, residence.png in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
