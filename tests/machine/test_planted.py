"""Bugs planted in compiled text: the machine must see each. (Those planted in the source are in kernels/test_exchange.py.)

A bug is seen where a run ends in a fault, or where its bits are not those of the kernel as it was compiled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import triton
from engines import adversaries
from layers import Case, run_recurrence

import lstm_triton.kernels
from lstm_triton.kernels.config import Config

from .driver import Machine, running
from .faults import Fault
from .ptx import parse

SEEDS = range(12)
FORWARD, BACKWARD = "lstm_forward_kernel", "lstm_backward_kernel"
CONFIGS = {
    "local": Config("local", "none", True, True, 1, 8, 32, 32, 4),
    "wgmma": Config("grid", "mailbox", True, True, 1, 16, 16, 64, 4),
    "mailbox": Config("grid", "mailbox", True, False, 4, 16, 16, 64, 4),
    "flags": Config("grid", "flags", True, False, 4, 16, 16, 64, 4),
    "streamed": Config("stepwise", "none", False, False, 1, 16, 16, 16, 4, num_stages=2),
}
CASE = Case(seq_len=3, batch=9, hidden_size=32, dtype=torch.float16, reset=True)  # rows in three of four warps
CASES = {CONFIGS["streamed"]: replace(CASE, hidden_size=64)}  # four chunks


def results(target: str, config: Config, seed: int, edit: Callable[[str], str] = str) -> list[bytes]:
    """The bits of both passes."""
    with running(Machine(target, adversaries(seed), edit=edit)):
        found = run_recurrence(CASES.get(config, CASE), config)
    return [tensor.numpy().tobytes() for tensor in found]


@lru_cache
def right(target: str, config: Config) -> list[bytes]:
    return results(target, config, 0)


def is_caught(target: str, config: Config, edit: Callable[[str], str], seeds: range = SEEDS) -> bool:
    for seed in seeds:
        try:
            if results(target, config, seed, edit) != right(target, config):
                return True
        except Fault:
            return True
    return False


def changed(kernel: str, pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    """An edit of one kernel's text, or of both; it must find something."""

    def edit(ptx: str) -> str:
        if f".entry {kernel}" not in ptx:
            return ptx
        text, found = re.subn(pattern, replacement, ptx, count=count)
        assert found, f"{kernel} has no {pattern}"
        return text

    return edit


SHIFTED = r"\n\tadd.s64 \2, \2, {by};\n\1"
B_OF_WGMMA = r"(\twgmma\.mma_async[^;]*?\}, %rd\d+, (%rd\d+),)"
A_OF_WGMMA = r"(\twgmma\.mma_async[^;]*?\}, (%rd\d+), %rd\d+,)"
BUGS: dict[str, tuple[str, str, Callable[[str], str]]] = {  # target, config, change
    "release made relaxed, forward": ("sm_80", "flags", changed(FORWARD, r"\.release\.", ".relaxed.")),
    "release made relaxed, backward": ("sm_90", "flags", changed(BACKWARD, r"\.release\.", ".relaxed.")),
    "acquire made relaxed, forward": ("sm_120", "flags", changed(FORWARD, r"\.acquire\.", ".relaxed.")),
    "acquire made relaxed, backward": ("sm_80", "flags", changed(BACKWARD, r"\.acquire\.", ".relaxed.")),
    "volatile dropped, forward": ("sm_90", "mailbox", changed(FORWARD, r"ld\.volatile\.global", "ld.global")),
    "volatile dropped, backward": ("sm_120", "mailbox", changed(BACKWARD, r"ld\.volatile\.global", "ld.global")),
    "a descriptor of the weights shifted": ("sm_90", "wgmma", changed(FORWARD, A_OF_WGMMA, SHIFTED.format(by=2), 1)),
    "a descriptor of the tile shifted": ("sm_90", "wgmma", changed(FORWARD, B_OF_WGMMA, SHIFTED.format(by=1))),
    "a descriptor beyond shared memory": ("sm_90", "wgmma", changed(FORWARD, B_OF_WGMMA, SHIFTED.format(by=8192), 1)),
    "no fence before wgmma": ("sm_90", "wgmma", changed(FORWARD, r"fence\.proxy\.async[^;]*;", "")),
    "wgmma not waited for": ("sm_90", "wgmma", changed(FORWARD, r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1")),
    "copies not waited for": ("sm_80", "streamed", changed(FORWARD, r"cp\.async\.wait_group\s+\w+", "cp.async.wait_group 9")),
    "a row of shared memory too far": ("sm_80", "local", changed(FORWARD, r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]", 1)),
    "a store one element too far": ("sm_120", "local", changed(FORWARD, r"(st\.global\.\S+ \[ %rd\d+) \+ 0", r"\1 + 2", 1)),
    "a load some elements too far": ("sm_90", "local", changed(BACKWARD, r"(ld\.global\.b32 [^\[]*\[ %rd\d+) \+ 0", r"\1 + 64", 1)),
    "a multiply-add without its sum": ("sm_90", "local", changed(BACKWARD, r"fma\.rn\.f32 (\s*%r\d+, %r\d+, %r\d+), %r\d+", r"fma.rn.f32 \1, 0f00000000", 1)),
}  # fmt: skip


@pytest.mark.machine
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    target, name, edit = BUGS[bug]
    assert is_caught(target, CONFIGS[name], edit)


@pytest.mark.machine
@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_bug_all_bits_are_equal(name: str) -> None:
    for target in ("sm_80", "sm_90", "sm_120"):
        assert not is_caught(target, CONFIGS[name], str, SEEDS[1:4])


# Barriers

# Where none is missed, by function of the source, and why. All others are needed, and must be seen to be.
REDUNDANT = {
    "before the time loop": {
        "sum_slices": "a product whose only purpose is to keep weights in registers: all of it is zeros",
        "sum": "the same",
        "multiply": "the same",
        "split_gates": "the same",
        "load_weights": "nothing has used shared memory before",
    },
    "in the time loop": {
        "least_flag": "every warp has polled the flags itself, and the barrier of the source comes after",
        "await_flags": "the same",
        "collect": "shared memory was last used before the barrier of await_flags",
        "load_at": "the same",
        "min": "every warp puts the same number there",
    },
}


def without_barrier(kernel: str, index: int) -> Callable[[str], str]:
    def edit(ptx: str) -> str:
        if f".entry {kernel}" not in ptx:
            return ptx
        places = list(re.finditer(r"bar\.sync\s+0;", ptx))
        return ptx[: places[index].start()] + ptx[places[index].end() :]

    return edit


def barriers(target: str, config: Config, kernel: str) -> list[tuple[str, str]]:
    """Of every barrier in a kernel whether it is in the time loop (the widest one), and the function it comes from."""
    texts: list[str] = []

    def edit(ptx: str) -> str:
        if f".entry {kernel}" in ptx:
            texts.append(ptx)
        return ptx

    results(target, config, 0, edit)
    program = parse(texts[0])
    jumps = [(at, one.operands[0]) for at, one in enumerate(program.instructions) if one.parts[0] == "bra"]
    begin, end = max(((program.labels[to.name], at) for at, to in jumps), key=lambda loop: loop[1] - loop[0])
    return [
        ("in the time loop" if begin <= at <= end else "before the time loop", function_at(one.line))
        for at, one in enumerate(program.instructions)
        if one.opcode == "bar.sync"
    ]


def function_at(line: str) -> str:
    """The function of a line such as "exchange.py:51", in our kernels or in Triton's language."""
    name, _, number = line.partition(":")
    for folder in (Path(lstm_triton.kernels.__path__[0]), Path(triton.language.__file__).parent):
        if (path := folder / name).exists():
            functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
            around = [f for f in functions if f.lineno <= int(number) <= (f.end_lineno or 0)]
            return max(around, key=lambda f: f.lineno).name
    return line


@pytest.mark.machine
@pytest.mark.parametrize(
    ("target", "name", "kernel"),
    [
        ("sm_80", "local", FORWARD),
        ("sm_80", "local", BACKWARD),
        ("sm_90", "wgmma", FORWARD),
        ("sm_90", "flags", FORWARD),
        ("sm_120", "mailbox", BACKWARD),
    ],
)
def test_every_barrier_is_needed_or_known_not_to_be(target: str, name: str, kernel: str) -> None:
    found = barriers(target, CONFIGS[name], kernel)
    assert len(found) > 4
    missed = [
        (where, function)
        for index, (where, function) in enumerate(found)
        if not is_caught(target, CONFIGS[name], without_barrier(kernel, index), SEEDS[:6])
    ]
    assert [one for one in missed if one[1] not in REDUNDANT[one[0]]] == []
    assert len(missed) < len(found) / 2
