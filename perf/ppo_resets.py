"""The recurrent part of a PPO update, forward and backward: one call with reset= against a loop over segments.

    python perf/ppo_resets.py --density 0 0.05

With nn.LSTM a rollout is cut wherever an episode ends in any environment, and every segment is a call. That
is how PPO code does it, and the synchronisation that finds the cuts is part of it. The two take turns; before
that, results and gradients of both are compared with fp64. On a CPU our reset= is a loop in plain PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from floor import precise
from rows import device_here, device_name
from shapes import DTYPES
from sweep import positive
from torch import Tensor, nn

from lstm_triton import LSTM
from lstm_triton.tuning.clock import times_of

WARM_UP = 3
# Steps, environments, hidden size, type, rounds. 256 hidden units are usual, and TF32 is what nn.LSTM uses on a GPU.
DEFAULTS = {"cuda": (128, 64, 256, "float32-tf32", 20), "cpu": (64, 16, 64, "float32-ieee", 20)}


@dataclass(frozen=True)
class Rollout:
    """What an update reads, and the gradient of the output that it sends back."""

    x: Tensor  # [T, B, I], a leaf
    state: tuple[Tensor, Tensor]  # each [1, B, H]
    done: Tensor  # bool [T, B]: an episode ended before this step
    cotangent: Tensor  # [T, B, H]

    def double(self) -> Rollout:
        h, c = self.state
        x = self.x.detach().double().requires_grad_()
        return Rollout(x, (h.double(), c.double()), self.done, self.cotangent.double())


def draw(sizes: tuple[int, int, int, int], density: float, **tensors) -> Rollout:
    """sizes: T, B, I, H."""
    torch.manual_seed(0)
    steps, batch, input_size, hidden_size = sizes
    x = torch.randn(steps, batch, input_size, **tensors).requires_grad_()
    h, c = (torch.randn(1, batch, hidden_size, **tensors) for _ in range(2))
    done = torch.rand(steps, batch, device=x.device) < density
    return Rollout(x, (h, c), done, torch.randn(steps, batch, hidden_size, **tensors))


def cuts(done: Tensor) -> list[int]:
    """Where segments begin, the first apart; waits for the device."""
    return (done[1:].any(dim=1).nonzero().flatten() + 1).tolist()


def by_segments(lstm: nn.Module, rollout: Rollout) -> Tensor:
    x, state, out = rollout.x, rollout.state, []
    kept = (~rollout.done).to(x.dtype).unsqueeze(-1)
    for start, stop in pairwise([0, *cuts(rollout.done), len(x)]):
        part, state = lstm(x[start:stop], (kept[start] * state[0], kept[start] * state[1]))
        out.append(part)
    return torch.cat(out)


def in_one_call(lstm: nn.Module, rollout: Rollout) -> Tensor:
    return lstm(rollout.x, rollout.state, reset=rollout.done)[0]


Update = Callable[[nn.Module, Rollout], Tensor]


def clear(lstm: nn.Module, rollout: Rollout) -> None:
    lstm.zero_grad(set_to_none=True)
    rollout.x.grad = None


def results(update: Update, lstm: nn.Module, rollout: Rollout) -> dict[str, Tensor]:
    """The output and every gradient."""
    clear(lstm, rollout)
    out = update(lstm, rollout)
    out.backward(rollout.cotangent)
    leaves = {"x": rollout.x, **dict(lstm.named_parameters())}
    return {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def complaint(theirs: nn.LSTM, ours: LSTM, rollout: Rollout, rounding: float) -> str:
    """What of ours is more than twice as far from fp64 as nn.LSTM, by the rms error; "" if nothing is.

    rounding: a relative error that is none.
    """
    exact = nn.LSTM(theirs.input_size, theirs.hidden_size, device=rollout.x.device, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    truth = results(by_segments, exact, rollout.double())
    plain, found = results(by_segments, theirs, rollout), results(in_one_call, ours, rollout)
    for name, want in truth.items():
        own, error = (rms(got[name].double() - want) for got in (plain, found))
        if not error <= 2 * max(own, rounding * rms(want)):
            return f"wrong {name}: rms error {error:.1e} of {rms(want):.1e}, nn.LSTM's is {own:.1e}"
    return ""


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def times_in_turns(theirs: nn.LSTM, ours: LSTM, rollout: Rollout, repeat: int) -> Tensor:
    """Milliseconds [repeat, 2] of the loop and of the one call."""

    def once(update: Update, lstm: nn.Module) -> float:
        def call() -> None:
            update(lstm, rollout).backward(rollout.cotangent)

        return times_of(call, rollout.x.device, 1, lambda: clear(lstm, rollout), warm_up=0).median

    rounds = [(once(by_segments, theirs), once(in_one_call, ours)) for _ in range(WARM_UP + repeat)]
    return torch.tensor(rounds[WARM_UP:])


def figures(rollout: Rollout, times: Tensor) -> str:
    loop, call = times.median(dim=0).values.tolist()
    p20, ratio, p80 = (times[:, 0] / times[:, 1]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    segments = len(cuts(rollout.done)) + 1
    return f"{segments:8} {loop:9.3f} {call:12.3f} {ratio:7.2f} ({p20:.2f} to {p80:.2f})"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    steps, batch, hidden_size, dtype, repeat = DEFAULTS[device_here().type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", nargs="+", type=share, default=[0, 0.01, 0.05, 0.2], metavar="SHARE",
                        help="of the steps before which an episode ended (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=steps, help="T of a rollout (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=batch, help="environments (default: %(default)s)")
    parser.add_argument("--hidden-size", type=positive, default=hidden_size, help="(default: %(default)s)")
    parser.add_argument("--input-size", type=positive, help="(default: the hidden size)")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=repeat, help="rounds that count (default: %(default)s)")
    return parser.parse_args(arguments)


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"a share is from 0 to 1, not {text}")
    return float(text)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)  # as in all of perf/: on shared cores more threads measure the scheduler
    precise(options.dtype)
    device, hidden_size = device_here(), options.hidden_size
    tensors = dict(device=device, dtype=getattr(torch, options.dtype.partition("-")[0]))
    sizes = (options.steps, options.batch, options.input_size or hidden_size, hidden_size)
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(*sizes[2:], **tensors), LSTM(*sizes[2:], **tensors)
    ours.load_state_dict(theirs.state_dict())
    print("T={} B={} I={} H={}".format(*sizes), f"{options.dtype}, forward and backward, {device_name(device)}")
    refusal = ours.refusal(torch.empty(0, **tensors))
    print(f"ours: {f'step by step in plain PyTorch, {refusal}' if refusal else 'the kernels'}")
    print("density segments   loop ms  one call ms  loop / one call (20% to 80% of rounds)")
    # Whether cuDNN rounds to TF32 is its own choice: where it may, one such rounding is no error.
    rounding = 2**-11 if options.dtype == "float32-tf32" else torch.finfo(tensors["dtype"]).eps
    wrong = False
    for density in options.density:
        rollout = draw(sizes, density, **tensors)
        found = complaint(theirs, ours, rollout, rounding)
        wrong |= bool(found)
        text = found or figures(rollout, times_in_turns(theirs, ours, rollout, options.repeat))
        print(f"{density:7g} {text}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
