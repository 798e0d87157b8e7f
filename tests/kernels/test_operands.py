"""Operands that a matrix unit would misread: the rules that find them, and default plans free of them.

Both patterns are bugs of Triton's that no exception and no interpreter shows; perf/NOTES.md has them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import compile_report
import pytest
import torch
import triton
from compile_report import INPUTS, Job, compile_job
from planted import plant

from lstm_triton.kernels import compile as compiler
from lstm_triton.kernels import listing
from lstm_triton.kernels.config import Config
from lstm_triton.kernels.listing import misread_operands
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.planner import NoPlan, plan
from lstm_triton.planning.problem import LARGEST_BATCH, PASSES, SMALLEST_BATCH, Problem, bucket_of_hidden_size

MMA = "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1, 1], instrShape = [1, 16, 8]}>"
DOT = """%a = tt.dot %b, %c, %d, inputPrecision = tf32 : tensor<4x16x{0}xbf16, #ttg.dot_op<{{opIdx = 0, parent = #mma, \
kWidth = {1}}}>> * tensor<4x{0}x8xbf16, #ttg.dot_op<{{opIdx = 1, parent = #mma, kWidth = {1}}}>> -> tensor<4x16x8xf32, #mma>
"""
SHARED = "#{0} = #ttg.nvmma_shared<{{swizzlingByteWidth = {2}, transposed = {1}, elementBitWidth = 16}}>\n"
TRANS = """%a = ttg.memdesc_trans %b {{order = array<i32: 1, 0>}} : !ttg.memdesc<{0}x{1}xbf16, #s, #smem, mutable> \
-> !ttg.memdesc<{1}x{0}xbf16, #t, #smem, mutable>"""


@pytest.mark.parametrize(("depth", "width", "found"), [(16, 4, 0), (16, 8, 2), (32, 8, 0), (8, 2, 0), (8, 4, 2)])
def test_operands_deeper_than_they_are(depth: int, width: int, found: int) -> None:
    assert misread_operands(MMA + "\n" + DOT.format(depth, width)) == found
    assert misread_operands(DOT.format(depth, width)) == 2, "of a layout that is not understood the worst is assumed"


@pytest.mark.parametrize(
    ("depth", "rows", "swizzle", "found"), [(128, 512, 128, 1), (128, 256, 128, 0), (64, 512, 128, 0), (64, 512, 64, 1)]
)
def test_operands_transposed_in_memory(depth: int, rows: int, swizzle: int, found: int) -> None:
    layouts = SHARED.format("s", "true", swizzle) + SHARED.format("t", "false", swizzle)
    assert misread_operands(layouts + TRANS.format(depth, rows)) == found
    backwards = SHARED.format("s", "false", swizzle) + SHARED.format("t", "true", swizzle)
    assert misread_operands(backwards + TRANS.format(rows, depth)) == found
    assert misread_operands(layouts.replace("64", "32").replace("128", "32", 1) + TRANS.format(depth, rows)) == 1
    assert misread_operands(TRANS.format(depth, rows)) == 1


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="its Gluon ends the process over a shared layout")
def test_the_rules_are_those_of_tritons_layouts() -> None:
    from triton._C.libtriton import gluon_ir, ir
    from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout, NVMMASharedLayout
    from triton.experimental.gluon.language.amd import AMDMFMALayout

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)

    def linear(layout, shape):
        return builder.to_linear_layout(layout._to_ir(builder), shape)

    nvidia = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    parents = [(nvidia, "nvidia_mma", 16, 4)] + [
        (AMDMFMALayout(3, [size, size, depth], True, [1, 4]), "amd_mfma", size, 64 // size)
        for size, depth in ((16, 16), (32, 8))
    ]
    for (parent, kind, size, threads), width, depth, index in itertools.product(
        parents, (1, 2, 4, 8, 16), (8, 16, 32, 64, 128), (0, 1)
    ):
        lanes = linear(DotOperandLayout(index, parent, width), [(size, depth), (depth, size)][index]).lane_bases
        complete = 2 ** sum(basis[1 - index] != 0 for basis in lanes) == threads
        assert listing._fits_depth(depth, width, kind, {"instrShape": f"[{size}, {size}, 16]"}) == complete

    sizes = (16, 64, 128, 256, 512, 1024)
    for bits, swizzle, turned, *shape in itertools.product(
        (8, 16, 32), (0, 32, 64, 128), (False, True), sizes, sizes[:-1]
    ):
        if shape[0 if turned else 1] * bits // 8 < max(swizzle, 16):
            continue
        before, after = (NVMMASharedLayout(swizzle, bits, 2, t) for t in (turned, not turned))
        written, read = linear(before, shape).offset_bases, linear(after, shape[::-1]).offset_bases
        fields = {"swizzlingByteWidth": f"{swizzle}", "elementBitWidth": f"{bits}"}
        pair = (("nvmma_shared", fields | {"transposed": str(t).lower()}) for t in (turned, not turned))
        same = [basis[::-1] for basis in written] == read
        assert listing._transposes(shape, *pair) == same, (bits, swizzle, turned, shape)


def lowered(which: str, config: Config, arch: str, hidden_size: int, dtype: torch.dtype, **options) -> str:
    return compiler.compile_pass(which, config, arch, hidden_size, dtype, layouts_only=True, **options).asm["ttgir"]


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_marks_in_bytes_would_be_found(
    arch: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config("local", "none", True, True, 4, 8, 16, 16, 4)
    assert misread_operands(lowered("backward", config, arch, 16, dtype, reset=True)) == 0
    narrow = plant(tmp_path, "backward", ("wide_marks(reset)", "reset"))
    monkeypatch.setattr(compiler, "lstm_backward", narrow.lstm_backward)
    assert misread_operands(lowered("backward", config, arch, 16, dtype, reset=True)) == 2
    assert misread_operands(lowered("backward", config, arch, 16, dtype)) == 0


@pytest.mark.aot
def test_weights_of_wgmma_that_are_transposed_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config("local", "none", True, True, 1, 16, 128, 128, 8)
    assert misread_operands(lowered("forward", config, "sm_90", 128, torch.bfloat16)) == 0
    product = plant(
        tmp_path,
        "product",
        ("how.UNITS_FIRST and not how.BACKWARD and how.BLOCK_B >= 16", "False and how.BLOCK_B >= 16"),
    )
    own = ("from .product import", f"from .{product.__name__.rpartition('.')[2]} import")
    monkeypatch.setattr(compiler, "lstm_forward", plant(tmp_path, "forward", own).lstm_forward)
    assert misread_operands(lowered("forward", config, "sm_90", 128, torch.bfloat16)) == 1
    smaller = Config("local", "none", True, True, 1, 16, 64, 64, 4)
    assert misread_operands(lowered("forward", smaller, "sm_90", 64, torch.bfloat16)) == 0


def without_places(text: str) -> list[str]:
    """A program without the lines that say which file and line it came from."""
    return [line for line in text.splitlines() if not line.startswith("#loc")]


@pytest.mark.aot
def test_layouts_are_those_of_the_binary() -> None:
    config = Config("grid", "mailbox", True, True, 4, 8, 16, 64, 4)
    text = lowered("backward", config, "sm_80", 64, torch.float16, lengths=True, reset=True)
    binary = compiler.compile_pass("backward", config, "sm_80", 64, torch.float16, lengths=True, reset=True)
    # Triton's cache may hold a binary that another checkout of the same source has compiled.
    assert without_places(binary.asm["ttgir"]) == without_places(text)
    assert "cubin" in binary.asm, "what stops at layouts is not kept in the place of a binary"


SAME_UNIT = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}  # and with it the same layouts


def default_jobs() -> list[Job]:
    """Default plans of every bucket of H, for small batches to large: of each kind of product the one with the shallowest chunks.

    Left out: float16, whose layouts are bfloat16's, and ieee, which has no matrix unit. How many rows there are says
    nothing of the layouts, but that 8 never go through wgmma and 64 may through tcgen05.
    """
    kinds: dict[tuple, Job] = {}
    buckets = sorted({bucket_of_hidden_size(hidden_size) for hidden_size in range(1, 2049)})
    batches = (SMALLEST_BATCH, 64, 512, LARGEST_BATCH)
    types = [pair for pair in compile_report.TYPES if pair[0] != "float16" and pair[1] != "ieee"]
    for arch, (dtype, precision), which in itertools.product(KNOWN, types, PASSES):
        for hidden_size, batch in itertools.product(buckets, batches):
            problem = Problem(which, hidden_size, batch, 1, dtype, precision)
            chosen = plan(problem, KNOWN[arch])
            if isinstance(chosen, NoPlan):
                continue
            c = chosen.config
            kind = (c.placement == "local", c.units_first, c.split_k, c.block_b > 8, c.block_h)
            unit = "sm_80" if arch == "sm_100" and c.block_b < 64 else SAME_UNIT.get(arch, arch)
            key = (unit, which, dtype, precision, *kind)
            if key not in kinds or c.block_k < kinds[key].config.block_k:
                kinds[key] = Job(problem, KNOWN[arch], c, "plain", "all", layouts=True)
    return list(kinds.values())


@pytest.mark.aot
def test_default_plans_are_free_of_both_patterns() -> None:
    """With every optional input: behind an operand are then all loads that any call has there, the narrowest included.

    `perf/compile_report.py --all --layouts --inputs every` has the rest."""
    for job in default_jobs():
        row = compile_job(job)
        assert row.ok, row.line()


@pytest.mark.aot
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_smallest_operands_with_each_input(inputs: str) -> None:
    for which, dtype in itertools.product(PASSES, ("bfloat16", "float32")):
        problem = Problem(which, 16, 16, 1, dtype, "tf32")
        config = plan(problem, KNOWN["sm_80"]).config
        assert config.placement == "local"
        row = compile_job(Job(problem, KNOWN["sm_80"], config, "plain", inputs, layouts=True))
        assert row.ok, row.line()
