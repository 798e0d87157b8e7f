"""No test depends on how fast the machine is: tests have no clock of their own, and no limit in seconds."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import hypothesis
import pytest
from processes import side_by_side

WAITING = ("communicate", "join", "poll", "result", "wait", "wait_for")  # methods that take seconds
EXCEPTIONS = {
    # On a GPU a wrong schedule never ends, and nothing else can stop it.
    "test_gpu.py test_launches_that_fill_the_device_do_not_starve_each_other: timeout=90",
}


def seconds_in(node: ast.AST, where: str) -> set[str]:
    """Clocks, and limits in seconds, each with the function that it stands in."""
    wrong = False
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
        wrong = bool(names & {"time", "timeit", "signal"})
    elif isinstance(node, ast.keyword) and (node.arg or "").endswith(("timeout", "seconds")):
        wrong = ast.unparse(node.value) not in ("None", "FOREVER", "forever")
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
        wrong = bool(node.args) and isinstance(node.args[-1], ast.Constant) and not isinstance(node.args[-1].value, str)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("settings"):
        wrong = any(one.arg == "deadline" and ast.unparse(one.value) != "None" for one in node.keywords)
    elif isinstance(node, ast.FunctionDef):
        where = f"{where.split()[0]} {node.name}"
    found = {f"{where}: {ast.unparse(node)}"} if wrong else set()
    return found.union(*(seconds_in(child, where) for child in ast.iter_child_nodes(node)))


def test_tests_have_no_limits_in_seconds() -> None:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert len(files) > 60
    assert set().union(*(seconds_in(ast.parse(path.read_text()), path.name) for path in files)) == EXCEPTIONS


@pytest.mark.parametrize(
    "line",
    ["import time", "from time import sleep", "f(x, timeout=3)", "f(startup_timeout=limit)", "timedelta(seconds=9)",
     "process.join(120)", "asyncio.wait_for(answer, 4)", "settings(deadline=200)"],
)  # fmt: skip
def test_what_is_seen(line: str) -> None:
    (found,) = seconds_in(ast.parse(f"def test() -> None:\n    {line}"), "x.py")
    assert found.startswith("x.py test: ")


def test_hypothesis_has_no_clock_either() -> None:
    assert hypothesis.settings.default.deadline is None
    assert hypothesis.HealthCheck.too_slow in hypothesis.settings.default.suppress_health_check


def test_a_process_that_fails_ends_those_that_wait_for_it() -> None:
    fails, waits = "print('a'); raise SystemExit('no luck')", "import threading; threading.Event().wait()"
    with pytest.raises(AssertionError, match="no luck"):
        side_by_side([[sys.executable, "-c", code] for code in (waits, fails, waits)])
    assert side_by_side([[sys.executable, "-c", "print('a')"]] * 2) == ["a\n", "a\n"]
