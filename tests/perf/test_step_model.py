"""The model of a step: what it reads in a disassembly, and what it makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import step_model
import torch

from lstm_triton.kernels.compile import compile_pass, report_of
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.listing import Loop, copied_tiles, time_loop
from lstm_triton.planning.cost import accumulators, estimate, step_of
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.problem import Problem

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R2, [R4] ;
        /*0020*/              @!P0 FADD R2, R2, R3 ;
.L_x_1:
        /*0030*/                   LDG.E.128.STRONG.SYS R8, [R6] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0060*/              @UP0 BRA `(.L_x_2) ;
        /*0070*/                   MUFU.EX2 R2, R2 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""
IN_VAIN = """
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_1:
        /*0020*/                   LDG.E.128.STRONG.SYS R8, [R6] ;
        /*0030*/               @P2 BRA `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.64.STRONG.SYS [R4], R6 ;
        /*0060*/                   MEMBAR.SC.SYS ;
        /*0070*/                   BPT.TRAP 0x1 ;
.L_x_2:
        /*0090*/              @!P3 CALL.REL.NOINC `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00b0*/                   EXIT ;
"""
TWICE_BACK = """
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   FMUL R2, R2, R3 ;
        /*0040*/                   BRA `(.L_x_0) ;
"""
AMD = """
.LBB0_1:
	v_add_f32 v1, v2, v3
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	global_load_dword v4, v[5:6], off
	s_cbranch_scc1 .LBB0_1
"""


def test_loops_come_apart() -> None:
    loop = time_loop(LISTING)
    assert loop.own == {"LDG.E.U16": 1, "FADD": 1, "MUFU.EX2": 1, "BAR.SYNC.DEFER_BLOCKING": 1, "BRA": 1}
    assert loop.waits == {"LDG.E.128.STRONG.SYS": 1, "BRA": 1}
    assert loop.chunks == {"HMMA.16816.F32.BF16": 1, "BRA": 1}
    assert loop.instructions == 9
    step = loop.in_a_step(3)
    assert step["HMMA.16816.F32.BF16"] == 3
    assert step["LDG.E.128.STRONG.SYS"] == 0
    assert time_loop(AMD).own["v_mfma_f32_16x16x16_bf16"] == 1
    assert time_loop(TWICE_BACK).own == {"FADD": 1, "FMUL": 1, "BRA": 2}, "one loop, whichever way it goes on"
    assert time_loop("nothing") == Loop({}, {}, {})
    found = time_loop(IN_VAIN)
    assert found.own == {"FADD": 1, "CALL.REL.NOINC": 1, "BRA": 1}, "what leads to a trap only is no part of a step"
    assert found.waits == {"LDG.E.128.STRONG.SYS": 1, "BRA": 2}


LAYOUT = "#blocked = #ttg.blocked<{{sizePerThread = [1, {0}], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1]}}>"
LOAD = "%1 = tt.load %0 {{isVolatile = true}} : tensor<{0}x!tt.ptr<i32>, #blocked> loc(#loc1)"


@pytest.mark.parametrize(
    ("width", "shape", "copies"), [(1, "16x8", 0), (1, "8x8", 1), (2, "16x16", 0), (2, "16x8", 1), (1, "64x64", 0)]
)
def test_tiles_that_several_threads_load(width: int, shape: str, copies: int) -> None:
    text = LAYOUT.format(width) + "\n" + LOAD.format(shape)
    assert copied_tiles(text) == copies
    assert copied_tiles(text.replace("isVolatile = true", "")) == 0
    assert copied_tiles(LOAD.format(shape)) == 1, "of a layout that is not understood the worst is assumed"


@pytest.mark.aot
@pytest.mark.parametrize(("units", "batch_tile"), [(16, 8), (64, 8), (16, 16)])
def test_shared_sums_have_an_element_for_every_thread(units: int, batch_tile: int) -> None:
    """Layer normalisation over few programs: its own numbers would be fewer than the threads that read them."""
    config = Config("grid", "mailbox", True, True, 8, batch_tile, units, 256, 8)
    report = report_of(compile_pass("backward", config, "sm_90", 128, torch.bfloat16, "tf32", norm=True))
    assert report.copied_tiles == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("HMMA.16816.F32.BF16", (16, 8, 16)),
        ("HMMA.1688.F32.TF32", (16, 8, 8)),
        ("HGMMA.64x8x16.F32.BF16", (64, 8, 16)),
    ],
)
def test_shapes_of_matrix_instructions(name: str, shape: tuple[int, int, int]) -> None:
    assert step_model.shape_of(name) == shape


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the shape of HMMA\.FOO is not known"):
        step_model.shape_of("HMMA.FOO")


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("LDSM.16.M88.4", 512), ("LDSM.16.MT88", 128), ("STS.128", 512), ("LDS", 128), ("LDS.U16", 64), ("FADD", 0),
        ("LDGDEPBAR", 0),
    ],
)  # fmt: skip
def test_traffic_of_shared_memory(name: str, moved: int) -> None:
    assert step_model.shared_bytes_of(name) == moved


HOPPER = KNOWN["sm_90"]
GRID = Config("grid", "mailbox", True, True, 1, 16, 16, 1024, 8, 1, 2)
PROBLEM = Problem("forward", 1024, 16, 1, "bfloat16", "tf32")


def test_terms() -> None:
    """By hand, for eight warps, two a scheduler, at 1755 cycles a microsecond."""
    own = {
        "HGMMA.64x8x16.F32.BF16": 64,
        "MUFU.EX2": 10,
        "BAR.SYNC": 7,
        "FADD": 400,
        "STS.128": 5,
        "WARPGROUP.DEPBAR": 1,
    }
    step = step_model.predict(Loop(own, {}, {"LDG": 50}), GRID, PROBLEM, HOPPER)
    assert step.hop == 0.49
    assert step.tile == pytest.approx(64 * 16 * 1024 * 2 / 5.5e6)  # through L2, of 64 programs
    assert step.weights == 0
    assert step.matrix == pytest.approx(2 * 64 * 16 * (64 + 8) * 2 / 128 / 1755)  # operands of two warpgroups
    assert step.shared == pytest.approx(8 * 5 * 512 / 128 / 1755)
    assert step.special == pytest.approx(10 * 8 * 2 / 1755)
    assert step.issue == pytest.approx(406 * 2 / 1755)
    assert step.barriers == pytest.approx(7 * 30 / 1755)
    assert step.waves == 1
    assert step.binding == "matrix"
    assert step.total == pytest.approx(sum(step.terms.values()))
    assert "bound by matrix" in str(step)


def test_a_chain_of_matrix_instructions() -> None:
    """Each of four warps has a quarter of the depth and one tile of 16 x 8: nothing runs beside its chain."""
    config = Config("grid", "mailbox", True, True, 4, 8, 16, 1024, 4)
    problem = Problem("backward", 256, 8, 1, "bfloat16", "tf32")
    assert accumulators(config, problem) == 1
    step = step_model.predict(Loop({"HMMA.16816.F32.BF16": 16}, {}, {}), config, problem, HOPPER)
    assert step.matrix == pytest.approx(16 * 33 / 1755)
    assert accumulators(config, replace(problem, which="forward")) == 4


def test_streamed_weights_and_waves() -> None:
    config = Config("grid", "mailbox", False, True, 1, 16, 16, 128, 4, 2, 1)
    problem = Problem("forward", 2048, 64, 1, "bfloat16", "tf32")
    loop = Loop({"FADD": 10}, {"HGMMA.64x16x16.F32.BF16": 8}, {})
    step = step_model.predict(loop, config, problem, HOPPER)
    streamed = 2048 * 64 * 2
    assert step.weights == pytest.approx(max(streamed / 64 / 1755, streamed * 132 / 5.5e6))
    assert step.matrix == pytest.approx(16 * 8 * 16 * (64 + 16) * 2 / 128 / 1755)
    assert step.waves == 4


def test_no_exchange_inside_one_program() -> None:
    config = Config("local", "none", True, True, 1, 16, 64, 64, 8)
    problem = Problem("forward", 64, 16, 2, "float16", "tf32")
    step = step_model.predict(Loop({"FADD": 4}, {}, {}), config, problem, KNOWN["sm_80"])
    assert (step.hop, step.tile, step.weights, step.matrix) == (0, 0, 0, 0)


SAMPLE = [
    (Config("local", "none", True, True, 1, 8, 64, 64, 4), Problem("forward", 64, 16, 1, "bfloat16", "tf32")),
    (Config("local", "none", True, True, 4, 8, 64, 64, 4), Problem("backward", 64, 16, 1, "bfloat16", "tf32")),
    (Config("grid", "mailbox", True, True, 1, 16, 16, 512, 4), Problem("forward", 512, 16, 1, "bfloat16", "tf32")),
    (Config("grid", "mailbox", True, True, 4, 8, 16, 1024, 4), Problem("backward", 256, 16, 1, "float16", "tf32")),
    (Config("grid", "mailbox", True, False, 8, 16, 16, 1024, 8), Problem("backward", 512, 16, 1, "bfloat16", "tf32")),
    (Config("grid", "mailbox", False, True, 1, 16, 16, 32, 4, 2), Problem("forward", 512, 16, 1, "float32", "tf32")),
]


@pytest.mark.aot
@pytest.mark.parametrize(("config", "problem"), SAMPLE, ids=lambda one: one.encode() if isinstance(one, Config) else "")
def test_the_estimate_stands_by_the_binary(config: Config, problem: Problem) -> None:
    """What plans are chosen by, before there is a binary, is within a third of what is counted in it; terms within
    a factor of two, or small."""
    binary = compile_pass(
        problem.which, config, "sm_90", problem.hidden_size, getattr(torch, problem.dtype), problem.precision
    )
    found = step_model.predict(report_of(binary).loop, config, problem, HOPPER)
    guess = step_of(estimate(config, problem, HOPPER), config, problem, HOPPER)
    assert guess.total == pytest.approx(found.total, rel=1 / 3)
    for name, value in found.terms.items():
        assert guess.terms[name] <= 2 * value + 0.1, name
        assert guess.terms[name] >= value / 2 - 0.1, name
