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
import gc
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .. import LSTM
from .shared.command import Parser, ready, run, whole
from .shared.training import fit, save_checkpoint

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
    first = options.seed * (options.steps + 1)  # one seed for the validation batch, then one for every step
    held_out = draw(first, 4 * options.batch, options.seq_len, place, device)
    sizes = {"hidden_size": options.hidden_size, "layers": options.layers}

    def keep(step: int, valid: float) -> None:
        if place.rank == 0:
            save_checkpoint(options.out / "best.pt", model, sizes=sizes, step=step, valid_loss=valid)

    return fit(
        model,
        lambda step: loss_of(parallel, draw(first + step, options.batch, options.seq_len, place, device)),
        lambda: mean_over_processes(loss_of(model, held_out), place),  # without DDP, which would wait for gradients
        options,
        keep=keep,
    ).best


class OneVoice(Parser):
    """Says what is wrong from one process only."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n" if Place.from_environment().rank == 0 else None)


def parse(arguments: Sequence[str] | None, place: Place) -> argparse.Namespace:
    parser = OneVoice("distributed", __doc__)
    parser.training(steps=600, small_steps=60, batch=64, learning_rate=4e-3)
    parser.option("seq_len", 20, whole(2), "numbers of a sequence")
    parser.option("hidden_size", 64, whole(), small=32)
    parser.option("layers", 1, whole())
    parser.common("distributed")
    options = parser.parse(arguments)
    if options.batch % place.processes:
        parser.error(f"argument --batch: must be a multiple of the {place.processes} processes, got {options.batch}")
    if options.device == "cuda":
        options.device = f"cuda:{place.local_rank}"
    options.quiet |= place.rank > 0
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    place = Place.from_environment()
    options = parse(arguments, place)
    return run("distributed", lambda: work(options, place), options.out, speaks=place.rank == 0)


def work(options: argparse.Namespace, place: Place) -> None:
    torch.manual_seed(options.seed)  # the same initial weights everywhere
    model = Adder(options.hidden_size, options.layers, options.backend)
    device = ready(options, model.lstm)
    model.to(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        best = train(model, options, place, device)
    finally:
        if place.processes > 1:
            # DDP is a cycle that keeps the process group: were it collected as Python ends, gloo's threads would abort.
            gc.collect()
            dist.destroy_process_group()
    if place.rank == 0:
        print(f"{place.processes} x {device.type}, validation loss {best:.6f} (always answering 1: {BASELINE:.6f})")
        print(f"written: {options.out / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(main())
