"""The model of a step: what it reads in a disassembly, and what it makes of it."""

from __future__ import annotations

import pytest
import step_model
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.listing import Loop, time_loop

from lstm_triton.problem import Problem

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
    assert time_loop("nothing") == Loop({}, {}, {})


@pytest.mark.parametrize(
    ("name", "macs"), [("HMMA.16816.F32.BF16", 2048), ("HMMA.1688.F32.TF32", 1024), ("HGMMA.64x8x16.F32.BF16", 2048)]
)
def test_shapes_of_matrix_instructions(name: str, macs: int) -> None:
    assert step_model.macs_of(name) == macs


def test_an_unknown_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the shape of HMMA\.FOO is not known"):
        step_model.macs_of("HMMA.FOO")


GRID = Config("grid", "mailbox", True, True, 1, 16, 16, 1024, 8, 1, 2)
PROBLEM = Problem("forward", 1024, 16, 1, "bfloat16", "tf32")


def test_terms() -> None:
    """By hand, for eight warps, two a scheduler, at 1755 cycles a microsecond."""
    loop = Loop({"HGMMA.64x8x16.F32.BF16": 64, "MUFU.EX2": 10, "BAR.SYNC": 7, "FADD": 400}, {}, {"LDG": 50})
    step = step_model.predict(loop, GRID, PROBLEM, "sm_90", 132)
    assert step.hop == 0.49
    assert step.tile == pytest.approx(16 * 1024 * 2 / 64 / 1755)
    assert step.weights == 0
    assert step.matrix == pytest.approx(64 * 33 / 1755)  # the chain; by issue it would be 64 x 8
    assert step.special == pytest.approx(10 * 8 * 2 / 1755)
    assert step.issue == pytest.approx(400 * 2 / 1755)
    assert step.barriers == pytest.approx(7 * 30 / 1755)
    assert step.waves == 1
    assert step.binding == "matrix"
    assert step.total == pytest.approx(sum(step.terms.values()))
    assert "bound by matrix" in str(step)


def test_streamed_weights_and_waves() -> None:
    config = Config("grid", "mailbox", False, True, 1, 16, 16, 128, 4, 2, 1)
    problem = Problem("forward", 2048, 64, 1, "bfloat16", "tf32")
    loop = Loop({"FADD": 10}, {"HGMMA.64x8x16.F32.BF16": 8}, {})
    step = step_model.predict(loop, config, problem, "sm_90", 132)
    streamed = 2048 * 64 * 2
    assert step.weights == pytest.approx(max(streamed / 64 / 1755, streamed * 132 / 5.5e6))
    assert step.matrix == pytest.approx(16 * 8 * 33 / 1755)
    assert step.waves == 4


def test_no_exchange_inside_one_program() -> None:
    config = Config("local", "none", True, True, 1, 16, 64, 64, 8)
    step = step_model.predict(
        Loop({"FADD": 4}, {}, {}), config, Problem("forward", 64, 16, 2, "float16", "tf32"), "sm_80", 108
    )
    assert (step.hop, step.tile, step.weights, step.matrix) == (0, 0, 0, 0)
    with pytest.raises(KeyError):
        step_model.predict(Loop({}, {}, {}), config, PROBLEM, "gfx942", 304)
