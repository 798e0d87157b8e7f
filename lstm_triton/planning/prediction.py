"""How long a call takes, here and by nn.LSTM, before anybody has measured: what `auto` goes by without a tuned table.

Nothing in this file is a measurement of ours. nn.LSTM on cuDNN is a model: fitted to published timings where there are
any, see SOURCES, and guessed where there are none. Our side is `cost.py`, fitted to compiled kernels that have not run.
So a ratio is good to a factor of about 1.7 either way. What has been measured replaces both: the contests of a tuned
table for the shapes that it has, and `corrections.json` (written by `perf/rules.py`) for the model itself.

Times are microseconds; rates are operations, and bytes, a microsecond.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .cost import MACHINES, microseconds_per_step
from .cudnn import Call, algorithm
from .device import STAND_IN, Device
from .padding import padded_size
from .planner import NoPlan, plan, plan_single
from .problem import ELEMENT_SIZE, PASSES, Problem

SOURCES = (
    "launches: KernelBench, results/timing, level3 problems 35 and 38 on 16 machines, T4 to B200: 4.7 to 14.6 us a "
    "layer, direction and step forward, whatever H; backward is taken for 1.3 times that",
    "persistent kernel: FlashRNN's published figure, H100, float16, B=16, H=768: 1.96 us a step forward, 3.11 backward",
    "small persistent kernel: PyTorch pull request 62143's data, 2021, and a profile of an RTX 5070 Ti",
    "large products, where the GPU does not wait for launches: no published timing beyond H=512; rates are half of the "
    "data sheets' peak or so, and bytes 0.6 of what L2 moves: guesses",
    "a whole call: about 0.1 ms forward and 0.35 ms for a training step, whatever L and D, by a TensorRT issue (4490)",
    "our Python: perf/host_overhead.py on an AMD EPYC core, without a GPU",
)
MARGIN = 1.1  # `auto` leaves a call to nn.LSTM if that is predicted to be so many times faster


@dataclass(frozen=True)
class Rival:
    """What nn.LSTM's time on an architecture is a sum of, for a part with so many multiprocessors.

    rates: of large matrix products, in operations, by the type they are computed in. l2_rate, memory_rate: bytes of
    weights that a product streams from L2, or from memory where they are larger than l2 (bytes); states_rate: of states
    and gates. product, cell: of the two kernels of a step at the least, forward; gap: between kernels. persistent: a
    step of the persistent kernel at the least.
    """

    multiprocessors: int
    rates: dict[str, float]
    l2_rate: float
    memory_rate: float
    l2: float
    states_rate: float
    product: float
    cell: float
    gap: float
    persistent: float


def _rates(half: float, tf32: float, ieee: float) -> dict[str, float]:
    return {"float16": half * 1e6, "bfloat16": half * 1e6, "tf32": tf32 * 1e6, "ieee": ieee * 1e6}


# The H100's, A100's and RTX 4090's are those of SOURCES; of the others the data sheets', by the same proportions.
RIVALS = {
    "sm_80": Rival(108, _rates(170, 85, 14), 2.0e6, 1.3e6, 30e6, 2.0e6, 2.6, 1.3, 2.0, 1.3),
    "sm_86": Rival(72, _rates(65, 32, 20), 1.2e6, 0.5e6, 5e6, 1.0e6, 1.9, 1.0, 1.5, 1.0),
    "sm_89": Rival(128, _rates(120, 60, 55), 2.5e6, 0.9e6, 64e6, 2.5e6, 1.8, 1.0, 1.4, 0.9),
    "sm_90": Rival(132, _rates(450, 200, 45), 3.3e6, 2.7e6, 40e6, 3.0e6, 2.0, 1.0, 1.6, 1.1),
    "sm_100": Rival(148, _rates(1000, 450, 50), 4.8e6, 6.5e6, 100e6, 5.0e6, 1.8, 1.0, 1.6, 1.0),
    "sm_120": Rival(170, _rates(140, 70, 70), 3.0e6, 1.6e6, 90e6, 3.0e6, 1.8, 1.0, 1.4, 0.9),
}
LAUNCHES = {"forward": 8.5, "backward": 11.0}  # of the two kernels of a layer, direction and step, by the host
SMALL = {"forward": (0.65, 1.8), "backward": (1.1, 2.2)}  # a step of the small persistent kernel: H <= 64, <= 128
WIDER = (5.6, 20.0)  # that of 128 < H <= 192, forward only: below 16 rows, and from there on
LEAST = {"inference": 100.0, "training": 350.0}  # a whole call of nn.LSTM, by the host
# A call of ours until its kernels are queued: of the first layer, of each further one; and of one step in one launch.
OURS = {"inference": (130.0, 95.0), "training": (475.0, 370.0), "single": (115.0, 80.0)}

RULES = {
    "products": "large products, by B x H^2",
    "persistent": "cuDNN's persistent kernel",
    "small": "cuDNN's small persistent kernel",
}
KINDS = ("launches", "products", "persistent", "small", "ours")  # what a correction is a factor of
CORRECTIONS = Path(__file__).with_name("corrections.json")


@cache
def corrections() -> dict[str, dict[str, float]]:
    """By architecture, what measured times are of predicted ones, for each of KINDS; empty until there are any."""
    return json.loads(CORRECTIONS.read_text()) if CORRECTIONS.exists() else {}


@dataclass(frozen=True)
class Steps:
    """Microseconds of one step of one pass. nn.LSTM's: of the GPU and of the host, whichever is slower counts.

    kind: which of KINDS the GPU's is.
    """

    which: str
    ours: float
    gpu: float
    host: float
    kind: str

    @property
    def torch(self) -> float:
        return max(self.gpu, self.host)


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a whole call, and the steps that they are made of. rule: what decides on the slower side."""

    ours: float
    torch: float
    steps: tuple[Steps, ...]
    rule: str

    @property
    def speedup(self) -> float:
        """How many times faster than nn.LSTM we are."""
        return self.torch / self.ours

    @property
    def leaves_it(self) -> bool:
        """Whether the call is left to nn.LSTM."""
        return self.ours > MARGIN * self.torch

    def __str__(self) -> str:
        steps = "; ".join(f"{one.which} {one.ours:.1f} here, {one.torch:.1f} there" for one in self.steps)
        return f"{self.rule}: {self.torch / 1e3:.2f} ms against our {self.ours / 1e3:.2f} (us a step: {steps})"


def predict(
    call: Call,
    device: Device,
    precision: str,
    training: bool,
    seq_len: int,
    captured: bool = False,
    corrected: bool = True,
) -> Prediction | None:
    """Of a plain call on an NVIDIA GPU.

    None where nothing is predicted: other GPUs, projections, packed input, float64, tf32x3, no plan.
    precision: of float32, "ieee" or "tf32". captured: into a CUDA graph, where no host has to keep up.
    corrected: by what has been measured, if anything.
    """
    single = seq_len == 1
    steps = steps_of(call, device, precision, training, single, corrected)
    if steps is None:
        return None
    products = (
        seq_len * sum((1 if one.which == "forward" else 3) for one in steps) * _input_products(call, device, precision)
    )
    stacked = call.num_layers * call.directions
    ours_gpu = products + seq_len * call.num_layers * sum(one.ours for one in steps)
    theirs = products + seq_len * stacked * sum(one.gpu if captured else one.torch for one in steps)
    mode = "training" if training else "inference"
    first, further = OURS["single" if single and not training else mode]
    ours_host = 0.0 if captured else first + further * (call.num_layers - 1)
    theirs = max(theirs, 0.0 if captured else LEAST[mode])
    rule = "Python before the launches" if ours_host > ours_gpu else RULES[steps[-1].kind]
    return Prediction(max(ours_gpu, ours_host), theirs, steps, rule)


def _input_products(call: Call, device: Device, precision: str) -> float:
    """A step's share of the products of all inputs, forward: the same on both sides, and backward three times that."""
    inputs = call.input_size + (call.num_layers - 1) * call.directions * call.hidden_size
    rate = 1.15 * _scaled(RIVALS[device.arch].rates[_computed_in(call, precision)], device)
    return call.directions * 8 * call.batch * call.hidden_size * inputs / rate


def _computed_in(call: Call, precision: str) -> str:
    return precision if call.dtype == "float32" else call.dtype


def _scaled(rate: float, device: Device) -> float:
    """A rate of the part that was measured or read about, for a part with fewer or more multiprocessors."""
    return rate * device.multiprocessors / RIVALS[device.arch].multiprocessors


@lru_cache(maxsize=4096)
def steps_of(
    call: Call, device: Device, precision: str, training: bool, single: bool, corrected: bool
) -> tuple[Steps, ...] | None:
    """Of all passes of a call; None where nothing is predicted (what stands in for a GPU has no speed)."""
    if (
        device.arch not in RIVALS
        or device.name == STAND_IN
        or call.proj_size
        or call.packed
        or call.dtype == "float64"
        or precision == "tf32x3"
    ):
        return None
    factors = corrections().get(device.arch, {}) if corrected else {}
    steps, hidden_size = [], call.hidden_size
    if not single:
        hidden_size = padded_size(hidden_size, call.directions, call.dtype, precision, device)
    for which in PASSES[: 2 if training else 1]:
        problem = Problem(which, hidden_size, call.batch, call.directions, call.dtype, precision)
        chosen = plan(problem, device)
        if isinstance(chosen, NoPlan):
            return None
        config = (plan_single(problem, device) if single and which == "forward" else None) or chosen.config
        ours = microseconds_per_step(config, problem, device) * factors.get("ours", 1.0)
        gpu, kind = rival_step(call, device, which, precision)
        host = LAUNCHES[which] * factors.get("launches", 1.0) if kind == "products" else 0.0
        steps.append(Steps(which, ours, gpu * factors.get(kind, 1.0), host, kind))
    return tuple(steps)


def rival_step(call: Call, device: Device, which: str, precision: str) -> tuple[float, str]:
    """Microseconds that a step of a layer and direction takes nn.LSTM on the GPU, and which of KINDS that is."""
    rival, hidden, batch = RIVALS[device.arch], call.hidden_size, call.batch
    forward, size = which == "forward", ELEMENT_SIZE[call.dtype]
    chosen = algorithm(call, device, which).name
    if chosen == "persistent-small":
        if hidden > 128:
            return WIDER[batch >= 16], "small"
        return SMALL[which][hidden > 64] * max(1.0, batch / 256) ** 0.7, "small"
    weights = 4 * hidden**2 * size
    least = rival.product * (1.0 if forward else 1.3)
    rate = _scaled(rival.rates[_computed_in(call, precision)], device)
    streamed = weights / _scaled(rival.l2_rate if weights <= _scaled(rival.l2, device) else rival.memory_rate, device)
    product = least + max(8 * max(batch, 32) * hidden**2 / rate, streamed)
    moved = (20 if forward else 30) * size * batch * hidden / _scaled(rival.states_rate, device)
    cell = rival.cell + moved
    one = product + cell + rival.gap
    if chosen == "persistent":
        machine = MACHINES[device.arch]
        depth = hidden if forward else 0.55 * 4 * hidden
        own = rival.persistent + device.multiprocessors * batch * depth * size / machine.l2
        own += 4 * hidden**2 * batch / (device.multiprocessors * machine.macs * machine.clock)
        return min(own, 1.1 * max(one, LAUNCHES[which])), "persistent"
    if (stacked := call.num_layers * call.directions) > 1:  # layers and directions overlap on the GPU
        one = max(one - least / 2 - rival.cell / 2 - rival.gap, one / stacked)
    return one, "products"
