"""What the machine reports, on kernels of a few lines of PTX."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from . import faults
from .driver import _extent
from .memory import Span
from .scheduler import Adversary, Launch
from .translate import code_of

pytestmark = pytest.mark.machine

PTX = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 a, .param .u64 .ptr .global .align 1 b, .param .u32 n)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<16>;
    ld.param.b64 %rd1, [a];
    ld.param.b64 %rd2, [b];
    ld.param.b32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;  // a[thread]
    add.s64 %rd5, %rd2, %rd3;  // b[thread]
    shl.b32 %r4, %r2, 2;
    mov.b32 %r5, global_smem;
    add.s32 %r6, %r5, %r4;  // a word of shared memory for each thread
    {body}
    ret;
}}
"""


def run(
    body: str, threads: int = 32, programs: int = 1, together: bool = True, seed: int = 0, n: int = 0, shared: int = 1024,
    a: torch.Tensor | None = None, rounding: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Run a body on int32 [threads] tensors a (0, 1, ..) and b (zeros) -> b."""
    a = torch.arange(threads, dtype=torch.int32) if a is None else a
    b = torch.zeros(threads, dtype=torch.int32)
    spans = [Span(name, tensor.data_ptr(), _extent(tensor)) for name, tensor in (("a", a), ("b", b))]
    parameters = [np.full(32, tensor.data_ptr(), np.uint64) for tensor in (a, b)] + [np.full(32, n, np.uint32)]
    code = code_of(PTX.format(threads=threads, body=body))
    Launch(code, (programs, 1, 1), threads, shared, parameters, spans, together, Adversary(seed, rounding)).run()
    return b


COPY = "ld.global.b32 %r7, [%rd4]; st.global.b32 [%rd5], %r7;"


def test_a_kernel_runs() -> None:
    assert torch.equal(run(COPY), torch.arange(32, dtype=torch.int32))


@pytest.mark.parametrize("seed", range(8))
def test_branches_that_lanes_take_apart(seed: int) -> None:
    """if thread < n: b = a + 100 else: b = a - 100; and a loop that lanes leave one by one."""
    body = """
    ld.global.b32 %r7, [%rd4];
    setp.lt.u32 %p1, %r2, %r1;
    @%p1 bra LESS;
    sub.s32 %r8, %r7, 100;
    bra.uni MEET;
LESS:
    add.s32 %r8, %r7, 100;
MEET:
    mov.b32 %r9, 0;
LOOP:
    add.s32 %r8, %r8, 1000;
    add.s32 %r9, %r9, 1;
    setp.lt.u32 %p2, %r9, %r2;
    @%p2 bra LOOP;
    st.global.b32 [%rd5], %r8;
    """
    lane = torch.arange(32)
    want = torch.where(lane < 5, lane + 100, lane - 100) + 1000 * lane.clamp(min=1)
    assert torch.equal(run(body, n=5, seed=seed), want.int())


@pytest.mark.parametrize("seed", range(8))
def test_a_barrier_orders_shared_memory(seed: int) -> None:
    """Every thread reads the word of its neighbour in the next warp."""
    body = """
    st.shared.b32 [%r6], %r2;
    {barrier}
    add.s32 %r7, %r4, 128;
    and.b32 %r7, %r7, 511;
    add.s32 %r7, %r5, %r7;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
    """
    found = run(body.format(barrier="bar.sync 0;"), threads=128, seed=seed)
    assert torch.equal(found, (torch.arange(128, dtype=torch.int32) + 32) % 128)
    with pytest.raises(faults.Race, match=r"kernel, program \(0, 0, 0\), warp \d, (ld|st).shared"):
        run(body.format(barrier=""), threads=128, seed=seed)


def test_warps_may_store_the_same_value_to_the_same_place() -> None:
    body = "st.shared.b32 [%r5], {value}; ld.shared.b32 %r8, [%r5]; st.global.b32 [%rd5], %r8;"
    assert torch.equal(run(body.format(value="%r1"), threads=64, n=7), torch.full((64,), 7, dtype=torch.int32))
    with pytest.raises(faults.Race):
        run("shr.u32 %r9, %r2, 5;" + body.format(value="%r9"), threads=64)


FAULTS: dict[str, tuple[str, type, str]] = {
    "beyond a tensor": ("ld.global.b32 %r7, [%rd4+4];", faults.OutOfBounds, r"4 bytes at a \+ 128 bytes, which has 128"),
    "before a tensor": ("st.global.b32 [%rd5+-4], %r2;", faults.OutOfBounds, "4 bytes at"),
    "no address": ("mov.b64 %rd6, 0; ld.global.b32 %r7, [%rd6];", faults.OutOfBounds, "before every tensor"),
    "unaligned": ("ld.global.v2.b32 {%r7, %r8}, [%rd1+4];", faults.Misaligned, "8 bytes at a"),
    "shared, beyond": ("ld.shared.b32 %r7, [%r6+1024];", faults.OutOfBounds, "shared byte 1024 of 1024"),
    "shared, before": ("st.shared.b32 [%r6+-4], %r2;", faults.OutOfBounds, "shared byte -4 of 1024"),
    "shared, unaligned": ("st.shared.b32 [%r6+2], %r2;", faults.Misaligned, "4 bytes at shared byte"),
    "ldmatrix, beyond": (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r5+1024];", faults.OutOfBounds, "16 bytes",
    ),
    "ldmatrix, unaligned": ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r6];", faults.Misaligned, "16 bytes"),
    "cp.async, beyond": ("cp.async.cg.shared.global [%r5+1016], [%rd1], 0x10, 0x10;", faults.Misaligned, "16 bytes"),
    "cp.async, of too much": (
        "cp.async.ca.shared.global [%r6], [%rd4+64], 0x4, 0x4; cp.async.wait_all;", faults.OutOfBounds, "4 bytes at a",
    ),
    "a part of a warp at a barrier": (
        "setp.lt.u32 %p1, %r2, 3; @!%p1 bra END; bar.sync 0; END:", faults.Divergence, "a part of the warp",
    ),
    "a part of a warp shuffles": (
        "setp.lt.u32 %p1, %r2, 3; @!%p1 bra END; shfl.sync.bfly.b32 %r7, %r2, 1, 31, -1; END:", faults.Divergence, "needs all lanes",
    ),
    "trap": ("trap;", faults.Fault, "trap"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str) -> None:
    body, kind, words = FAULTS[fault]
    with pytest.raises(kind, match=words):
        run(body)


@pytest.mark.parametrize(
    "unknown",
    ["frobnicate.b32 %r7, %r2;", "add.sat.s32 %r7, %r2, %r2;", "cvt.rz.f16.f32 %rs1, %r2;", "ld.global.acquire.gpu.b32 %r7, [%rd4];",
     "bar.sync 1, 64;", "membar.gl;", "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r7}, {%r8}, {%r9}, {%r7};",
     "mbarrier.init.shared::cta.b64 [%r5], 1;", "red.global.add.u32 [%rd4], %r2;", "tcgen05.mma %r7;", "ex2.approx.f16 %rs1, %rs2;"],
)  # fmt: skip
def test_an_unknown_instruction_is_named(unknown: str) -> None:
    with pytest.raises(faults.MachineError, match=re.escape(unknown.split()[0].rstrip(";"))):
        run(unknown)


@pytest.mark.parametrize(
    "text", ["", "nonsense", PTX.format(threads=32, body="@ %% ;"), PTX.format(threads=32, body=".alias x;")]
)
def test_text_that_is_no_ptx(text: str) -> None:
    with pytest.raises(faults.MachineError):
        code_of(text)


def poll(order: str) -> str:
    """Program 1 waits for a[0] == 7 by a strong load, then reads b[32 + thread] by a weak one."""
    return f"""
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra PRODUCE;
WAIT:
    ld.volatile.global.b32 %r7, [%rd1];
    setp.ne.s32 %p2, %r7, 7;
    @%p2 bra WAIT;
    {order}
    ld.global.b32 %r9, [%rd4+128];
    st.global.b32 [%rd5], %r9;
    bra.uni END;
PRODUCE:
    st.global.b32 [%rd4+128], %r2;
    {{release}}
END:
    """


RELEASE = "setp.eq.s32 %p3, %r2, 0; @%p3 atom.global.gpu.{order}.exch.b32 %r8, [%rd1], 7;"
ACQUIRE = "mov.b32 %r10, 0; @!%p2 atom.global.gpu.{order}.add.u32 %r8, [%rd1], 0;"


@pytest.mark.parametrize(
    ("release", "acquire", "right"),
    [
        ("release", "acquire", True),
        ("relaxed", "acquire", False),
        ("release", "relaxed", False),
        ("release", "", False),
    ],
)
def test_release_and_acquire_order_what_a_flag_guards(release: str, acquire: str, right: bool) -> None:
    """All four are needed: without one some schedule reads what was there before, or poison."""
    outcomes = []
    for seed in range(12):
        a = torch.zeros(64, dtype=torch.int32)
        body = poll(ACQUIRE.format(order=acquire) if acquire else "").format(release=RELEASE.format(order=release))
        outcomes.append(torch.equal(run(body, programs=2, seed=seed, a=a), torch.arange(32, dtype=torch.int32)))
    assert all(outcomes) if right else not all(outcomes)


def test_a_store_arrives_late_and_in_any_order() -> None:
    """Two relaxed stores to different words: another program may see the second without the first. Plain ones race."""
    body = """
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra PRODUCE;
WAIT:
    ld.volatile.global.b32 %r7, [%rd1];
    setp.ne.s32 %p2, %r7, 7;
    @%p2 bra WAIT;
    ld.volatile.global.b32 %r9, [%rd1+64];
    st.global.b32 [%rd5], %r9;
    bra.uni END;
PRODUCE:
    setp.eq.s32 %p3, %r2, 0;
    mov.b32 %r10, 7;
    @%p3 st.relaxed.gpu.global.b32 [%rd1+64], %r10;
    @%p3 st.relaxed.gpu.global.b32 [%rd1], %r10;
END:
    """
    seen = {int(run(body, programs=2, seed=seed, a=torch.zeros(32, dtype=torch.int32))[0]) for seed in range(40)}
    assert seen == {0, 7}
    with pytest.raises(faults.Race, match="polls what another program stores by a plain store"):
        run(body.replace(".relaxed.gpu", ""), programs=2, seed=0, a=torch.zeros(32, dtype=torch.int32))


def test_everybody_waits() -> None:
    body = """
WAIT:
    ld.volatile.global.b32 %r7, [%rd1+4];
    setp.ne.s32 %p2, %r7, 7;
    @%p2 bra WAIT;
    """
    with pytest.raises(faults.Deadlock) as error:
        run(body, threads=64, programs=2)
    text = str(error.value)
    assert "nobody can go on" in text
    for program in ("(0, 0, 0)", "(1, 0, 0)"):
        assert f"program {program}, warps [0, 1]: waits at ld.volatile.global.b32 (?) for a + 4 bytes" in text


def test_a_barrier_that_not_all_warps_reach() -> None:
    """A warp that ends is not waited for (9.7.13.1), but one that waits for others is."""
    body = """
    setp.lt.u32 %p1, %r2, 32;
    @!%p1 bra END;
WAIT:
    ld.volatile.global.b32 %r7, [%rd1];
    setp.ne.s32 %p2, %r7, 7;
    @%p2 bra WAIT;
END:
    bar.sync 0;
    """
    with pytest.raises(faults.Deadlock, match=r"warps \[1\]: waits at bar.sync"):
        run(body, threads=64)


def test_programs_that_wait_in_a_launch_that_is_not_cooperative() -> None:
    body = poll("").format(release=RELEASE.format(order="release"))
    ends = []
    for seed in range(8):  # whether the one that waits comes first is drawn
        try:
            run(body, programs=2, together=False, seed=seed, a=torch.zeros(64, dtype=torch.int32))
        except faults.Deadlock as error:
            ends.append(str(error))
    assert ends
    assert all("not cooperative" in end for end in ends)


def test_programs_that_store_different_values_to_one_place() -> None:
    with pytest.raises(faults.Race, match=r"another program stores another value at b \+ 0 bytes"):
        run("st.global.b32 [%rd5], %r3;", programs=2)


def test_what_is_not_written_is_poison() -> None:
    found = {int(run("st.global.b32 [%rd5], %r40;", seed=seed)[0]) for seed in range(10)}
    assert found <= {-1, 0x7FFF7FFF}
    assert len(found) == 2
    assert int(run("ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd5], %r7;")[0]) != 0


def test_lanes_that_store_to_one_address() -> None:
    """Any lane may win."""
    body = "st.global.b32 [%rd2], %r2; st.shared.b32 [%r5], %r2; ld.shared.b32 %r7, [%r5]; st.global.b32 [%rd2+4], %r7;"
    found = [run(body, seed=seed) for seed in range(10)]
    assert {int(b[0]) for b in found} == {0, 31}
    assert {int(b[1]) for b in found} == {0, 31}


def test_copies_land_as_late_as_their_wait() -> None:
    body = """
    cp.async.ca.shared.global [%r6], [%rd4], 4, {size};
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd5], %r7;
    """
    want = torch.arange(32, dtype=torch.int32)
    for seed in range(6):
        assert torch.equal(run(body.format(wait="cp.async.wait_group 0;", size=4), seed=seed), want)
        assert int(run(body.format(wait="cp.async.wait_group 0;", size=0), seed=seed).abs().sum()) == 0
    assert not all(torch.equal(run(body.format(wait="cp.async.wait_group 1;", size=4), seed=s), want) for s in range(6))


def test_approximations_err_by_their_bounds() -> None:
    """ex2.approx: at most 2 units in the last place, not always none, and the same for the same operand."""
    values = torch.linspace(-20, 20, 32)
    body = "ld.global.b32 %r7, [%rd4]; ex2.approx.ftz.f32 %r8, %r7; st.global.b32 [%rd5], %r8;"
    found = [run(body, a=values.view(torch.int32), rounding=seed).view(torch.float32) for seed in range(4)]
    exact = values.double().exp2()
    for result in found:
        units = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
        assert ((result.double() - exact).abs() <= 2 * units).all()
    assert any(not torch.equal(result, exact.float()) for result in found)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], run(body, a=values.view(torch.int32), seed=5).view(torch.float32))


def test_an_interrupt_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the machine takes KeyboardInterrupt for a fault."""

    def interrupted(*_) -> Callable:
        raise KeyboardInterrupt

    from .memory import Memory

    monkeypatch.setattr(Memory, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(COPY)
