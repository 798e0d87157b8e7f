"""The planner on emulated devices: what it picks fits, is resident, and depends on little."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from lstm_triton.kernels.config import Config
from lstm_triton.planning.cost import microseconds_per_step, shared_bytes
from lstm_triton.planning.device import INTERPRETER, KNOWN, Device
from lstm_triton.planning.planner import NoPlan, Plan, admissible, fits, plan, refusal
from lstm_triton.planning.problem import PASSES, Problem, ceil_div

DEVICES = [
    replace(KNOWN[arch], name="emulated", multiprocessors=count, shared_memory=shared * 1024)
    for arch, count, shared in itertools.product(("sm_80", "sm_90", "sm_120"), (20, 84, 132, 200), (64, 99, 163, 227))
]
EVERY_HIDDEN_SIZE = [*range(1, 2049), *range(2049, 8193, 5)]
HIDDEN_SIZES = (1, 3, 17, 64, 130, 512, 650, 1024, 1150, 2048, 4096, 8192)


def problem(which: str = "forward", hidden_size: int = 512, batch: int = 32, **changes) -> Problem:
    return replace(Problem(which, hidden_size, batch, 1, "bfloat16", "tf32"), **changes)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"{d.arch}-{d.multiprocessors}-{d.shared_memory >> 10}k")
def test_plans_fit_any_device(device: Device) -> None:
    for which, hidden_size, batch, directions in itertools.product(PASSES, HIDDEN_SIZES, (1, 64, 2000), (1, 2)):
        chosen = plan(problem(which, hidden_size, batch, directions=directions), device)
        assert isinstance(chosen, Plan)
        config = chosen.config
        assert shared_bytes(config, problem(which, hidden_size, batch)) <= device.shared_memory
        if config.placement == "grid":
            programs = ceil_div(hidden_size, config.block_h) * directions * config.max_batch_tiles
            assert 0 < programs <= device.multiprocessors, "programs that wait for each other must be resident together"


@pytest.mark.parametrize("which", PASSES)
def test_a_plan_for_every_hidden_size(which: str) -> None:
    """From 1 to 2048, and every fifth to 8192, each on another of the devices, in every type in turn."""
    types = itertools.cycle((("bfloat16", "tf32"), ("float32", "tf32"), ("float16", "tf32"), ("float32", "tf32x3")))
    for hidden_size, device, (dtype, precision) in zip(EVERY_HIDDEN_SIZE, itertools.cycle(DEVICES), types):
        asked = problem(which, hidden_size, dtype=dtype, precision=precision)
        chosen = plan(asked, device)
        if isinstance(chosen, NoPlan):
            assert chosen.reason
            continue
        config = chosen.config
        assert shared_bytes(config, asked) <= device.shared_memory
        if config.placement == "grid":
            assert 0 < ceil_div(hidden_size, config.block_h) * config.max_batch_tiles <= device.multiprocessors
        else:
            assert config.placement == "stepwise" or config.block_h >= hidden_size


@pytest.mark.parametrize("arch", [arch for arch in KNOWN if arch.startswith("sm_")])
def test_default_placements(arch: str) -> None:
    device = KNOWN[arch]
    placement = {h: plan(problem(hidden_size=h), device).config.placement for h in (32, 64, 512, 1024)}
    assert placement == {32: "local", 64: "local", 512: "grid", 1024: "grid"}


def test_weights_are_resident_at_1024_on_hopper() -> None:
    for which in PASSES:
        config = plan(problem(which, 1024, 16), KNOWN["sm_90"]).config
        assert config.resident
        assert config.block_b <= 16


def test_few_plans_for_all_batch_sizes() -> None:
    """No batch size leads to a config of its own, and none above 4096 to a new one."""
    for device in (KNOWN["sm_90"], KNOWN["sm_86"]):
        for which, hidden_size in itertools.product(PASSES, (64, 512, 1024)):
            configs = {plan(problem(which, hidden_size, batch), device).config for batch in range(1, 6000, 7)}
            assert len(configs) <= 6


def test_a_plan_is_a_function_of_its_arguments() -> None:
    first, second = (plan(problem(batch=33), replace(KNOWN["sm_90"])) for _ in range(2))
    assert first == second
    assert plan(problem(batch=33), KNOWN["sm_90"]) == plan(problem(batch=64), KNOWN["sm_90"])


def test_on_amd_only_what_fits_one_program_runs() -> None:
    assert plan(problem(hidden_size=64), KNOWN["gfx942"]).config.placement == "local"
    assert "only where W_hh fits one program" in plan(problem(hidden_size=512), KNOWN["gfx942"]).reason


def test_without_cooperative_launch_nothing_waits() -> None:
    device = replace(KNOWN["sm_90"], cooperative=False)
    assert plan(problem(hidden_size=1024), device).config.placement == "stepwise"
    assert plan(problem(hidden_size=64), device).config.placement == "local"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_stepwise_does_not_depend_on_the_batch(arch: str) -> None:
    """Routing decides once per module: a batch size must not turn a grid plan into one launch a step."""
    for which, hidden_size, directions, dtype in itertools.product(
        PASSES, (512, 1536, 2048, 3000, 4096), (1, 2), ("bfloat16", "float32")
    ):
        problems = [problem(which, hidden_size, b, directions=directions, dtype=dtype) for b in (1, 16, 64, 256, 4096)]
        placements = {plan(p, KNOWN[arch]).config.placement == "stepwise" for p in problems}
        assert len(placements) == 1


def test_more_hidden_tiles_than_multiprocessors() -> None:
    """Not even one batch tile is resident as a whole: one launch a step."""
    device = replace(KNOWN["sm_90"], multiprocessors=8)
    assert plan(problem(hidden_size=8192), device).config.placement == "stepwise"


@pytest.mark.parametrize("hidden_size", [1, 20, 64, 300])
def test_the_interpreter_never_gets_a_kernel_that_waits(hidden_size: int) -> None:
    for which in PASSES:
        chosen = plan(problem(which, hidden_size, dtype="float32"), INTERPRETER)
        assert chosen.config.placement in ("local", "stepwise")


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "reason"),
    [
        (KNOWN["sm_90"], "float64", "ieee", "float64 runs through the kernels in Triton's interpreter only"),
        (KNOWN["sm_90"], "int64", "ieee", "not in int64"),
        (Device("T4", "sm_75", 40, 64 * 1024), "float16", "tf32", "compute capability 8.0, T4 has sm_75"),
        (KNOWN["gfx942"], "float32", "tf32x3", "does not compile tf32x3 for gfx942"),
        (Device("MI250", "gfx90a", 104, 64 * 1024), "float16", "tf32", "for gfx942 only, MI250 is gfx90a"),
        (INTERPRETER, "bfloat16", "ieee", "bit patterns of bfloat16"),
    ],
)
def test_reasons(device: Device, dtype: str, precision: str, reason: str) -> None:
    assert reason in refusal(device, dtype, precision).reason
    assert reason in plan(problem(dtype=dtype, precision=precision), device).reason


def test_too_little_shared_memory_is_a_reason() -> None:
    chosen = plan(problem(), replace(KNOWN["sm_90"], shared_memory=4096))
    assert isinstance(chosen, NoPlan)
    assert "fits the shared memory" in chosen.reason


def test_hidden_sizes_are_limited_by_offsets_in_the_weights() -> None:
    assert isinstance(plan(problem(hidden_size=16_384), KNOWN["sm_90"]), Plan)
    assert "at most 16384 in the kernels, got 16385" in plan(problem(hidden_size=16_385), KNOWN["sm_90"]).reason


def test_a_config_that_spills_does_not_fit() -> None:
    """255 registers and 72 bytes of spills on sm_90 when compiled; the budget must refuse it."""
    spills = Config("grid", "mailbox", True, True, 1, 64, 16, 256, 4)
    assert not fits(spills, problem(hidden_size=512), KNOWN["sm_90"])


def test_the_estimate_prefers_what_it_should() -> None:
    def time(**changes) -> float:
        base = Config("grid", "mailbox", True, True, 1, 16, 16, 512, 8, max_batch_tiles=2)
        return microseconds_per_step(replace(base, **changes), problem(hidden_size=1024, batch=16), KNOWN["sm_90"])

    assert time() < time(resident=False)
    assert time() < time(placement="stepwise", protocol="none")
    assert time(block_k=1024) < time(block_k=128)


def test_eight_units_only_where_no_more_keep_the_weights_on_chip() -> None:
    """Then they do, and the rows are so few that the estimate holds."""
    seen = 0
    devices = [*KNOWN.values(), replace(KNOWN["sm_89"], name="RTX 4090", multiprocessors=128)]
    types = (("bfloat16", "tf32"), ("float32", "tf32"))
    for device, which, hidden_size, (dtype, precision) in itertools.product(
        devices, PASSES, (64, 512, 768, 1024), types
    ):
        found = admissible(problem(which, hidden_size, dtype=dtype, precision=precision), device)
        narrow = [config for config in found if config.block_h == 8]
        others = [config for config in found if config.block_h > 8 and config.placement == "grid" and config.resident]
        assert not (narrow and others)
        for config in narrow:
            assert config.resident
            assert config.placement == "grid"
            assert which == "backward" or config.block_b <= 16
        seen += len(narrow)
    assert seen > 20
    faster = problem("forward", 1024, 8, dtype="float16")
    assert plan(faster, devices[-1]).config.block_h == 8
