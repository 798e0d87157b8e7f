"""Our LSTM against nn.LSTM on one GPU, in one run: a first table.

    python perf/first_table.py --out results/first.csv

Per shape and type: forward under no_grad and a training step (forward, backward, all gradients),
medians with the 20th and 80th percentile, peak memory of the training step, and the ratio. A shape
is timed only after our outputs and gradients have been found as close to fp64 as twice nn.LSTM's.
nn.LSTM's weights are flattened, TF32 is the same on both sides, gradients are cleared outside the
timer. An error is a row that says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from measure import needs_gpu, quantiles_of, write_rows
from torch import nn

from lstm_triton import LSTM

# region, hidden size = input size, batch, steps, layers, directions, type. What "region" means is
# which algorithm PyTorch asks cuDNN for; shapes as users run them.
COLUMNS = ("region", "hidden_size", "batch", "seq_len", "layers", "directions", "dtype")
SHAPES = [
    ("small", 64, 32, 512, 1, 1, "float16"),
    ("small", 128, 64, 256, 1, 1, "float16"),
    ("small", 128, 64, 256, 1, 1, "float32"),
    ("home", 256, 32, 512, 1, 1, "float16"),
    ("home", 512, 64, 256, 1, 1, "float16"),
    ("home", 768, 16, 1024, 1, 1, "float16"),
    ("home", 1024, 64, 256, 1, 1, "float16"),
    ("open", 256, 32, 512, 2, 2, "bfloat16"),
    ("open", 512, 64, 256, 2, 1, "bfloat16"),
    ("open", 512, 64, 256, 1, 1, "float32"),
    ("open", 650, 32, 128, 2, 1, "bfloat16"),
    ("open", 768, 16, 1024, 1, 1, "bfloat16"),
    ("open", 1024, 128, 128, 1, 1, "bfloat16"),
    ("open", 1024, 16, 512, 1, 2, "float16"),
    ("open", 1500, 20, 64, 2, 1, "bfloat16"),
    ("open", 2048, 16, 128, 1, 1, "bfloat16"),
]


def modules(shape: tuple) -> tuple[nn.LSTM, LSTM, torch.Tensor]:
    _, size, batch, steps, layers, directions, dtype = shape
    torch.manual_seed(0)
    theirs = nn.LSTM(size, size, layers, bidirectional=directions == 2).cuda().to(getattr(torch, dtype))
    theirs.flatten_parameters()
    ours = (
        LSTM(size, size, layers, bidirectional=directions == 2, backend="triton").cuda().to(theirs.weight_ih_l0.dtype)
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(steps, batch, size, device="cuda", dtype=theirs.weight_ih_l0.dtype, requires_grad=True)
    return theirs, ours, x


def train(module: nn.Module, x: torch.Tensor) -> None:
    output, _ = module(x)
    output.backward(torch.ones_like(output))


def clear(module: nn.Module, x: torch.Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    clear(module, x)
    output, (h_n, c_n) = module(x)
    (output.square().sum() + h_n.sum() + c_n.sum()).backward()
    return [t.detach().double() for t in (output, h_n, c_n, x.grad, *(p.grad for p in module.parameters()))]


def wrong(theirs: nn.LSTM, ours: LSTM, x: torch.Tensor) -> str:
    """Which result is further from fp64 than twice nn.LSTM's distance; "" if none is."""
    exact = nn.LSTM(theirs.input_size, theirs.hidden_size, theirs.num_layers, bidirectional=theirs.bidirectional)
    exact = exact.cuda().double()
    exact.load_state_dict(theirs.state_dict())
    truth = results(exact, x.detach().double().requires_grad_())
    for index, (a, b, want) in enumerate(zip(results(ours, x), results(theirs, x), truth)):
        error, own = float((a - want).abs().max()), float((b - want).abs().max())
        if not error <= 2 * own:
            return f"result {index}: error {error:.2e} against nn.LSTM's {own:.2e}"
    return ""


def peak_mib(module: nn.Module, x: torch.Tensor) -> float:
    clear(module, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(module, x)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(shape: tuple, repeat: int) -> dict:
    row: dict = dict(zip(COLUMNS, shape)) | {"error": ""}
    theirs, ours, x = modules(shape)
    row["error"] = wrong(theirs, ours, x)
    if row["error"]:
        return row
    for provider, module in (("nn", theirs), ("ours", ours)):
        with torch.no_grad():
            low, middle, high = quantiles_of(lambda m=module: m(x), repeat)
        row |= {f"{provider}_forward_ms": middle, f"{provider}_forward_p20": low, f"{provider}_forward_p80": high}
        low, middle, high = quantiles_of(lambda m=module: train(m, x), repeat, lambda m=module: clear(m, x))
        row |= {f"{provider}_train_ms": middle, f"{provider}_train_p20": low, f"{provider}_train_p80": high}
        row[f"{provider}_train_mib"] = peak_mib(module, x)
    row["forward_speedup"] = row["nn_forward_ms"] / row["ours_forward_ms"]
    row["train_speedup"] = row["nn_train_ms"] / row["ours_train_ms"]
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args(arguments)
    if needs_gpu():
        return 2
    rows: list[dict] = []
    for shape in SHAPES:
        try:
            row = measure(shape, options.repeat)
        except Exception as error:  # a failure is a result: it becomes a row
            row = dict(zip(COLUMNS, shape))
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        rows.append(row)
        speed = (
            f"forward {row['forward_speedup']:.2f}x, train {row['train_speedup']:.2f}x"
            if not row["error"]
            else row["error"]
        )
        print(*shape, "|", speed, flush=True)
        keys = list(dict.fromkeys(key for known in rows for key in known))
        write_rows(options.out, [{key: known.get(key, "") for key in keys} for known in rows])
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
