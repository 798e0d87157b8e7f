"""What a config costs: shared memory, time, bytes and operations. Pure arithmetic, coarse on purpose.

`shared_bytes` errs to the large side, and tests hold it against compiled kernels.
`microseconds_per_step` only ranks configs: it is a sum of published latencies and bandwidths.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import Device
from .kernels.config import Config
from .problem import Problem, ceil_div


def shared_bytes(config: Config, problem: Problem) -> int:
    """Estimate, from above, of a program's shared memory."""
    size, width = problem.element_size, problem.width(config.block_h)
    copies = 2 if problem.dtype == "float32" and problem.precision == "tf32x3" else 1  # high and low parts
    if config.placement == "local":
        return copies * 4 * config.block_h * config.block_h * size + (4 * size + 8) * config.block_b * config.block_h
    chunks = ceil_div(problem.depth, config.block_k) if config.resident else 1
    weights = chunks * config.block_k * width * size * config.num_stages
    tile = config.block_b * config.block_k * size * config.num_stages
    sums = 4 * config.split_k * config.block_b * width
    return copies * weights + max(copies * tile, sums) + 6144


def microseconds_per_step(config: Config, problem: Problem, device: Device) -> float:
    """Coarse time of one step of the whole batch; see the module's docstring.

    Sources: a hop between SMs 0.65 us by flags, L2 about 5.5 TB/s and 64 B/clock per SM, shared
    memory 128 B/clock (H100; clock 1.7 GHz); a launch from Python about 20 us.
    """
    clock, l2, size = 1.7e3, 5.5e6, problem.element_size
    depth, width = ceil_div(problem.depth, config.block_k) * config.block_k, problem.width(config.block_h)
    hidden_tiles = ceil_div(problem.hidden_size, config.block_h) if config.placement != "local" else 1
    batch_tiles = ceil_div(problem.batch, config.block_b)
    programs = hidden_tiles * batch_tiles * problem.directions
    waves = ceil_div(programs, device.multiprocessors)
    if config.max_batch_tiles:
        waves = max(waves, ceil_div(batch_tiles, config.max_batch_tiles))
    weights, tile = depth * width * size, config.block_b * depth * size
    macs = config.block_b * depth * width
    if config.placement == "local":
        weights, tile, macs = 4 * config.block_h**2 * size, 0, 4 * config.block_b * config.block_h**2
    rate = 64 if problem.without_tensor_cores else 1024 if size == 2 else 512
    wide = config.units_first and device.has_wgmma and width >= 64
    # The matrix unit reads the weights from where they are while it multiplies.
    time = max(macs / (rate * (2 if wide else 1)), weights / (128 if config.resident else 64)) / clock
    time += tile / 64 / clock + (0 if config.resident else weights) * min(programs, device.multiprocessors) / l2
    chunks = depth // config.block_k if config.placement != "local" else 1
    time += {"none": 0.02, "flags": 0.02, "mailbox": 0.06}[config.protocol] * chunks
    exchange = 0.9 if config.protocol == "flags" else 0.8
    time += {"local": 0.2, "grid": exchange, "stepwise": 20.0, "single": 0.0}[config.placement]
    time += 0.01 * config.block_b * config.block_h / (32 * config.num_warps)
    return time * waves


@dataclass(frozen=True)
class Work:
    """What one step of one pass does for the whole batch.

    operations: of the recurrent product, a multiplication and an addition counted as two.
    memory_bytes: per step between the chip and device memory, each tensor once: the projected input
        and the output; in training also the gates and cells kept; in backward these and the gradients.
    exchanged_bytes: read through L2 by all programs: the tile handed over, and W_hh where it is
        not resident.
    """

    operations: int
    memory_bytes: int
    exchanged_bytes: int


def work_per_step(config: Config, problem: Problem, training: bool = True) -> Work:
    """Counted from the config, not measured."""
    hidden, directions, size = problem.hidden_size, problem.directions, problem.element_size
    state = problem.batch * hidden * directions * size  # one [B, D, H] tensor
    tensors = 5 + 5 * training if problem.which == "forward" else 10  # gates 4, out; gates 4, cells | 4, 1, dout, 4
    programs = directions * ceil_div(problem.batch, config.block_b) * ceil_div(hidden, config.block_h)
    exchanged = 0
    if config.placement != "local":
        exchanged += programs * config.block_b * problem.depth * size
    if not config.resident:
        exchanged += programs * problem.depth * problem.width(config.block_h) * size
    return Work(8 * problem.batch * hidden * hidden * directions, tensors * state, exchanged)
