"""Which launches a config becomes: waves of batch tiles, steps, and their order."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from engines import Engine
from layers import Case, run_recurrence

import lstm_triton.kernels
from lstm_triton.kernels import launch
from lstm_triton.kernels.config import Config, Layout
from lstm_triton.kernels.launch import MOST_TILES, compile_options, launches
from lstm_triton.kernels.records import State

GRID = Config("grid", "flags", True, False, 1, 16, 16, 16, 4, max_batch_tiles=2)
STEPWISE = Config("stepwise", "none", True, False, 1, 16, 16, 16, 4)
LOCAL = Config("local", "none", True, False, 1, 16, 16, 16, 4)


def test_waves_cover_the_batch_once() -> None:
    assert list(launches(GRID, Layout(70, 9, False), False)) == [(0, 2, 0, 9), (2, 2, 0, 9), (4, 1, 0, 9)]
    assert list(launches(LOCAL, Layout(70, 9, False), False)) == [(0, 5, 0, 9)]


def test_one_launch_a_step_in_the_order_of_the_pass() -> None:
    layout = Layout(17, 3, False)
    assert list(launches(STEPWISE, layout, False)) == [(0, 2, 0, 1), (0, 2, 1, 2), (0, 2, 2, 3)]
    assert list(launches(STEPWISE, layout, True)) == [(0, 2, 2, 3), (0, 2, 1, 2), (0, 2, 0, 1)]


def test_batches_beyond_the_grid_limit() -> None:
    """A million rows are more batch tiles than one CUDA launch can count."""
    tiles = [count for _, count, _, _ in launches(LOCAL, Layout(16 * MOST_TILES + 1, 1, False), False)]
    assert tiles == [MOST_TILES, 1]


def test_an_empty_batch_launches_nothing() -> None:
    assert not list(launches(GRID, Layout(0, 5, True), True))


def test_only_what_waits_is_cooperative() -> None:
    assert compile_options(GRID, nvidia=True)["launch_cooperative_grid"]
    assert compile_options(replace(GRID, protocol="mailbox"), nvidia=False)["launch_cooperative_grid"]
    assert "launch_cooperative_grid" not in compile_options(LOCAL, nvidia=True)


def test_row_strides() -> None:
    assert (Layout(4, 7, False).stride_t, Layout(4, 7, False).stride_b) == (4, 1)
    assert (Layout(4, 7, True).stride_t, Layout(4, 7, True).stride_b) == (1, 7)


def parts(value: ast.expr | None) -> list[object]:
    """What a returned value is made of: constants by their values, all else by its text."""
    if isinstance(value, ast.Tuple):
        return [part for one in value.elts for part in parts(one)]
    if isinstance(value, ast.IfExp):
        return parts(value.body) + parts(value.orelse)
    if isinstance(value, ast.Call) and ast.unparse(value.func)[0].isupper():  # a record
        return [part for one in (*value.args, *(k.value for k in value.keywords)) for part in parts(one)]
    return [value.value if isinstance(value, ast.Constant) else "" if value is None else ast.unparse(value)]


def test_no_device_function_returns_none() -> None:
    """Nor a record with one inside: Triton 3.6 compiles neither, nor the interpreter an assignment to two names at once."""
    for path in Path(lstm_triton.kernels.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in (f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)):
            for node in ast.walk(function):
                where = f"{path.name}: {function.name}"
                if isinstance(node, ast.Return):
                    assert None not in parts(node.value), where
                assert not isinstance(node, ast.Assign) or len(node.targets) == 1, where


@pytest.mark.machine
def test_a_binary_is_looked_up_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second launch of a kind goes past Triton's search, with the same results; another kind does not."""
    seen: list[str] = []
    search, again = triton.runtime.JITFunction.run, launch.again
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *a, **k: (seen.append("search"), search(*a, **k))[1])
    monkeypatch.setattr(launch, "again", lambda *a: (seen.append("again"), again(*a))[1])
    monkeypatch.setattr(launch, "_binaries", {})
    config = Config("grid", "mailbox", True, False, 1, 16, 16, 32, 4)
    found = []
    with engine():
        for case in (Case(seq_len=2), Case(seq_len=2), Case(seq_len=3, batch=2), Case(seq_len=2, lengths=True)):
            found.append(run_recurrence(replace(case, dtype=torch.float16), config))
    # Forward and backward each; neither a batch nor a length is part of a binary, an optional input is.
    assert seen == [*["search"] * 2, *["again"] * 4, *["search"] * 2]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))


def test_what_binaries_are_told_apart_by() -> None:
    buffer = torch.zeros(64, dtype=torch.float16)
    state = State(buffer, None)
    assert launch._kinds([buffer, None, 3, 0.5, state]) == (torch.float16, None, int, float, torch.float16, None)
    assert launch._kinds([buffer.float(), state]) != launch._kinds([buffer, state])
    assert launch._kinds([buffer[1:]]) is None, "Triton compiles anew for a pointer that is not aligned"
    assert launch._kinds([State(None, buffer[1:])]) is None
    assert launch._kinds([2**31]) is None, "and for a wider integer"
    assert launch._kinds(["text"]) is None, "of what is unknown nothing is known"
