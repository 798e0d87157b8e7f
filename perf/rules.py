"""Where `auto` leaves a call to nn.LSTM before anybody has measured: the predictions, and what moves them.

    python perf/rules.py                            the predictions as tables, and how many calls are routed away
    python perf/rules.py --measure rules.csv        some shapes of every rule, eager and in CUDA graphs; needs a GPU
    python perf/rules.py --rows rules.csv           these beside their predictions
    python perf/rules.py --rows rules.csv --write   and the factors between them into planning/corrections.json

A table says how many times faster than nn.LSTM the kernels are predicted to be, of a layer with as many inputs as units
and T = 1000: forward, then a whole training step; in brackets where `auto` takes nn.LSTM instead. Nothing in it is
measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

import torch
from rows import Row, RowsError, digits, needs_gpu, provenance, read_rows, start, write_rows
from torch import nn

from lstm_triton import LSTM
from lstm_triton.planning import prediction
from lstm_triton.planning.cudnn import Call
from lstm_triton.planning.device import KNOWN, Device, device_of
from lstm_triton.planning.prediction import KINDS, Prediction, predict
from lstm_triton.tuning.clock import Times, times_of

DEVICES = {
    "H100": KNOWN["sm_90"],
    "A100": KNOWN["sm_80"],
    "RTX 4090": Device("RTX 4090", "sm_89", 128, 99 * 1024),
}
TYPES = ("float16", "bfloat16", "float32")
HIDDEN_SIZES = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
UNALIGNED = (650, 1150, 1500)
BATCHES = (8, 16, 32, 64, 128, 256, 512)
LONG, STEPS, REPEAT = 1000, 128, 15

# Two or more of every rule, on either side of where it turns: launches, products, both persistent kernels, the host.
SHAPES = [
    Call(256, 256, 16, 1, 1, "bfloat16"), Call(256, 256, 16, 4, 1, "bfloat16"), Call(1024, 1024, 128, 1, 1, "bfloat16"),
    Call(1024, 1024, 256, 1, 1, "bfloat16"), Call(1024, 1024, 128, 4, 1, "bfloat16"),
    Call(2048, 2048, 128, 1, 1, "bfloat16"), Call(1024, 1024, 16, 1, 1, "float16"),
    Call(1024, 1024, 128, 1, 1, "float16"), Call(64, 64, 64, 1, 1, "float16"), Call(128, 128, 64, 1, 1, "float16"),
    Call(64, 64, 64, 1, 1, "bfloat16"), Call(128, 128, 64, 1, 1, "bfloat16"), Call(160, 160, 64, 1, 1, "float16"),
]  # fmt: skip
PROVIDERS: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "nn_lstm": (nn.LSTM, {}),
    "ours_kernels": (LSTM, {"backend": "triton"}),
}
MODES = {"forward": False, "train": True}


# --- the predictions as tables


def cell(call: Call, device: Device) -> tuple[str, Prediction, Prediction]:
    """What a table says of a call, and its predictions: of inference and of training."""
    both = tuple(predict(call, device, "tf32", training, LONG) for training in (False, True))
    assert both[0] is not None
    assert both[1] is not None
    texts = [f"({one.speedup:.2f})" if one.leaves_it else f"{one.speedup:.2f}" for one in both if one is not None]
    return " ".join(texts), both[0], both[1]


def tables() -> None:
    print("Predicted, not measured. Sources of the model of nn.LSTM:")
    for source in prediction.SOURCES:
        print(f"- {source}")
    for (name, device), dtype in itertools.product(DEVICES.items(), TYPES):
        found: list[Prediction] = []
        print(f"\n{name}, {dtype}: forward and training, kernels against nn.LSTM\n")
        print("| H | " + " | ".join(f"B={batch}" for batch in BATCHES) + " |")
        print("|---" * (len(BATCHES) + 1) + "|")
        for hidden_size in sorted({*HIDDEN_SIZES, *UNALIGNED}):
            texts = []
            for batch in BATCHES:
                text, *both = cell(Call(hidden_size, hidden_size, batch, 1, 1, dtype), device)
                texts.append(text)
                found += both
            print(f"| {hidden_size} | " + " | ".join(texts) + " |")
        away = sum(one.leaves_it for one in found)
        slowest = min(1.0 if one.leaves_it else one.speedup for one in found)
        print(f"\n{away} of {len(found)} routed away; the slowest that auto takes: {slowest:.2f} of nn.LSTM's speed")


# --- what moves them


def blank(call: Call, provider: str, mode: str) -> Row:
    sizes = (call.input_size, call.hidden_size, call.batch, STEPS, call.num_layers, call.directions)
    return Row("rules", "", *map(str, sizes), call.dtype, provider, mode, "ms", "")


def call_of(row: Row) -> Call:
    sizes = (row.input_size, row.hidden_size, row.batch, row.layers, row.directions)
    return Call(*map(int, sizes), row.dtype)


def run_of(module: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    """A whole call; in training with the gradients of everything, into the same memory every time."""
    cotangent = torch.ones((), device=x.device, dtype=x.dtype)

    def infer() -> None:
        with torch.no_grad():
            module(x)

    def train() -> None:
        out, _ = module(x)
        out.backward(cotangent.expand_as(out))

    return train if training else infer


def in_a_graph(run: Callable[[], None], module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The call as a CUDA graph, captured after a warm-up on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    module.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(call: Call, where: torch.device) -> Iterator[tuple[str, str, Times | str]]:
    """(provider, mode, milliseconds or an error) of a shape, eager and in a graph."""
    dtype, sizes = getattr(torch, call.dtype), (call.input_size, call.hidden_size, call.num_layers)
    for (provider, (kind, options)), (mode, training) in itertools.product(PROVIDERS.items(), MODES.items()):
        torch.manual_seed(0)
        module = kind(*sizes, device=where, dtype=dtype, **options)
        x = torch.randn(STEPS, call.batch, call.input_size, device=where, dtype=dtype, requires_grad=training)
        run = run_of(module, x, training)
        for suffix, make in (("", lambda run, *_: run), ("_graph", in_a_graph)):
            try:
                yield provider + suffix, mode, times_of(make(run, module, x), where, REPEAT)
            except Exception as error:  # what does not run, or not in a graph, is a finding
                said = (str(error).strip() or "no message").splitlines()[0][:300]
                yield provider + suffix, mode, f"{type(error).__name__}: {said}"


def measured_rows(path: Path, where: torch.device) -> list[Row]:
    rows, origin = start(path), provenance(where)
    for call in SHAPES:
        for provider, mode, found in measure(call, where):
            row = replace(blank(call, provider, mode), **origin)
            if isinstance(found, str):
                row = replace(row, error=found)
            else:
                spread = {"p20": digits(found.p20), "p80": digits(found.p80), "repeat": str(found.repeat)}
                row = replace(row, value=digits(found.median), **spread)
            rows.append(row)
            print(line(row), flush=True)
            write_rows(path, rows)
    return rows


def line(row: Row) -> str:
    sizes = f"{row.dtype:9} H={row.hidden_size:<5} B={row.batch:<4} L={row.layers}"
    return f"{sizes} {row.provider:18} {row.mode:8} {row.error or row.value + ' ms'}"


def compared(rows: list[Row], device: Device) -> Iterator[tuple[Row, str, float, float]]:
    """(row, which of KINDS it tells of, milliseconds measured, milliseconds predicted without corrections).

    Graphs tell what the GPU takes, as no host has to keep up with them; eager calls of nn.LSTM what its launches do.
    """
    for row in rows:
        if row.region != "rules" or not row.value:
            continue
        if row.mode not in MODES or row.dtype not in TYPES:
            raise RowsError(f"a row of an unknown mode or type: {row.mode}, {row.dtype}")
        graph = row.provider.endswith("_graph")
        found = predict(call_of(row), device, "tf32", MODES[row.mode], int(row.seq_len), graph, corrected=False)
        kinds = {"ours"} if row.provider.startswith("ours") else {one.kind for one in found.steps} if found else set()
        if found is None or len(kinds) > 1:
            continue
        (kind,) = kinds
        if not graph:
            launched = all(one.host > one.gpu for one in found.steps)
            if kind != "products" or not launched:
                continue
            kind = "launches"
        time = found.ours if kind == "ours" else found.torch
        yield row, kind, float(row.value), time / 1e3


def factors(rows: list[Row], device: Device) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for row, kind, measured, predicted in compared(rows, device):
        print(f"{line(row)}, predicted {predicted:.3g} ms by {kind}: {measured / predicted:.2f}")
        by_kind.setdefault(kind, []).append(measured / predicted)
    return {kind: round(geometric_mean(by_kind[kind]), 3) for kind in KINDS if kind in by_kind}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="rows go here, as they come")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows that --measure has written")
    parser.add_argument("--gpu", choices=sorted(prediction.RIVALS), help="the architecture that --rows are of")
    parser.add_argument("--write", action="store_true", help="keep the factors: predictions then go by them")
    options = parser.parse_args(arguments)
    if options.write and options.rows is None:
        parser.error("--write keeps the factors of --rows")
    if options.measure is not None and options.rows is not None:
        parser.error("--measure makes the rows that --rows reads: one after the other")
    if options.measure is not None:
        if needs_gpu():
            return 2
        try:
            measured_rows(options.measure, torch.device("cuda"))
        except (OSError, RowsError) as error:
            print(f"rules.py: {error}", file=sys.stderr)
            return 2
        return 0
    if options.rows is None:
        tables()
        return 0
    return from_rows(options.rows, options.gpu, options.write)


def from_rows(path: Path, gpu: str | None, write: bool) -> int:
    try:
        rows = read_rows(path)
    except (OSError, RowsError) as error:
        print(f"rules.py: {error}", file=sys.stderr)
        return 2
    device = KNOWN[gpu] if gpu else device_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if device is None:
        print("rules.py: there is no GPU here: --gpu names the architecture that the rows are of", file=sys.stderr)
        return 2
    try:
        found = factors(rows, device)
    except RowsError as error:
        print(f"rules.py: {path}: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"rules.py: {path} has no row that tells of a rule", file=sys.stderr)
        return 2
    print(f"{device.arch}: measured times are of predicted ones", found)
    if write:
        text = json.dumps({**prediction.corrections(), device.arch: found}, indent=1, sort_keys=True)
        prediction.CORRECTIONS.write_text(text + "\n")
        print(f"written to {prediction.CORRECTIONS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
