"""What crosses between programs: any order of execution gives the same bits, and a broken protocol is caught."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from engines import Engine
from layers import Case, run_recurrence
from planted import plant_everywhere
from torch import Tensor

from lstm_triton.kernels import forward
from lstm_triton.kernels.config import Cell, Config, chance
from lstm_triton.testing.interpreter import Deadlock, cooperative

SEEDS = range(100)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Traps(Case):
    """A layer whose given states and output gradient hold NaN with the bits of an empty mailbox."""

    def tensors(self) -> dict[str, Tensor | None]:
        given = super().tensors()
        nan = torch.tensor(-1, dtype=INTEGERS[self.dtype]).view(self.dtype)
        for name in ("h_0", "dout", "dh_n", "reset_h"):
            if given[name] is not None:
                given[name] = given[name].to(self.dtype)
                given[name][0, 0] = nan
        if self.reset:
            given["reset"][1, 0] = True
        return given


# What adds to the exchange: sums are shared twice a step, and a masked h is sent in place of h.
NORM = Case(seq_len=3, batch=3, hidden_size=40, norm=True, cell=Cell(sampled=True, variational_h=chance(0.3)))
CASE = Case(seq_len=3, batch=3, hidden_size=40, directions=2)  # three hidden tiles, the last one half empty
TRAPS = Traps(seq_len=3, batch=3, hidden_size=40)
RESET_TRAPS = Traps(seq_len=3, batch=3, hidden_size=40, reset=True)


def grid(protocol: str, **changes) -> Config:
    tiles = dict(units_first=False, split_k=1, block_b=16, block_h=16, block_k=32, num_warps=4) | changes
    return Config("grid", protocol, True, **tiles)


def same_bits(results: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype])) for a, b in zip(results, others))


@pytest.mark.every_target
@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
@pytest.mark.parametrize(("case", "seeds"), [(CASE, SEEDS), (NORM, SEEDS[:6])], ids=["plain", "variants"])
def test_a_hundred_schedules_give_the_same_bits(engine: Engine, case: Case, seeds: range, protocol: str) -> None:
    """Forward and backward, outputs and gradients; and the schedules do differ. Compiled code runs every second one."""
    first, traces = None, set()
    seeds = engine.share(seeds[::2] if engine.compiled else seeds)
    case = replace(case, directions=1)  # which never wait for each other
    if engine.compiled:  # where fp32 in full precision has no matrix unit, and takes three times as long
        case = replace(case, dtype=torch.float16)
    for seed in seeds:
        with engine(seed) as run:
            results = run_recurrence(case, grid(protocol))
        assert same_bits(first or results, results), f"schedule {seed} changes the result"
        first = results
        traces.add(tuple(run.trace))
    assert len(traces) == len(seeds)


def test_the_exchange_does_not_show_in_the_result(engine: Engine) -> None:
    """One sum in one order: both protocols and one launch a step give the same bits."""
    configs = [grid("mailbox"), grid("flags"), Config("stepwise", "none", True, False, 1, 16, 16, 32, 4)]
    results = []
    for config in configs:
        with engine(5):
            results.append(run_recurrence(CASE, config))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
def test_lengths_and_resets_under_schedules(engine: Engine, protocol: str) -> None:
    case = Case(seq_len=5, batch=6, hidden_size=20, directions=2, lengths=True, reset=True)
    with engine(0):
        first = run_recurrence(case, grid(protocol))
    for seed in SEEDS[1 : 4 if engine.compiled else 10]:
        with engine(seed):
            assert same_bits(first, run_recurrence(case, grid(protocol)))


@pytest.mark.thinned(6)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
@pytest.mark.parametrize("where", ["x", "w_hh", "h_0", "c_0", "dout", "dh_n", "dc_n"])
@pytest.mark.parametrize("value", ["empty", float("inf")])
def test_nan_and_inf_terminate(engine: Engine, dtype: torch.dtype, protocol: str, where: str, value) -> None:
    """Neither hangs a kernel, and rows of the batch that hold none of it are untouched."""

    check_termination(engine, Case(seq_len=3, batch=3, hidden_size=20, dtype=dtype), protocol, where, value)


def check_termination(engine: Engine, case: Case, protocol: str, where: str, value) -> None:
    @dataclass(frozen=True)
    class Broken(Case):
        def tensors(self) -> dict[str, Tensor | None]:
            given = super().tensors()
            bits = torch.tensor(-1, dtype=INTEGERS[self.dtype]).view(self.dtype)
            given[where] = given[where].to(self.dtype)
            given[where][0, 0] = bits if value == "empty" else value
            return given

    with engine(1, patience=20_000):
        out, _, _, dgates, *_ = run_recurrence(Broken(**vars(case)), grid(protocol))
        clean = run_recurrence(case, grid(protocol))
    if where != "w_hh":  # that one is shared by all rows
        others = torch.arange(9) % 3 != 0
        assert torch.equal(out[others], clean[0][others])
        assert torch.equal(dgates[others], clean[3][others])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
@pytest.mark.parametrize("where", ["x", "h_0", "dout"])
@pytest.mark.parametrize("value", ["empty", float("inf")])
def test_nan_and_inf_terminate_with_layer_norm(engine: Engine, protocol: str, where: str, value) -> None:
    check_termination(engine, Case(seq_len=3, batch=3, hidden_size=20, norm=True), protocol, where, value)


def test_a_deadlock_is_an_error() -> None:
    """The scheduler itself: a launch that waits for a program that is not in it does not go on for ever."""
    config = grid("flags")
    with cooperative(0, patience=2_000), pytest.raises(Deadlock, match="did not finish"):
        run_recurrence(CASE, config, partial(forward.lstm_forward, launch=_launch_without_the_last_tile))


def _launch_without_the_last_tile(kernel, *arguments, **keywords) -> None:
    class Short:
        def __getitem__(self, grid):
            return kernel[(grid[0] - 1, *grid[1:])]

    forward.run(Short(), *arguments, **keywords)


# A bug takes one step of the protocol away: a change of one kernel module's text.
FORWARD_STORE = "send(out + sequence, masks.sent, sequence, tl.where(live, h, 0.0), own_mask, tile, how)"
FORWARD_FLAG = "        raise_flag(peers, tile.hidden_tile, (step + 1) * how.PUBLISHED, how.PROTOCOL)\n"
BACKWARD_STORE = "publish_gates(exchanged + offset, d, tile.owned, how.H, how.PROTOCOL)"
BACKWARD_FLAG = "        raise_flag(peers, tile.hidden_tile, (seq_len - step) * how.PUBLISHED, how.PROTOCOL)\n"
SHARE_STORE = "    publish(own + 1, publishable(second, dtype), tile.in_batch, how.PROTOCOL)\n"
SHARE_FLAG = "    raise_flag(peers, tile.hidden_tile, count, how.PROTOCOL)\n"
EMPTYING = "buffer.view(_INTEGER_OF_SIZE[buffer.element_size()]).fill_(-1)"
BUGS: dict[str, tuple] = {  # name: (protocol, module, changes)
    "forward: nothing published": ("flags", "forward", (FORWARD_FLAG, "")),
    "forward: flag before its data": (
        "flags",
        "forward",
        (FORWARD_STORE, "pass"),
        (FORWARD_FLAG, f"{FORWARD_FLAG}        {FORWARD_STORE}\n"),
    ),
    "forward: a step too few": ("flags", "forward", ("await_flags(peers, step * ", "await_flags(peers, -1 + step * ")),
    "forward: initial state awaited": (
        "mailbox",
        "forward",
        ("Source(rows, step > 0, ", "Source(rows, True, "),
    ),
    "forward: reset state awaited": ("mailbox", "forward", ("at.restart if resets.h is not None else None", "None")),
    "backward: nothing published": ("flags", "backward", (BACKWARD_FLAG, "")),
    "backward: flag before its data": (
        "flags",
        "backward",
        (BACKWARD_STORE, "pass"),
        (BACKWARD_FLAG, f"{BACKWARD_FLAG}        {BACKWARD_STORE}\n"),
    ),
    "backward: the end awaited": (
        "mailbox",
        "backward",
        ("(4 * how.H), inner, None)", "(4 * how.H), True, None)"),
    ),
    "backward: a step too few": (
        "flags",
        "backward",
        ("(peers, (seq_len - 1 - step) *", "(peers, (seq_len - 2 - step) *"),
    ),
    "flags of an earlier launch": ("flags", "launch", ("exchanged.new_zeros((", "99 + exchanged.new_zeros((")),
    "mailboxes never emptied": ("mailbox", "launch", (EMPTYING, "pass")),
    "mailboxes of an earlier launch": ("mailbox", "launch", (EMPTYING, "buffer.fill_(0.5)")),
    "mailboxes read at once": (
        "mailbox",
        "exchange",
        ("(fullest(bits, foreign) == FULL)", "(fullest(bits, foreign) == FULL + 1)"),
    ),
    "NaN with the bits of an empty mailbox": (
        "mailbox",
        "exchange",
        ("tl.where(bits == EMPTY, OTHER_NAN, bits)", "bits"),
    ),
    "share: nothing published": ("flags", "exchange", (SHARE_FLAG, "")),
    "share: flag before its data": ("flags", "exchange", (SHARE_STORE, ""), (SHARE_FLAG, SHARE_FLAG + SHARE_STORE)),
    "share: a tile too few": (
        "flags",
        "exchange",
        ("    await_flags(peers, count, how", "    await_flags(peers, count - 1, how"),
    ),
    "share: mailboxes of an earlier launch": ("mailbox", "launch", ("in self.exchanged:", "in self.exchanged[:1]:")),
    "norm: what follows is not awaited": (
        "flags",
        "launch",
        ("PUBLISHED=3 if features.NORM else 1", "PUBLISHED=2"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(engine: Engine, bug: str, tmp_path) -> None:
    """Without the step that the bug removes, some schedule deadlocks or changes a bit, or the machine sees the fault."""
    protocol, module, *changes = BUGS[bug]
    case = NORM if bug.startswith(("share", "norm")) else TRAPS if protocol == "mailbox" else CASE
    case = RESET_TRAPS if "reset state" in bug else case
    with engine(0):
        right = run_recurrence(case, grid(protocol))
    planted = plant_everywhere(tmp_path, module, *changes)
    passes = []
    for which in ("forward", "backward"):
        home = planted.get(which) or importlib.import_module(f"lstm_triton.kernels.{which}")
        passes.append(getattr(home, f"lstm_{which}"))
    for seed in SEEDS[:20]:
        try:
            with engine(seed, patience=20_000):
                wrong = run_recurrence(case, grid(protocol), *passes)
        except engine.faults:
            return
        if not same_bits(right, wrong):
            return
    pytest.fail("20 schedules did not catch it")
