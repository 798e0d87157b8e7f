"""An LSTM written by hand, from one step with four separate gates to a stack in both directions.

    python -m lstm_triton.recipes.from_scratch --out from_scratch

Every stage is compared with torch.nn.LSTM and with lstm_triton.LSTM on the same weights. Written to be read, not to be
fast: this is what the kernels compute.
Writes to --out: flow.png and step.png (a worked step, number by number), sequence.png (gates and state over time).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from .. import LSTM
from ..diagnostics.drawing import BLUE, GATES, panels
from .shared.command import Parser, ready, run, whole
from .shared.drawing import heat, save

State = tuple[Tensor, Tensor]
GATE_ORDER = "ifgo"  # PyTorch's


def update(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> State:
    """From activated gates and the last cell state to h and the new c: all [B, H]."""
    c = f * c + i * g
    return o * torch.tanh(c), c


class SeparateGates(nn.Module):
    """One step, gate by gate: each has a matrix over [h, x], as the equations have it."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.gates = nn.ModuleDict({gate: nn.Linear(hidden_size + input_size, hidden_size) for gate in GATE_ORDER})

    def forward(self, x: Tensor, state: State) -> State:
        """x [B, I], state of two [B, H] -> the next state."""
        h, c = state
        combined = torch.cat((h, x), dim=1)
        f = torch.sigmoid(self.gates["f"](combined))  # what to keep of c
        i = torch.sigmoid(self.gates["i"](combined))  # how much to write
        g = torch.tanh(self.gates["g"](combined))  # what to write
        o = torch.sigmoid(self.gates["o"](combined))  # what to show of c
        return update(i, f, g, o, c)

    @torch.no_grad()
    def take(self, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> None:
        """Weights of PyTorch's layout: gates i, f, g, o one under the other."""
        for gate, of_x, of_h, of_bias in zip(GATE_ORDER, *(part.chunk(4) for part in (weight_ih, weight_hh, bias))):
            for parameter, value in zip(self.gates[gate].parameters(), (torch.cat((of_h, of_x), dim=1), of_bias)):
                parameter.copy_(value)


class Layer(nn.Module):
    """A whole sequence in one direction; the four gates are one product."""

    def __init__(self, input_size: int, hidden_size: int, backwards: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.backwards = hidden_size, backwards
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [T, B, I] -> h of every step [T, B, H], and the state after the last one that was read."""
        h, c = (x.new_zeros(x.shape[1], self.hidden_size),) * 2 if state is None else state
        outputs: list[Tensor] = []
        for x_t in reversed(x) if self.backwards else x:
            gates = x_t @ self.weight_ih.T + h @ self.weight_hh.T + self.bias
            i, f, g, o = gates.chunk(4, dim=1)
            h, c = update(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), c)
            outputs.append(h)
        return torch.stack(outputs[::-1] if self.backwards else outputs), (h, c)

    @torch.no_grad()
    def take(self, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> None:
        self.weight_ih.copy_(weight_ih)
        self.weight_hh.copy_(weight_hh)
        self.bias.copy_(bias)


class Stack(nn.Module):
    """Layers over layers; in both directions each layer reads the outputs of both."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        sizes = [input_size] + [directions * hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(Layer(size, hidden_size, backwards=bool(d)) for d in range(directions)) for size in sizes
        )

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        """x [T, B, I] -> [T, B, D * H] and (h_n, c_n), each [layers * D, B, H]."""
        states: list[State] = []
        for layer in self.layers:
            results = [direction(x) for direction in layer.children()]
            x = torch.cat([output for output, _ in results], dim=-1)
            states += [state for _, state in results]
        h_n, c_n = (torch.stack(of_all) for of_all in zip(*states))
        return x, (h_n, c_n)

    def take(self, other: nn.LSTM | LSTM) -> Stack:
        """The weights of an LSTM of the same sizes; PyTorch's two biases only count as a sum."""
        for number, layer in enumerate(self.layers):
            for direction, suffix in zip(layer.children(), ("", "_reverse")):
                ih, hh, b_ih, b_hh = (
                    getattr(other, f"{name}_l{number}{suffix}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                assert isinstance(direction, Layer)
                direction.take(ih, hh, b_ih + b_hh)
        return self


class Step(NamedTuple):
    """Everything in one step: gates i, f, g, o, the cell state before and after, tanh(c) and h, each [H]."""

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c_before: Tensor
    c: Tensor
    h: Tensor


def step_of(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c_before: Tensor) -> Step:
    h, c = update(i, f, g, o, c_before)
    return Step(i, f, g, o, c_before, c, h)


def worked_step() -> Step:
    """Four units with gates as given: one keeps and adds, one forgets and overwrites, two barely change."""
    return step_of(
        i=torch.tensor([0.3, 0.9, 0.2, 0.1]),
        f=torch.tensor([0.9, 0.1, 0.8, 0.95]),
        g=torch.tensor([0.5, 0.8, -0.3, 0.1]),
        o=torch.tensor([0.6, 0.7, 0.5, 0.9]),
        c_before=torch.tensor([1.0, -0.5, 0.3, 0.7]),
    )


def worked_unit() -> Step:
    """One unit from its pre-activations: 0.47, 1.05, 0.48 and 0.51 for i, f, g, o, and c = 0.7."""
    i, f, g, o, c = torch.tensor([[0.47], [1.05], [0.48], [0.51], [0.70]])
    return step_of(i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), c)


SHAPES = {
    "one layer": {},
    "both directions": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "three layers, both directions": {"num_layers": 3, "bidirectional": True},
}


@torch.no_grad()
def differences(
    seed: int = 0, hidden_size: int = 16, backend: str = "auto", device: str = "cpu"
) -> dict[tuple[str, str], float]:
    """The largest absolute difference of output, h_n and c_n, of every (stage, library) on the same weights."""
    torch.manual_seed(seed)
    x = torch.randn(12, 3, 5, device=device)
    found: dict[tuple[str, str], float] = {}
    for name, options in SHAPES.items():
        theirs = nn.LSTM(5, hidden_size, **options).to(device)  # type: ignore[arg-type]
        ours = LSTM(5, hidden_size, backend=backend, **options).to(device)  # type: ignore[arg-type]
        ours.load_state_dict(theirs.state_dict())
        stages = {name: Stack(5, hidden_size, **options).to(device).take(theirs)(x)}  # type: ignore[arg-type]
        if not options:
            stages = {"one step, gate by gate": step_by_step(x, theirs)} | stages
        for library, other in (("nn.LSTM", theirs), ("lstm_triton", ours)):
            found |= {(stage, library): distance(result, other(x)) for stage, result in stages.items()}
    return found


def step_by_step(x: Tensor, weights: nn.LSTM) -> tuple[Tensor, State]:
    """A sequence x [T, B, I] through the cell with separate gates: as one layer of nn.LSTM returns it."""
    cell = SeparateGates(weights.input_size, weights.hidden_size).to(x.device)
    w_ih, w_hh, b_ih, b_hh = (parameter for _, parameter in weights.named_parameters())
    cell.take(w_ih, w_hh, b_ih + b_hh)
    state: State = (x.new_zeros(x.shape[1], weights.hidden_size),) * 2
    outputs = []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0])
    return torch.stack(outputs), (state[0][None], state[1][None])


def distance(ours: tuple[Tensor, State], theirs: tuple[Tensor, State]) -> float:
    pairs = zip((ours[0], *ours[1]), (theirs[0], *theirs[1]))
    return max(float((a - b).abs().max()) for a, b in pairs)


BOXES = {  # name: (x, y, what is written, colour); c runs along the top, h along the bottom
    "read": (4.2, 0.1, "x and h before", "#dddddd"),
    "c_before": (0.2, 3.4, "c before", "#dddddd"),
    "f": (1.3, 1.2, "f", GATES["f"][1]),
    "i": (3.0, 1.2, "i", GATES["i"][1]),
    "g": (4.6, 1.2, "g", GATES["g"][1]),
    "o": (6.6, 1.2, "o", GATES["o"][1]),
    "kept": (2.0, 3.4, "f · c", "#dddddd"),
    "added": (3.8, 2.2, "i · g", "#dddddd"),
    "c": (5.6, 3.4, "c", "#dddddd"),
    "tanh": (7.0, 2.2, "tanh(c)", "#dddddd"),
    "h": (8.6, 1.2, "h", "#dddddd"),
}
ARROWS = (
    "read f",
    "read i",
    "read g",
    "read o",
    "c_before kept",
    "f kept",
    "kept c",
    "i added",
    "g added",
    "added c",
    "c tanh",
    "tanh h",
    "o h",
)


def flow_figure(step: Step) -> Figure:
    """The way of the numbers through one step, unit by unit in every box."""
    values = step._asdict() | {"kept": step.f * step.c_before, "added": step.i * step.g, "tanh": step.c.tanh()}
    figure, (axes,) = panels(1, 1, 10, 5)
    axes.set(xlim=(-0.7, 9.5), ylim=(-0.4, 4.1), title="One step: keep, add, show")
    axes.axis("off")
    patches = {}
    for name, (x, y, text, colour) in BOXES.items():
        box = FancyBboxPatch((x - 0.72, y - 0.28), 1.44, 0.56, "round,pad=0.03", fc=colour, ec="black", alpha=0.55)
        patches[name] = axes.add_patch(box)
        given = values[name].tolist() if name in values else []
        numbers = "  ".join(f"{value:.3g}" for value in given) or "by four products: the gates"
        axes.text(x, y + 0.1, text, ha="center", va="center", weight="bold")
        axes.text(x, y - 0.13, numbers, ha="center", va="center", fontsize=6.5)
    for line in ARROWS:
        start, end = line.split()
        look = dict(arrowstyle="-|>", color="#555555", patchA=patches[start], patchB=patches[end])
        axes.annotate("", BOXES[end][:2], BOXES[start][:2], arrowprops=look)
    return figure


def table_figure(step: Step) -> Figure:
    """The same numbers as a table of colours, a row for every quantity and a column for every unit."""
    rows = {"c before": step.c_before, "f": step.f, "f · c": step.f * step.c_before, "i": step.i, "g": step.g,
            "i · g": step.i * step.g, "c = f · c + i · g": step.c, "o": step.o, "h = o · tanh(c)": step.h}  # fmt: skip
    figure, (axes,) = panels(1, 1, 6, 4.2)
    table = torch.stack(list(rows.values())).tolist()
    units = [f"unit {unit}" for unit in range(len(step.c))]
    heat(axes, table, (-1.1, 1.1), rows=list(rows), columns=units, colours="RdBu_r", numbers=True)
    return figure


def sequence_figure(lstm: LSTM, x: Tensor, unit: int = 0) -> Figure:
    """Gates (above) and cell state (below) of one unit of the first layer over a sequence x [T, I]."""
    with torch.no_grad():
        _, _, states = lstm(x, return_states=("c", "gates"))
    gates, c = states.gates[0][:, 0, :, unit].cpu(), states.c[0][:, unit].cpu()
    figure, axes = panels(2, 1, 8, 5, sharex=True)
    for line, (name, colour) in zip(gates.t(), GATES.values()):
        axes[0].plot(line, color=colour, label=name, drawstyle="steps-mid")
    axes[0].legend(fontsize=8, ncols=4)
    axes[0].set(ylabel="gate", ylim=(-1.05, 1.3))
    axes[1].plot(c, color=BLUE, label="cell state c")
    axes[1].plot(gates[:, 3] * c.tanh(), color="black", linewidth=1, label="output h")
    axes[1].legend(fontsize=8)
    axes[1].set(xlabel="step", ylabel=f"unit {unit}")
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("from_scratch", __doc__)
    parser.option("hidden_size", 16, whole(), small=4)
    parser.common("from_scratch", bar=False)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("from_scratch", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    device = ready(options, LSTM(1, 1, backend=options.backend))
    lstm, x = LSTM(3, options.hidden_size, backend=options.backend).to(device), torch.randn(40, 3, device=device)
    found = differences(options.seed, options.hidden_size, options.backend, options.device)
    for (stage, library), value in found.items():
        print(f"{stage:30} largest difference from {library:12} {value:.1e}")
    step = worked_step()
    for name, tensor in step._asdict().items():
        print(f"{name:9}", "  ".join(f"{value:7.4f}" for value in tensor.tolist()))
    files = [
        save(flow_figure(step), options.out / "flow.png"),
        save(table_figure(step), options.out / "step.png"),
        save(sequence_figure(lstm, x), options.out / "sequence.png"),
    ]
    print(f"written: {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
