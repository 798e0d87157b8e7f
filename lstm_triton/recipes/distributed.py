"""Data-parallel training: the same numbers on one process and on many.

    python -m lstm_triton.recipes.distributed --out adding
    torchrun --nproc-per-node 2 -m lstm_triton.recipes.distributed --out adding

The task is the adding problem of Hochreiter and Schmidhuber (1997): a sequence of random numbers of which two are
marked, and the answer is their sum; sequences differ in length. Every process draws the same batch of --batch sequences
and trains on its own share of the rows, so DistributedDataParallel's mean of gradients is that of the whole batch. NCCL
between GPUs, gloo on the CPU. Rank 0 writes to --out: best.pt, the checkpoint with the lowest validation loss.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import LSTM
from .char_lm import Diverged, write_atomically

BASELINE = 1 / 6  # the mean squared error of always answering 1: twice the variance of a uniform number


class Place(NamedTuple):
    """This process among all of them, as torchrun's environment variables say; alone without them."""

    rank: int = 0
    local_rank: int = 0
    processes: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        names = zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), cls())
        return cls(*(int(os.environ.get(name, default)) for name, default in names))


class Adder(nn.Module):
    """An LSTM over (number, mark) pairs and a linear layer on its last h."""

    def __init__(self, hidden_size: int, layers: int, backend: str = "auto") -> None:
        super().__init__()
        self.lstm = LSTM(2, hidden_size, layers, backend=backend)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [T, B, 2] and lengths [B] -> answers [B]."""
        _, (h_n, _) = self.lstm(x, lengths=lengths)
        return self.head(h_n[-1]).squeeze(-1)


def draw(seed: int, batch: int, seq_len: int, place: Place, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """This process's rows of the batch that belongs to a seed: x [T, B, 2], lengths [B], answers [B]."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand((batch, seq_len), generator=generator)
    lengths = torch.randint((seq_len + 1) // 2, seq_len + 1, (batch,), generator=generator).clamp(min=2)
    inside = torch.arange(seq_len) < lengths.unsqueeze(1)
    marked = torch.rand((batch, seq_len), generator=generator).masked_fill(~inside, -1).topk(2).indices
    marks = torch.zeros_like(numbers).scatter(1, marked, 1)
    mine = slice(place.rank, None, place.processes)
    x = torch.stack((numbers, marks), dim=-1)[mine].transpose(0, 1).contiguous()
    return x.to(device), lengths[mine].to(device), (numbers * marks).sum(1)[mine].to(device)


def mean_over_processes(value: Tensor, place: Place) -> float:
    """Every process has the same number of rows, so the mean of their means is that of all rows."""
    if place.processes > 1:
        dist.all_reduce(value)
    return float(value) / place.processes


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, lengths, answers = rows
    return F.mse_loss(model(x, lengths), answers)


def train(model: Adder, options: argparse.Namespace, place: Place, device: torch.device) -> float:
    """Train for options.steps batches; rank 0 keeps the best checkpoint. Returns the lowest validation loss."""
    parallel: nn.Module = model
    if place.processes > 1:
        parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    first = options.seed * (options.steps + 1)  # one seed for the validation batch, then one for every step
    held_out = draw(first, 4 * options.batch, options.seq_len, place, device)
    best, every = math.inf, max(1, options.steps // options.evaluations)
    with tqdm(total=options.steps, unit="step", disable=options.quiet or place.rank > 0) as bar:
        for step in range(1, options.steps + 1):
            loss = loss_of(parallel, draw(first + step, options.batch, options.seq_len, place, device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            bar.update()
            if step % every and step != options.steps:
                continue
            with torch.no_grad():  # without DDP, which would wait for gradients
                valid = mean_over_processes(loss_of(model, held_out), place)
            if not math.isfinite(valid):  # on all processes at once
                raise Diverged(f"the validation loss is {valid} at step {step}; try a lower --learning-rate")
            bar.set_postfix_str(f"validation loss {valid:.5f}")
            if valid < best:
                best = valid
                if place.rank == 0:
                    save(model, options, step, valid)
    return best


def save(model: Adder, options: argparse.Namespace, step: int, valid: float) -> None:
    sizes = {"hidden_size": options.hidden_size, "layers": options.layers}
    checkpoint = {"model": model.state_dict(), "sizes": sizes, "step": step, "valid_loss": valid}
    write_atomically(options.out / "best.pt", lambda part: torch.save(checkpoint, part))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and from one process only."""

    def error(self, message: str):
        self.exit(2, f"distributed: {message}\n" if Place.from_environment().rank == 0 else None)


def parse(arguments: list[str] | None, place: Place) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("distributed"), help="folder for the results (default: %(default)s)"
    )
    integers = dict(steps=600, evaluations=10, batch=64, seq_len=20, hidden_size=64, layers=1)
    for name, default in integers.items():
        more = ", of all processes together" if name == "batch" else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"default: %(default)s{more}"
        )
    for name, value in dict(learning_rate=4e-3, clip=1.0).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, metavar="X", help="default: %(default)s"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    for name in integers:
        least = 2 if name == "seq_len" else 1
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    for name in ("learning_rate", "clip"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed must be in [0, 2^31), got {options.seed}")
    if options.batch % place.processes:
        parser.error(f"--batch must be a multiple of the {place.processes} processes, got {options.batch}")
    if options.device == "cuda" and place.local_rank >= torch.cuda.device_count():
        parser.error(f"--device cuda needs a GPU for every process of a machine, and has {torch.cuda.device_count()}")
    return options


def main(arguments: list[str] | None = None) -> int:
    place = Place.from_environment()
    options = parse(arguments, place)
    device = torch.device(f"cuda:{place.local_rank}" if options.device == "cuda" else "cpu")
    torch.manual_seed(options.seed)  # the same initial weights everywhere
    try:
        model = Adder(options.hidden_size, options.layers, options.backend).to(device)
        model.lstm.refusal(model.head.weight)  # raises where --backend triton is not possible
        if place.rank == 0:
            options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        print(f"distributed: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        best = train(model, options, place, device)
    except KeyboardInterrupt:
        return 130
    except Diverged as error:
        if place.rank == 0:
            print(f"distributed: {error}", file=sys.stderr)
        return 1
    finally:
        if place.processes > 1:
            dist.destroy_process_group()
    if place.rank == 0:
        print(f"{place.processes} x {device.type}, validation loss {best:.6f} (always answering 1: {BASELINE:.6f})")
        print(f"written: {options.out / 'best.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
