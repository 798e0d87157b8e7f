"""What a variant of the cell costs: a training step of each against the plain cell, and against the loop users write.

    python perf/variants.py --hidden-size 512 --batch 32

The loop is what stands in scripts today: nn.Linear for the input, W_hh h in a Python loop over time, masks by
torch.bernoulli, everything by autograd. All take turns within a round; a ratio is the median of its rounds'. Before
that, results and gradients of ours are compared with `backend="torch"` in fp64, drawn with the same seed. On a CPU
ours is a loop in plain PyTorch too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from compile_report import VARIANTS
from floor import precise
from rows import device_here, device_name
from shapes import DTYPES
from sweep import positive
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lstm_triton import LSTM
from lstm_triton.tuning.clock import times_of
from lstm_triton.variant import Variant

WARM_UP = 2
# Steps, rows, hidden size, type, rounds.
DEFAULTS = {"cuda": (200, 32, 512, "float32-tf32", 20), "cpu": (32, 8, 64, "float32-ieee", 5)}
# The gradient clip is no loop that users write: it needs a hook at every step.
LOOPS = [name for name in VARIANTS if name not in ("recurrent_grad_clip", "all_but_layer_norm", "everything")]


class Loop(nn.Module):
    """One of `LOOPS` as a user writes it, with the parameters of our module of that variant."""

    def __init__(self, ours: LSTM) -> None:
        super().__init__()
        self.variant, self.hidden_size = ours.variant, ours.hidden_size
        for name, parameter in ours.named_parameters():
            setattr(self, name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        v, hidden = self.variant, self.hidden_size
        h = c = x.new_zeros(x.shape[1], hidden)
        if isinstance(v.variational_dropout, tuple) and v.variational_dropout[0]:
            x = x * self._mask((x.shape[1], x.shape[2]), v.variational_dropout[0], x)
            h_mask = self._mask(h.shape, v.variational_dropout[1], x)
        products, out = F.linear(x, self.weight_ih_l0), []
        if v.layer_norm:
            products = F.layer_norm(products, products.shape[-1:], self.gain_ih_l0)
        products = products + self.bias_ih_l0 + self.bias_hh_l0
        for product in products.unbind():
            recurrent = F.linear(h * h_mask if v.variational_dropout[1] else h, self.weight_hh_l0)
            if v.layer_norm:
                recurrent = F.layer_norm(recurrent, recurrent.shape[-1:], self.gain_hh_l0)
            i, *f, g, o = (product + recurrent).chunk(v.gates, 1)
            if v.peephole:
                w_i, w_f, w_o = self.weight_ch_l0.chunk(3)
                i, f[0] = i + w_i * c, f[0] + w_f * c
            i, g = i.sigmoid(), g.tanh()
            if v.recurrent_dropout:
                g = F.dropout(g, v.recurrent_dropout)
            new = (f[0].sigmoid() if f else 1 - i) * c + i * g
            if v.cell_clip:
                new = new.clamp(-v.cell_clip, v.cell_clip)
            o = (o + w_o * new if v.peephole else o).sigmoid()
            seen = F.layer_norm(new, new.shape[-1:], self.gain_c_l0, self.bias_c_l0) if v.layer_norm else new
            made = o * seen.tanh()
            if v.zoneout[0]:
                made = torch.where(torch.rand_like(h) < v.zoneout[0], h, made)
                new = torch.where(torch.rand_like(c) < v.zoneout[1], c, new)
            h, c = made, new
            out.append(h)
        return torch.stack(out)

    @staticmethod
    def _mask(shape: tuple[int, ...] | torch.Size, p: float, like: Tensor) -> Tensor:
        return F.dropout(like.new_ones(shape), p)


def loop_of(ours: LSTM) -> Loop:
    return Loop(ours)


def ours_of(variant: Variant, sizes: tuple[int, int], **options) -> LSTM:
    torch.manual_seed(0)
    return LSTM(*sizes, **variant.asked(), **options)


def complaint(variant: Variant, module: LSTM, x: Tensor, cotangent: Tensor, rounding: float) -> str:
    """What of ours is more than twice as far from fp64 as PyTorch's path, by the rms error; "" if nothing is."""
    results = {}
    for name, backend, dtype in (
        ("truth", "torch", torch.float64),
        ("torch", "torch", x.dtype),
        ("ours", "auto", x.dtype),
    ):
        other = ours_of(variant, (module.input_size, module.hidden_size), backend=backend).to(x.device, dtype)
        other.load_state_dict(module.state_dict())
        given = x.detach().to(dtype).requires_grad_()
        torch.manual_seed(1)
        out = other(given)[0]
        grads = torch.autograd.grad(out, [given, *other.parameters()], cotangent.to(dtype))
        results[name] = [out.detach(), *grads]
    for want, plain, found in zip(results["truth"], results["torch"], results["ours"]):
        own, error = (float((got.double() - want).square().mean().sqrt()) for got in (plain, found))
        scale = float(want.square().mean().sqrt())
        if not error <= 2 * max(own, rounding * scale):
            return f"wrong: rms error {error:.1e} of {scale:.1e}, PyTorch's path has {own:.1e}"
    return ""


def step_of(module: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], None]:
    def step() -> None:
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).backward(cotangent)

    return step


def times_in_turns(modules: list[nn.Module], x: Tensor, cotangent: Tensor, repeat: int) -> Tensor:
    """Milliseconds [repeat, modules] of a training step."""

    def once(module: nn.Module) -> float:
        def clear() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None

        return times_of(step_of(module, x, cotangent), x.device, 1, clear, warm_up=0).median

    rounds = [[once(module) for module in modules] for _ in tqdm(range(WARM_UP + repeat), leave=False, disable=None)]
    return torch.tensor(rounds[WARM_UP:])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    steps, batch, hidden_size, dtype, repeat = DEFAULTS[device_here().type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=[name for name in VARIANTS if name != "plain"]
    )
    parser.add_argument("--steps", type=positive, default=steps, help="T (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=batch, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=positive, default=hidden_size, help="(default: %(default)s)")
    parser.add_argument("--input-size", type=positive, help="(default: the hidden size)")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=repeat, help="rounds that count (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)  # as in all of perf/: on shared cores more threads measure the scheduler
    precise(options.dtype)
    device, sizes = device_here(), (options.input_size or options.hidden_size, options.hidden_size)
    tensors = dict(device=device, dtype=getattr(torch, options.dtype.partition("-")[0]))
    torch.manual_seed(0)
    x = torch.randn(options.steps, options.batch, sizes[0], **tensors).requires_grad_()
    cotangent = torch.randn(options.steps, options.batch, sizes[1], **tensors)
    plain = ours_of(Variant(), sizes).to(**tensors)
    print("T={} B={} I={} H={}".format(options.steps, options.batch, *sizes), end=" ")
    print(f"{options.dtype}, training step, {device_name(device)}")
    print(f"{'variant':20} {'ours ms':>9} {'/ plain cell':>13} {'loop ms':>9} {'loop / ours':>12}")
    rounding = 2**-11 if options.dtype == "float32-tf32" else torch.finfo(tensors["dtype"]).eps
    wrong = False
    for name in options.variant:
        variant = VARIANTS[name]
        module = ours_of(variant, sizes).to(**tensors)
        found = complaint(variant, module, x, cotangent, rounding)
        wrong |= bool(found)
        if found:
            print(f"{name:20} {found}", flush=True)
            continue
        modules = [plain, module, *([loop_of(module)] if name in LOOPS else [])]
        times = times_in_turns(modules, x, cotangent, options.repeat)
        ours = times[:, 1]
        line = f"{name:20} {float(ours.median()):9.3f} {float((ours / times[:, 0]).median()):13.2f}"
        if name in LOOPS:
            line += f" {float(times[:, 2].median()):9.3f} {float((times[:, 2] / ours).median()):12.2f}"
        print(line, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
