"""The variants of the cell compiled ahead of time: nothing where they are off, and no spills where they are on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import compile_report
import pytest
import torch
from layers import backward_of
from planted import plant, prune

from lstm_triton.kernels import activate, backward, forward, masks
from lstm_triton.kernels import compile as compiler
from lstm_triton.kernels.config import Cell, Config, Layout, chance
from lstm_triton.kernels.records import Scalars
from lstm_triton.kernels.variants import Features, Variants
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.planner import plan
from lstm_triton.planning.problem import PASSES, Problem
from lstm_triton.variant import Variant

pytestmark = pytest.mark.aot
REPORT = Path(__file__).parents[2] / "perf" / "compile_report.py"

# What the arguments of the variants are for the plain cell.
OFF = dict.fromkeys(
    [
        *(
            "masks.h_mask",
            "masks.h_0",
            "masks.reset_h",
            "masks.sent",
            "scalars.cell_clip",
            "scalars.recurrent_grad_clip",
            "bound",
        ),
        *("peephole", "peephole.i", "peephole.f", "peephole.o", "dpeephole", "dreset.h", "own_mask", "sent"),
    ]
) | dict.fromkeys([f"how.{n}" for n in ("NORM", "COUPLED", "ZONEOUT_H", "ZONEOUT_C", "DROPOUT", "SAMPLED")], False)
OFF |= {"ZONEOUT": False}


def test_the_report_has_every_variant() -> None:
    asked = {name for variant in compile_report.VARIANTS.values() for name in variant.asked()}
    assert asked == {one.name for one in fields(Variant)} - {"weight_dropout"}  # which is no matter of the kernels


def test_every_field_of_a_variant_is_turned_off() -> None:
    """A field that is missing in OFF would stay in the pruned kernels, and the next test could not fail."""
    expected = [f"scalars.{name}" for name in Scalars._fields] + [f"how.{name}" for name in Features._fields]
    assert [name for name in expected if name not in OFF] == []


def code(binary) -> str:
    """PTX without what says from which line of which file it came."""
    lines = (
        line
        for line in binary.asm["ptx"].split(".section")[0].splitlines()
        if not re.match(r"\s*(\.loc|\.file|//|\$L__tmp)", line)
    )
    return "\n".join(re.sub(r"\s*//.*", "", line) for line in lines)


@pytest.mark.parametrize("hidden_size", [64, 512, 650])
@pytest.mark.parametrize("which", PASSES)
def test_variants_that_are_off_leave_nothing_in_the_binary(
    which: str, hidden_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels with every line of the variants taken out compile to the same code."""
    config = plan(Problem(which, hidden_size, 16, 1, "bfloat16", "tf32"), KNOWN["sm_90"]).config
    options = dict(lengths=True, reset=True)
    ours = code(compiler.compile_pass(which, config, "sm_90", hidden_size, torch.bfloat16, **options))
    changes = []
    for name, least in (("cell", 10), ("masks", 3)):
        pruned, removed = prune(tmp_path, name, OFF)
        assert removed >= least
        changes.append((f"from .{name} import", f"from .{pruned.__name__.rpartition('.')[2]} import"))
    bare, removed = prune(tmp_path, which, OFF, *changes)
    assert removed >= 10
    text = Path(bare.__file__).read_text()
    assert "norm_gates" not in text.partition("@triton.jit")[2]
    assert "kept_by_zoneout(" not in Path(sys.modules[pruned.__name__].__file__).read_text().partition("def draw(")[2]
    launcher = f"lstm_{which}"
    monkeypatch.setattr(compiler, launcher, getattr(bare, launcher))
    assert code(compiler.compile_pass(which, config, "sm_90", hidden_size, torch.bfloat16, **options)) == ours
    # The test can fail: a variant that is on does change it.
    on = code(compiler.compile_pass(which, config, "sm_90", hidden_size, torch.bfloat16, cell=Cell(cell_clip=1.0)))
    assert on != ours


NORMED = {"layer_norm": {}, "everything": dict(peephole=True, cell=Cell(True, *(chance(0.1),) * 5, 3.0, 10.0))}
PLACED = {
    "local": Config("local", "none", True, False, 1, 16, 32, 32, 4),
    "mailbox": Config("grid", "mailbox", True, True, 1, 16, 16, 32, 4),
    "flags": Config("grid", "flags", True, False, 4, 16, 16, 64, 4),
}


def sums_of_plain_products(ttir: str) -> tuple[int, list[str]]:
    """How many sums over an axis there are, and those whose addends are products that may be fused with the sum."""
    made = {m[1]: (m[2], m[3]) for m in re.finditer(r'(%[\w#]+)(?::\d+)? = "?([\w.]+)"?(.*)', ttir)}
    sums = re.findall(r'"tt.reduce"\((%\w+)\)(?:(?!tt.reduce.return)[\s\S])*?arith.addf', ttir)
    through = {"arith.select": 1, "tt.reshape": 0, "tt.expand_dims": 0, "tt.broadcast": 0}  # which operand
    wrong = []
    for addend in sums:
        op, operands = made.get(addend, ("", ""))
        while op in through:
            op, operands = made.get(re.findall(r"%[\w#]+", operands)[through[op]], ("", ""))
        if op == "arith.mulf":
            wrong.append(addend)
    return len(sums), wrong


def fused_into_shuffled_sums(ptx: str) -> tuple[int, list[str]]:
    """How many sums of two lanes there are, and those that are fused with a product, or that ptxas could fuse."""
    written: dict[str, str] = {}
    shuffled: set[str] = set()
    found, wrong = 0, []
    for op, operands in re.findall(r"^\s*(?:@%p\d+ )?([a-z][\w.]*)\s+(.*?);", ptx, re.MULTILINE):
        to, *sources = re.split(r"[,|]\s*", operands)
        written[to] = op
        if op.startswith("shfl.sync.bfly") or (op == "mov.b32" and sources[0] in shuffled):
            shuffled.add(to)
        elif shuffled & set(sources) and op.startswith(("add.f32", "fma")):
            found += 1
            if op != "add.f32" or any(written.get(source) == "mul.f32" for source in sources):
                wrong.append(f"{op} {operands}")
    return found, wrong


@pytest.mark.parametrize(
    ("arch", "placed", "variant"),
    [
        ("sm_80", "local", "layer_norm"),
        ("sm_80", "mailbox", "everything"),
        ("sm_90", "local", "everything"),
        ("sm_90", "mailbox", "layer_norm"),
        ("sm_90", "flags", "layer_norm"),
    ],
)
@pytest.mark.parametrize("which", PASSES)
def test_sums_of_layer_normalisation_are_the_same_in_every_lane(which, variant, placed, arch) -> None:
    """What two lanes add to each other has been rounded in both."""
    config = backward_of(PLACED[placed]) if which == "backward" else PLACED[placed]
    binary = compiler.compile_pass(which, config, arch, 32, torch.float32, norm=True, **NORMED[variant])
    for found, wrong in (sums_of_plain_products(binary.asm["ttir"]), fused_into_shuffled_sums(binary.asm["ptx"])):
        assert found > 1
        assert not wrong


@pytest.mark.parametrize("which", PASSES)
def test_a_plain_product_would_be_noticed(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = "if has_ptx() and a.dtype == tl.float32:\n        # What has"
    cell = plant(tmp_path, "cell", (condition, condition.replace("if has_ptx()", "if False")))
    change = ("from .cell import", f"from .{cell.__name__.rpartition('.')[2]} import")
    norm = plant(tmp_path, "norm", change)
    module = plant(tmp_path, which, change, ("from .norm import", f"from .{norm.__name__.rpartition('.')[2]} import"))
    monkeypatch.setattr(compiler, f"lstm_{which}", getattr(module, f"lstm_{which}"))
    config = backward_of(PLACED["local"]) if which == "backward" else PLACED["local"]
    binary = compiler.compile_pass(which, config, "sm_80", 32, torch.float32, norm=True)
    assert sums_of_plain_products(binary.asm["ttir"])[1]
    if which == "forward":  # backward a mask stands between the product and its sum, which keeps them apart
        assert fused_into_shuffled_sums(binary.asm["ptx"])[1]


def test_default_plans_of_variants_do_not_spill_and_fit(tmp_path: Path) -> None:
    """A quarter of the most expensive ones, on every target; `perf/compile_report.py --variant every` has the rest."""
    path = tmp_path / "rows.json"
    command = [sys.executable, REPORT, "--json", path, "--variant", "layer_norm", "everything", "--dtype", "bfloat16"]
    command += ["--hidden-size", "64", "512", "--batch", "16", "--one-in", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(path.read_text())
    assert {row["device"]["arch"] for row in rows} == set(KNOWN)
    assert all(sum(row["report"]["loop"]["own"].values()) > 100 for row in rows)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_small_kernels_compile(arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of whole sequences, and the activation of recomputed gates."""
    cell, meta = (
        Cell(True, chance(0.1), chance(0.1), chance(0.1), chance(0.1), chance(0.1), 1.0, 1.0),
        {"device": "meta"},
    )
    seed, gates = torch.empty(2, dtype=torch.int64, **meta), torch.empty((6, 2, 80), dtype=dtype, **meta)
    variants = Variants(cell, torch.empty((2, 3, 20), dtype=dtype, **meta), seed=seed)
    compiled = []

    class Warm:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *a, **k: compiled.append(self.kernel.run(*a, grid=grid, warmup=True, **k))

    monkeypatch.setattr(activate, "activate_kernel", Warm(activate.activate_kernel))
    monkeypatch.setattr(masks, "sequence_mask_kernel", Warm(masks.sequence_mask_kernel))
    with compiler.compiling_for(arch):
        masks.sequence_mask(seed, 3, 20, 1, chance(0.3), dtype, "both")
        activate.activate(gates, torch.empty((6, 2, 20), dtype=dtype, **meta), Layout(3, 2, False), "both", variants)
    assert len(compiled) == 2
    assert all(compiler.report_of(binary).spills == 0 for binary in compiled)


@pytest.mark.parametrize("which", PASSES)
def test_new_probabilities_compile_nothing(which: str) -> None:
    config = plan(Problem(which, 64, 16, 1, "bfloat16", "tf32"), KNOWN["sm_90"]).config
    kernel = {"forward": forward.lstm_forward_kernel, "backward": backward.lstm_backward_kernel}[which]
    first, second = (Cell(sampled=True, zoneout_h=chance(p), recurrent_dropout=chance(p / 2)) for p in (0.5, 0.1))
    one = compiler.compile_pass(which, config, "sm_90", 64, torch.bfloat16, cell=first)
    before = sum(len(cache[0]) for cache in kernel.device_caches.values())
    assert compiler.compile_pass(which, config, "sm_90", 64, torch.bfloat16, cell=second) is one
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == before
