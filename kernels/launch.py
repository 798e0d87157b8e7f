"""Launching a recurrence: grids, waves of batch tiles, exchange buffers, the device guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl

from .alarm import board_of, raised
from .config import Config, Layout, compute_dtype
from .records import Exchange, How
from .tiles import runs_reversed
from .variants import PLAIN, Features

Launcher = Callable[..., None]  # (kernel, recurrence, arguments), as `run`

MOST_TILES = 65_535  # CUDA's limit for the second grid axis
_TRITON = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64
}  # fmt: skip
NO_EXCHANGE = Exchange()
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wide_marks(reset: torch.Tensor | None) -> torch.Tensor | None:
    """Reset marks as the kernels read them: int32, for no load of theirs to be narrower than the data.

    Triton lays out an operand of a dot by the narrowest load behind it; a byte asks for more depth than a small operand
    has, and the product is wrong: see perf/NOTES.md.
    """
    return None if reset is None else reset.to(torch.int32)


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton runs this kernel in its interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


Grid: TypeAlias = tuple[int, int, int]
Fixed: TypeAlias = dict[str, Any]


@lru_cache(maxsize=4096)
def few_launches(config: Config, layout: Layout, how: How, nvidia: bool) -> tuple[tuple[Grid, Fixed], ...]:
    """Every launch of a pass that has not one for every step."""
    return tuple(every_launch(config, layout, how, nvidia))


def every_launch(config: Config, layout: Layout, how: How, nvidia: bool) -> Iterator[tuple[Grid, Fixed]]:
    """(grid, arguments that both recurrences share and no tensor is in, with Triton's options) of every launch."""
    fixed = compile_options(config, nvidia) | {
        "batch": layout.batch,
        "seq_len": layout.seq_len,
        "row_stride_t": layout.stride_t,
        "row_stride_b": layout.stride_b,
        "how": given(how),
    }
    for first_tile, tiles, step_begin, step_end in launches(config, layout, how.BACKWARD):
        position = {"first_tile": first_tile, "step_begin": step_begin, "step_end": step_end}
        yield (how.TILES, tiles, how.D), fixed | position


def launches(config: Config, layout: Layout, backward: bool) -> Iterator[tuple[int, int, int, int]]:
    """(first batch tile, batch tiles, first step, end step) of every launch, in order."""
    tiles = triton.cdiv(layout.batch, config.block_b)
    wave = min(config.max_batch_tiles or MOST_TILES, MOST_TILES)
    steps: Iterable[tuple[int, int]] = [(0, layout.seq_len)]
    if config.placement == "stepwise":
        order = range(layout.seq_len - 1, -1, -1) if backward else range(layout.seq_len)
        steps = ((step, step + 1) for step in order)
    for begin, end in steps:
        for first in range(0, tiles, wave):
            yield first, min(wave, tiles - first), begin, end


@lru_cache(maxsize=4096)
def how_of(
    config: Config,
    hidden_size: int,
    directions: int,
    order: str | None,
    precision: str,
    dtype: torch.dtype,
    features: Features = PLAIN.features,
    backward: bool = False,
    save: bool = False,
    inputs: int = 0,
    aligned: bool = True,
) -> How:
    """What a launch is compiled for, in plain values."""
    return How(
        dtype=_TRITON[dtype],
        compute=_TRITON[compute_dtype(dtype)],
        H=hidden_size,
        D=directions,
        ORDER=order or ("both" if directions == 2 else "forward"),
        PRECISION=precision if dtype == torch.float32 else "ieee",  # there is no other for the rest
        EXACT=dtype == torch.float32 and precision != "tf32",
        BACKWARD=backward,
        SAVE=save,
        INPUTS=inputs,
        ALIGNED=aligned,
        PLACEMENT=config.placement,
        PROTOCOL=config.protocol,
        RESIDENT=config.resident,
        UNITS_FIRST=config.units_first,
        SPLIT_K=config.split_k,
        BLOCK_B=config.block_b,
        BLOCK_H=config.block_h,
        BLOCK_K=config.block_k,
        TILES=triton.cdiv(hidden_size, config.block_h),
        PUBLISHED=3 if features.NORM else 1,
        **features._asdict(),
    )


def given(how: How) -> How:
    """`how` as the kernels take it, see records.py; they have all been defined for the same."""
    return how if is_interpreted(runs_reversed) else _constants(how)


class _Constants(How):
    """Fields that are tl.constexpr. Triton hashes them at every launch, so the hash is kept."""

    def __hash__(self) -> int:
        found = self.__dict__.get("hash")
        if found is None:
            found = self.__dict__["hash"] = super().__hash__()
        return found


@lru_cache(maxsize=4096)
def _constants(how: How) -> How:
    return _Constants(*map(tl.constexpr, how))


@lru_cache(maxsize=4096)
def compile_options(config: Config, nvidia: bool) -> dict[str, Any]:
    """Triton's options for a config."""
    # Multiply-adds are fused: the default up to Triton 3.9, which warns that it will change.
    options: dict[str, Any] = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True
    }  # fmt: skip
    if config.protocol != "none":
        options["launch_cooperative_grid"] = True
    if nvidia:
        # One program per multiprocessor: nothing is won by the few registers fewer, at the price of
        # a spill, that ptxas aims at when it is not told.
        options["maxnreg"] = 255
    return options


class Recurrence(NamedTuple):
    """One pass to be launched. exchanged: buffers that programs hand each other; the first has the type of the data."""

    config: Config
    layout: Layout
    how: How
    exchanged: Sequence[torch.Tensor | None]

    @property
    def first_exchanged(self) -> torch.Tensor:
        assert self.exchanged[0] is not None
        return self.exchanged[0]

    def calls(self, nvidia: bool) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
        """(grid, arguments that both recurrences share, with Triton's options) of every launch, in order.

        Resets the exchange: flags are made anew, and mailboxes are filled with EMPTY.
        """
        config, layout, exchanged, how = self.config, self.layout, self.first_exchanged, self.how
        flags, waits = None, config.protocol != "none"
        if config.protocol == "flags":
            batch_tiles = triton.cdiv(layout.batch, config.block_b)
            flags = exchanged.new_zeros((how.D, batch_tiles, how.TILES), dtype=torch.int32)
        elif config.protocol == "mailbox":
            for buffer in self.exchanged:
                if buffer is not None:
                    buffer.view(_INTEGER_OF_SIZE[buffer.element_size()]).fill_(-1)
        board = board_of(exchanged.device, how.BACKWARD) if waits else None
        exchange = Exchange(flags, board) if waits else NO_EXCHANGE
        of_pass = every_launch if config.placement == "stepwise" else few_launches
        for grid, fixed in of_pass(config, layout, how, nvidia):
            yield grid, fixed | {"exchange": exchange}


class LaunchRefused(RuntimeError):
    """The device does not run this cooperative launch: it cannot, or has no room now for all programs together."""


def on_device_of(tensor: torch.Tensor) -> torch.accelerator.device_index:
    """A block in which launches go to the tensor's device; a tensor on the CPU changes nothing."""
    return torch.accelerator.device_index(tensor.device.index)


def run(
    kernel: Any, recurrence: Recurrence, arguments: dict[str, Any], start: Callable[..., Any] | None = None
) -> None:
    """Launch a pass on the device of its tensors; `arguments` are the kernel's own. start: by default `looked_up`.

    RuntimeError in words if CUDA fails because a program has waited in vain in an earlier launch.
    """
    with on_device_of(recurrence.first_exchanged):
        for grid, shared in recurrence.calls(nvidia=torch.version.hip is None):
            try:
                (start or looked_up)(kernel, grid, recurrence.config, arguments | shared)
            except RuntimeError as error:
                if said := raised():
                    raise RuntimeError(said) from error
                if recurrence.config.protocol != "none" and _is_refusal(str(error)):
                    raise LaunchRefused(str(error).strip()) from error
                raise


_binaries: dict[tuple, tuple[Any, Any]] = {}  # what Triton has launched, by all that it looks a binary up by


def looked_up(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> Any:
    """kernel[grid](**arguments), without Triton's search for the binary from the second time on.

    config: what `compile_options` follow from. Returns the binary, None if it may be another one the next time.
    """
    kinds = None
    if not is_interpreted(kernel) and not kernel.pre_run_hooks:
        kinds = _kinds(arguments[name] for name in kernel.arg_names)
    if kinds is None:
        kernel[grid](**arguments)
        return None
    # Held apart as Triton does: by the device, which is a target where binaries are only looked up.
    key = id(kernel), triton.runtime.driver.active.get_current_device(), config, arguments["how"], kinds
    known = _binaries.get(key)
    if known is None:
        known = _binaries[key] = kernel, kernel[grid](**arguments)  # with the kernel, for its id to stay its own
    else:
        again(known[1], grid, [arguments[name] for name in kernel.arg_names])
    return known[1]


class Repeated:
    """`run` for calls on one device that differ in nothing but sizes and what is in aligned tensors: by one binary."""

    def __init__(self) -> None:
        self.binary: Any = None

    def __call__(self, kernel: Any, recurrence: Recurrence, arguments: dict[str, Any]) -> None:
        run(kernel, recurrence, arguments, self._start)

    def _start(self, kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
        if self.binary is None or kernel.pre_run_hooks:
            self.binary = looked_up(kernel, grid, config, arguments)
        else:
            again(self.binary, grid, [arguments[name] for name in kernel.arg_names])


def again(binary: Any, grid: Grid, arguments: list[Any]) -> None:
    """Launch a binary that has been launched before."""
    binary[grid](*arguments)


def _kinds(values: Iterable[Any]) -> tuple | None:
    """What Triton specialises a binary on, for aligned pointers and 32-bit integers; None if there are others."""
    found: list[Any] = []
    return tuple(found) if _all_known(values, found.append) else None


def _all_known(values: Iterable[Any], add: Callable[[Any], None]) -> bool:
    for value in values:
        kind = type(value)
        if value is None:
            add(None)
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            if value.data_ptr() % 16:
                return False
            add(value.dtype)
        elif kind is int:
            if not -(2**31) <= value < 2**31:
                return False
            add(int)
        elif isinstance(value, tuple):  # `how` is part of the key as it is; a record's fields are always as many
            if not isinstance(value, How) and not _all_known(value, add):
                return False
        elif isinstance(value, float):
            add(float)
        else:
            return False
    return True


def _is_refusal(text: str) -> bool:
    """CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE and CUDA_ERROR_NOT_SUPPORTED, as Triton words them."""
    return "cooperative launch" in text or "operation not supported" in text
