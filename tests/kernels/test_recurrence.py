"""Numerics of every placement, protocol, type, direction and feature, against fp64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import Engine
from layers import Case, assert_as_good_as_torch, by_kernels

from lstm_triton.kernels.config import Config, Layout
from lstm_triton.kernels.forward import lstm_forward_kernel
from lstm_triton.kernels.launch import given, how_of
from lstm_triton.kernels.records import Exchange, Masks, Norm, Projection, Resets, Scalars, State

# H = 20 leaves a tail in every block and makes two hidden tiles of 16.
LOCAL = Config("local", "none", True, False, 1, 16, 32, 32, 4)
TILES = {
    "weights-first": dict(units_first=True, split_k=1, block_b=16, block_h=16, block_k=16, num_warps=4),
    "weights-second": dict(units_first=False, split_k=1, block_b=16, block_h=16, block_k=16, num_warps=4),
    "split-k": dict(units_first=False, split_k=2, block_b=16, block_h=16, block_k=32, num_warps=4),
    "split-k-weights-first": dict(units_first=True, split_k=2, block_b=8, block_h=16, block_k=32, num_warps=4),
}
CONFIGS = {
    "local-weights-first": Config("local", "none", True, True, 1, 16, 32, 32, 4),
    "local-weights-second": LOCAL,
    "local-8-rows": Config("local", "none", True, True, 1, 8, 32, 32, 4),
}
for shape, tiles in TILES.items():
    for resident in (True, False):
        suffix = f"{shape}-{'resident' if resident else 'streamed'}"
        CONFIGS[f"mailbox-{suffix}"] = Config("grid", "mailbox", resident, **tiles)
        CONFIGS[f"flags-{suffix}"] = Config("grid", "flags", resident, **tiles)
        CONFIGS[f"stepwise-{suffix}"] = Config("stepwise", "none", resident, **tiles)

for name, tiles in {
    "weights-first": dict(units_first=True, split_k=2, block_b=8, block_k=32),
    "weights-second": dict(units_first=False, split_k=1, block_b=16, block_k=16),
}.items():
    for protocol in ("mailbox", "flags"):
        CONFIGS[f"{protocol}-8-units-{name}"] = Config("grid", protocol, True, **tiles, block_h=8, num_warps=4)

FEATURES = {
    "plain": Case(),
    "no-state": Case(state=False),
    "batch-first": Case(batch_first=True),
    "two-directions": Case(directions=2),
    "lengths": Case(lengths=True, batch=5, seed=1),
    "reset": Case(reset=True, batch=5),
    "everything": Case(directions=2, lengths=True, reset=True, batch_first=True, batch=5, seq_len=6, seed=2),
    "second-batch-tile": Case(batch=17, seq_len=2),  # one row in the second tile of 16
    "one-step": Case(seq_len=1),
    "one-of-each": Case(seq_len=1, batch=1, input_size=1, hidden_size=1),
    "full-tiles": Case(hidden_size=32, batch=16, seq_len=2),  # no mask is ever false
}


def check(engine: Engine, case: Case, config: Config) -> None:
    with engine(case.seed):
        ours = by_kernels(case, config)
    assert_as_good_as_torch(ours, case)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.thinned(2)
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_every_config(engine: Engine, config: Config, feature: str) -> None:
    check(engine, FEATURES[feature], config)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("name", ["local-weights-second", "local-8-rows", "mailbox-split-k-resident", "mailbox-split-k-weights-first-resident", "flags-weights-first-resident", "stepwise-weights-second-streamed"])  # fmt: skip
def test_every_feature(engine: Engine, case: Case, name: str) -> None:
    if case.hidden_size <= 16 and name.startswith("local"):
        config = Config("local", "none", True, False, 1, 16, 16, 16, 4)
    else:
        config = CONFIGS[name]
    check(engine, case, config)


@pytest.mark.parametrize("units_first", [True, False])
def test_two_slices_for_each_gate(engine: Engine, units_first: bool) -> None:
    """Eight warps of a `local` backward pass; at H = 20 the second slice of a gate has a tail."""
    case = FEATURES["everything"]
    forward = Config("local", "none", True, units_first, 1, 8, 32, 32, 8)
    with engine():
        ours = by_kernels(case, forward, replace(forward, split_k=8))
    assert_as_good_as_torch(ours, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["local-weights-first", "mailbox-split-k-resident", "flags-weights-second-streamed", "stepwise-weights-first-resident"])  # fmt: skip
def test_every_type(engine: Engine, dtype: torch.dtype, name: str) -> None:
    check(engine, Case(dtype=dtype, directions=2, lengths=True, reset=True, batch=5, seed=3), CONFIGS[name])


def test_long_sequence_in_16_bit(engine: Engine) -> None:
    """Errors must not grow faster than PyTorch's over many steps: the cell state is fp32."""
    check(engine, Case(dtype=torch.bfloat16, seq_len=60, batch=2), LOCAL)


@pytest.mark.parametrize("protocol", ["mailbox", "flags"])
def test_waves_of_batch_tiles(engine: Engine, protocol: str) -> None:
    """A batch of three tiles in launches of at most two: the flags and mailboxes of both are used."""
    config = Config("grid", protocol, True, False, 1, 16, 16, 16, 4, max_batch_tiles=2)
    check(engine, Case(batch=35, seq_len=2, hidden_size=17, directions=2), config)


def test_forward_and_backward_may_differ(engine: Engine) -> None:
    case = Case(directions=2)
    with engine():
        ours = by_kernels(case, LOCAL, CONFIGS["flags-split-k-resident"])
    assert_as_good_as_torch(ours, case)


def test_offsets_beyond_two_to_the_31() -> None:
    """The last row of a buffer of more than 2^31 gates, where an int32 offset would wrap.

    One step is run, so of the 4 GiB of virtual memory only two pages are touched.
    """
    hidden, seq_len = 16, 2**31 // 64 + 3
    rows = torch.from_numpy(np.zeros((seq_len, 1, 4 * hidden), np.float16))  # lazily committed, unlike torch.zeros
    out = torch.from_numpy(np.zeros((seq_len, 1, hidden), np.float16))
    rows[-1] = torch.linspace(-1, 1, 4 * hidden)
    w_hh = torch.zeros((1, 4 * hidden, hidden), dtype=torch.float16)
    h_n, c_n = torch.zeros(1, 1, hidden), torch.zeros(1, 1, hidden)
    carry = torch.zeros(1, 1, hidden)
    config = Config("stepwise", "none", True, False, 1, 16, 16, 16, 4)
    layout = Layout(1, seq_len, False)
    how = how_of(config, hidden, 1, "forward", "ieee", torch.float16)
    lstm_forward_kernel[(1, 1, 1)](
        gates=rows, w_hh=w_hh, initial=State(), resets=Resets(), out=out, cells=None, final=State(h_n, c_n),
        carry=State(carry.clone(), carry.clone()), lengths=None, single=Projection(), exchange=Exchange(), peephole=None,
        norm=Norm(), masks=Masks(), scalars=Scalars(), batch=1, seq_len=seq_len, row_stride_t=layout.stride_t,
        row_stride_b=layout.stride_b, first_tile=0, step_begin=seq_len - 1, step_end=seq_len, time_begin=0,
        how=given(how),
    )  # fmt: skip
    i, _, g, o = rows[-1, 0].double().view(4, hidden)
    want = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    assert (out[-1, 0].double() - want).abs().max() < torch.finfo(torch.float16).eps
