"""The figures of measured rows: each takes the rows and returns a Figure, or None if they have nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import Row

BASELINE = "nn_lstm"
WIN, LOSS, ERROR = "#2a6fbb", "#c8453b", "#bbbbbb"
STYLES = {  # provider: name, colour
    "nn_lstm": ("nn.LSTM", "#444444"),
    "nn_lstm_autocast": ("nn.LSTM, autocast", "#999999"),
    "ours": ("lstm_triton", "#2a6fbb"),
    "ours_kernels": ("lstm_triton, kernels", "#7fb2e5"),
    "ours_autocast": ("lstm_triton, autocast", "#1d3f66"),
    "separate_gates": ("loop, separate gates", "#c8453b"),
    "separate_gates_compiled": ("loop, separate gates, compiled", "#e8a29b"),
    "combined_gates": ("loop, combined gates", "#d98a1f"),
    "combined_gates_compiled": ("loop, combined gates, compiled", "#f0c987"),
    "per_step": ("loop, input hoisted", "#4f9d57"),
    "flashrnn": ("FlashRNN", "#8458a8"),
    "torchrl": ("torchrl", "#b05c8f"),
}
PASS = {"forward": "forward", "train": "training step"}
Rows = list[Row]


def style(provider: str) -> tuple[str, str]:
    return STYLES.get(provider, (provider, "#000000"))


def time_of(rows: Iterable[Row], provider: str, mode: str) -> dict[tuple[str, ...], float]:
    """Median ms by shape."""
    found = {}
    for row in rows:
        if row.provider == provider and row.mode == mode and row.metric == "ms" and row.value:
            found[shape_of(row)] = float(row.value)
    return found


def shape_of(row: Row) -> tuple[str, ...]:
    return (row.region, row.label, row.input_size, row.hidden_size, row.batch, row.seq_len, row.layers,
            row.directions, row.dtype)  # fmt: skip


def speedups(rows: Rows, provider: str, mode: str) -> dict[tuple[str, ...], float]:
    """nn.LSTM's time over the provider's, by shape, where both were measured."""
    theirs = time_of(rows, BASELINE, mode)
    return {shape: theirs[shape] / ms for shape, ms in time_of(rows, provider, mode).items() if shape in theirs}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def providers_in(rows: Rows) -> list[str]:
    """Those with a measured value, in the order of STYLES."""
    found = {row.provider for row in rows if row.value} - {"ceiling"}
    return [name for name in STYLES if name in found] + sorted(found - set(STYLES))


def titled(figure: Figure, rows: Rows, text: str) -> Figure:
    where = rows[-1]
    figure.suptitle(f"{text}\n{where.device}, torch {where.torch}, triton {where.triton}, {where.date}", fontsize=10)
    return figure


def speedup_maps(rows: Rows, region: str, provider: str) -> Figure | None:
    """A panel for each type and mode: hidden size down, batch across."""
    of_region = [row for row in rows if row.region == region]
    dtypes = list(dict.fromkeys(row.dtype for row in of_region))
    modes = [mode for mode in PASS if speedups(of_region, provider, mode)]
    if not modes or provider == BASELINE:
        return None
    figure, axes = plt.subplots(
        len(dtypes),
        len(modes),
        figsize=(4.2 * len(modes), 0.9 + 2.6 * len(dtypes)),
        squeeze=False,
        layout="constrained",
    )
    for dtype, line in zip(dtypes, axes):
        for mode, axis in zip(modes, line):
            of_panel = [row for row in of_region if row.dtype == dtype]
            _speedup_map(axis, of_panel, speedups(of_panel, provider, mode))
            axis.set_title(f"{dtype}, {PASS[mode]}", fontsize=9)
    return titled(figure, rows, f"{region}: speed-up of {style(provider)[0]} over nn.LSTM (below 1: a loss)")


def _speedup_map(axis: Axes, rows: Rows, found: dict[tuple[str, ...], float]) -> None:
    hidden = sorted({int(row.hidden_size) for row in rows})
    batches = sorted({int(row.batch) for row in rows})
    cells = {(int(shape[3]), int(shape[4])): value for shape, value in found.items()}
    grid = [[cells.get((h, b), float("nan")) for b in batches] for h in hidden]
    axis.set_facecolor(ERROR)
    axis.imshow([[math.log2(v) for v in line] for line in grid], cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            missing = value != value
            text = "no result" if missing else f"{value:.2f}"
            dark = not missing and abs(math.log2(value)) > 1.2
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xticks(range(len(batches)), batches, fontsize=8)
    axis.set_yticks(range(len(hidden)), hidden, fontsize=8)
    axis.set_xlabel("batch", fontsize=8)
    axis.set_ylabel("hidden size", fontsize=8)


def user_bars(rows: Rows, provider: str) -> Figure | None:
    """The users' shapes, a bar each and mode."""
    of_users = [row for row in rows if row.region == "users"]
    found = {mode: speedups(of_users, provider, mode) for mode in PASS}
    if provider == BASELINE or not any(found.values()):
        return None
    shapes = list(dict.fromkeys(shape_of(row) for row in of_users if row.provider == provider))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.8 + 0.32 * len(shapes)), sharey=True, layout="constrained")
    for axis, (mode, values) in zip(axes, found.items()):
        heights = [values.get(shape, 0.0) for shape in shapes]
        axis.barh(range(len(shapes)), heights, color=[WIN if height >= 1 else LOSS for height in heights])
        for y, height in enumerate(heights):
            axis.text(height, y, f" {height:.2f}" if height else " no result", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(PASS[mode], fontsize=9)
        axis.margins(x=0.12)
    names = [f"{s[1]} (H={s[3]} B={s[4]} T={s[5]} L={s[6]} D={s[7]} {s[8]})" for s in shapes]
    axes[0].set_yticks(range(len(shapes)), names, fontsize=7)
    axes[0].invert_yaxis()
    return titled(figure, rows, f"users' shapes: speed-up of {style(provider)[0]} over nn.LSTM")


SCALES = {
    "scaling T": ("seq_len", "steps T"),
    "scaling B": ("batch", "batch B"),
    "scaling H": ("hidden_size", "hidden size H"),
}


def scaling(rows: Rows, region: str) -> Figure | None:
    """Microseconds a step against one size, with the floor."""
    of_region = [row for row in rows if row.region == region and row.metric == "ms" and row.value]
    modes = [mode for mode in PASS if any(row.mode == mode for row in of_region)]
    if not modes:
        return None
    column, label = SCALES[region]

    def size_of(row: Row) -> int:
        return int(getattr(row, column))

    figure, axes = plt.subplots(1, len(modes), figsize=(5 * len(modes), 4.2), squeeze=False, layout="constrained")
    for axis, mode in zip(axes[0], modes):
        of_mode = [row for row in of_region if row.mode == mode]
        for provider in providers_in(of_mode):
            points = sorted((row for row in of_mode if row.provider == provider), key=size_of)
            x = [size_of(row) for row in points]
            low, middle, high = (
                [per_step(row, getattr(row, key)) for row in points] for key in ("p20", "value", "p80")
            )
            name, colour = style(provider)
            axis.plot(x, middle, marker="o", markersize=3, label=name, color=colour)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        floors = {size_of(row): per_step(row, row.floor) for row in of_mode if row.floor}
        axis.plot(sorted(floors), [floors[x] for x in sorted(floors)], "--", color="black", linewidth=1, label="floor")
        axis.set(xscale="log", yscale="log", xlabel=label)
        sizes = sorted({size_of(row) for row in of_mode})
        axis.set_xticks(sizes, sizes, fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_ylabel("microseconds a step", fontsize=9)
        axis.set_title(PASS[mode], fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    others = ", ".join(f"{name}={getattr(of_region[0], key)}" for key, name in
                      (("hidden_size", "H"), ("batch", "B"), ("seq_len", "T")) if key != column)  # fmt: skip
    return titled(figure, rows, f"time of a step against {label} ({others}, {of_region[0].dtype})")


def per_step(row: Row, ms: str) -> float:
    return float(ms) * 1e3 / int(row.seq_len) / int(row.layers)


def by_size(shapes: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return sorted(shapes, key=lambda shape: (int(shape[3]), int(shape[4])))


def scratch_bars(rows: Rows) -> Figure | None:
    """Every provider's time over nn.LSTM's, by shape: what the loops of tutorials cost."""
    of_set = [row for row in rows if row.region == "scratch"]
    providers = [name for name in providers_in(of_set) if name != BASELINE]
    found = {mode: {name: speedups(of_set, name, mode) for name in providers} for mode in PASS}
    shapes = by_size({s for of_mode in found.values() for values in of_mode.values() for s in values})
    if not shapes:
        return None
    figure, axes = plt.subplots(2, 1, figsize=(10, 6.5), sharex=True, layout="constrained")
    width = 0.8 / len(providers)
    for axis, mode in zip(axes, PASS):
        for index, name in enumerate(providers):
            values = found[mode][name]
            heights = [1 / values[shape] if shape in values else 0.0 for shape in shapes]
            x = [n + (index - (len(providers) - 1) / 2) * width for n in range(len(shapes))]
            axis.bar(x, heights, width, label=style(name)[0], color=style(name)[1])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)
        axis.set_ylabel("time / nn.LSTM's", fontsize=9)
        axis.set_title(PASS[mode], fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(shapes)), [f"H={s[3]}\nB={s[4]}" for s in shapes], fontsize=8)
    axes[0].legend(fontsize=7, ncols=3)
    return titled(figure, rows, f"LSTMs written as loops, time over nn.LSTM's (T={shapes[0][5]}, {shapes[0][8]})")


def gates_bars(rows: Rows) -> Figure | None:
    """What combining the four gates' products into one gains, eager and compiled."""
    of_set = [row for row in rows if row.region == "scratch"]
    pairs = {"eager": ("separate_gates", "combined_gates"),
             "compiled": ("separate_gates_compiled", "combined_gates_compiled")}  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    drawn = False
    for axis, mode in zip(axes, PASS):
        for index, (name, (separate, combined)) in enumerate(pairs.items()):
            slow, fast = time_of(of_set, separate, mode), time_of(of_set, combined, mode)
            shapes = by_size(slow.keys() & fast.keys())
            if not shapes:
                continue
            drawn = True
            x = [n + (index - 0.5) * 0.4 for n in range(len(shapes))]
            axis.bar(x, [slow[s] / fast[s] for s in shapes], 0.38, label=name, color=[STYLES[combined][1]])
            axis.set_xticks(range(len(shapes)), [f"H={s[3]}\nB={s[4]}" for s in shapes], fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(PASS[mode], fontsize=9)
    if not drawn:
        plt.close(figure)
        return None
    axes[0].set_ylabel("separate / combined, time", fontsize=9)
    axes[1].legend(fontsize=8)
    return titled(figure, rows, "what combining the gates' four products into one gains (above 1: combined is faster)")


def memory(rows: Rows) -> Figure | None:
    """Peak memory of a training step where it was measured, else what autograd keeps."""
    peak = any(row.metric == "peak_mib" and row.value for row in rows)
    metric = "peak_mib" if peak else "saved_mib"
    measured = [row for row in rows if row.metric == metric and row.value and float(row.value) > 0]
    if not measured:
        return None
    shapes = list(dict.fromkeys(shape_of(row) for row in measured if row.provider == BASELINE))
    providers = [name for name in providers_in(measured) if name != BASELINE]
    figure, axis = plt.subplots(figsize=(max(7, 0.42 * len(shapes)), 4.4), layout="constrained")
    for provider in (BASELINE, *providers):
        values = {shape_of(row): float(row.value) for row in measured if row.provider == provider}
        name, colour = style(provider)
        y = [values.get(shape, float("nan")) for shape in shapes]
        axis.plot(range(len(shapes)), y, "o", markersize=8 if provider == BASELINE else 5, label=name, color=colour)
    labels = [f"{s[1] or s[0]} H={s[3]} B={s[4]} T={s[5]} {s[8]}" for s in shapes]
    axis.set_xticks(range(len(shapes)), labels, rotation=90, fontsize=6)
    axis.set_yscale("log")
    axis.set_ylabel("MiB", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)
    what = "peak memory of a training step" if peak else "memory kept for the backward pass"
    return titled(figure, rows, f"{what}, beyond input and weights")


def latency(rows: Rows) -> Figure | None:
    """What a user waits for: one step of a rollout, and the first training step of a process."""
    panels = [("step", 1e3, "microseconds, T = 1, until the result is there"),
              ("cold", 1e-3, "seconds from the start of a process to the first gradient")]  # fmt: skip
    found = {mode: [row for row in rows if row.mode == mode and row.value] for mode, _, _ in panels}
    if not all(found.values()):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, (mode, scale, label) in zip(axes, panels):
        providers = providers_in(found[mode])
        for y, provider in enumerate(providers):
            values = [float(row.value) * scale for row in found[mode] if row.provider == provider]
            axis.plot(values, [y] * len(values), "o", alpha=0.5, color=style(provider)[1])
            axis.plot([geometric_mean(values)], [y], "|", markersize=16, color="black")
        axis.set_yticks(range(len(providers)), [style(provider)[0] for provider in providers], fontsize=8)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel=label)
        axis.grid(axis="x", alpha=0.3)
    return titled(figure, rows, "latency: a dot for each shape, a bar for the geometric mean")


def roofline(rows: Rows) -> Figure | None:
    """Training steps: operations per byte that must move, against operations per second."""
    ceilings = {(row.label.split()[0], row.dtype): float(row.value) for row in rows if row.provider == "ceiling"}
    trained = [row for row in rows if row.mode == "train" and row.metric == "ms" and row.value]
    if not trained or ("copy", "") not in ceilings:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for provider in providers_in(trained):
        points = [(*work_of(row), float(row.value)) for row in trained if row.provider == provider]
        x, y = [o / b for o, b, _ in points], [o / ms / 1e9 for o, _, ms in points]
        axis.plot(x, y, "o", markersize=4, alpha=0.7, label=style(provider)[0], color=style(provider)[1])
    low, high = axis.get_xlim()
    span = [max(low, 0.5), max(high, 10) * 2]
    axis.plot(span, [ceilings["copy", ""] * x / 1e3 for x in span], "k--", linewidth=1, label="memory (copy)")
    for (kind, dtype), value in ceilings.items():
        if kind == "product":
            axis.axhline(value, color="black", linewidth=0.8)
            axis.text(span[1], value, f"product, {dtype} ", ha="right", va="bottom", fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of input, gates, output and weights")
    axis.set_ylabel("TFLOP/s", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return titled(figure, rows, "roofline of training steps")


def work_of(row: Row) -> tuple[float, float]:
    """(operations, bytes) of a training step: all its products, and each tensor once."""
    inputs, hidden, batch, steps, layers, directions = (
        int(getattr(row, key)) for key in ("input_size", "hidden_size", "batch", "seq_len", "layers", "directions")
    )
    size, operations, moved = (4 if row.dtype.startswith("float32") else 2), 0.0, 0.0
    for layer in range(layers):
        width = inputs if layer == 0 else hidden * directions
        operations += 3 * 2 * batch * steps * (width + hidden) * 4 * hidden * directions
        moved += (
            2 * size * (batch * steps * (width + 6 * hidden * directions) + (width + hidden) * 4 * hidden * directions)
        )
    return operations, moved


def figures(rows: Rows) -> dict[str, Callable[[], Figure | None]]:
    """What can be drawn of these rows, by file name."""
    found: dict[str, Callable[[], Figure | None]] = {}
    for provider in [name for name in providers_in(rows) if name.startswith("ours")]:
        for region in ("small", "home", "open"):
            found[f"speedup_{region}_{provider}"] = lambda r=region, p=provider: speedup_maps(rows, r, p)
        found[f"users_{provider}"] = lambda p=provider: user_bars(rows, p)
    for region in SCALES:
        found[region.replace(" ", "_")] = lambda r=region: scaling(rows, r)
    found |= {"loops": lambda: scratch_bars(rows), "gates": lambda: gates_bars(rows)}
    found |= {"memory": lambda: memory(rows), "latency": lambda: latency(rows)}
    return found | {"roofline": lambda: roofline(rows)}
