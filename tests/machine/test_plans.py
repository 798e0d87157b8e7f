"""The plans that users get, executed as they are compiled: every default one up to H = 256, and a sample of all others."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from engines import Engine
from layers import Case, assert_as_good_as_torch, by_kernels

from lstm_triton.kernels.config import Config
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.planner import admissible, plan
from lstm_triton.planning.problem import PASSES, Problem, bucket_of_hidden_size

pytestmark = pytest.mark.machine

TYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "ieee": (torch.float32, "ieee"),
}
SIZES = (1, 16, 20, 33, 64, 128, 160, 192, 224, 256)  # every bucket, some with a tail
FEATURES = (dict(lengths=True, reset=True), dict(state=False), dict(reset=True), dict(directions=2, batch_first=True))


def problems(case: Case, batch: int, precision: str) -> list[Problem]:
    """Of both passes, for a batch size that the case need not have: tiles are chosen by it."""
    dtype = str(case.dtype).removeprefix("torch.")
    return [Problem(which, case.hidden_size, batch, case.directions, dtype, precision) for which in PASSES]


def check(engine: Engine, case: Case, configs: list, precision: str) -> None:
    with engine(case.seed):
        ours = by_kernels(case, *configs, precision)
    assert_as_good_as_torch(ours, case, precision)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch", [16, 4096])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("hidden_size", SIZES)
def test_default_plans(engine: Engine, hidden_size: int, kind: str, batch: int, request: pytest.FixtureRequest) -> None:
    dtype, precision = TYPES[kind]
    feature = FEATURES[(SIZES.index(hidden_size) + list(TYPES).index(kind) + batch) % len(FEATURES)]
    case = Case(seq_len=3, batch=3, hidden_size=hidden_size, dtype=dtype, **feature)
    device = KNOWN[engine.name]
    check(engine, case, [plan(problem, device).config for problem in problems(case, batch, precision)], precision)


def test_every_bucket_is_among_the_sizes() -> None:
    assert {bucket_of_hidden_size(size) for size in range(1, 257)} == {bucket_of_hidden_size(size) for size in SIZES}


@pytest.mark.parametrize("kind", ["bf16", "tf32", "tf32x3"])
def test_plans_of_eight_units(engine: Engine, kind: str) -> None:
    """Every one that a layer too large for this machine has by default, on a smaller layer."""
    dtype, precision = TYPES[kind]
    found: dict[str, set[Config]] = {which: set() for which in PASSES}
    for hidden_size, batch, which in itertools.product((384, 512, 768, 1024), (8, 32), PASSES):
        problem = Problem(which, hidden_size, batch, 1, str(dtype).removeprefix("torch."), precision)
        config = plan(problem, KNOWN[engine.name]).config
        if config.block_h == 8:
            found[which].add(replace(config, max_batch_tiles=0))
    # Where 16 units keep W_hh on chip at all of these sizes, or not even 8 do at any.
    none = {("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_120", "tf32x3")}
    assert any(found.values()) != ((engine.name, kind) in none)
    small = Case(seq_len=3, batch=3, hidden_size=72, dtype=dtype, lengths=True, reset=True)
    default = dict(zip(PASSES, (plan(one, KNOWN[engine.name]).config for one in problems(small, 16, precision))))
    for which, configs in found.items():
        for config in sorted(configs, key=Config.encode):
            pair = default | {which: config}
            check(engine, small, [pair["forward"], pair["backward"]], precision)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("index", range(120))
def test_any_plan_that_is_admissible(engine: Engine, index: int) -> None:
    """What tuning may choose: placements, protocols, operand orders and tiles that no default plan has."""
    draw = random.Random(index)
    dtype, precision = TYPES[draw.choice(list(TYPES))]
    case = Case(
        seq_len=3, batch=3, hidden_size=draw.choice([7, 16, 24, 40, 64, 100]), dtype=dtype, seed=index,
        **draw.choice(FEATURES),
    )  # fmt: skip
    batch, device = draw.choice([1, 16, 64, 4096]), KNOWN[engine.name]
    configs = []
    for problem in problems(case, batch, precision):
        found = admissible(problem, device)
        kinds = sorted({(config.placement, config.protocol, config.resident) for config in found})
        kind = draw.choice(kinds)
        configs.append(draw.choice([c for c in found if (c.placement, c.protocol, c.resident) == kind]))
    check(engine, case, configs, precision)
