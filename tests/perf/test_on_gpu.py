"""The stages for a GPU: wrong arguments, what is missing, limits, selections, and a rehearsal on this machine's CPU with
nothing installed but PyTorch, Triton and pytest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import ready
from rows import read_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "perf/on_gpu.sh"


@pytest.mark.parametrize(
    "arguments",
    [[], ["tests"], ["nonsense", "out"], ["open", "out", "soon"], ["tests", "out", "0"], ["a", "b", "c", "d"]],
)
def test_the_stages_refuse_wrong_arguments(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert ("no stage nonsense" in done.stderr) == ("nonsense" in arguments)
    assert not any(tmp_path.iterdir())


STAGES = ["doctor", "first", "tests", "drop-in", "variants", "steps", "rules", "small", "home", "open", "users", "scaling", "tune",
          "peers", "soak", "sanitizer", "ahead"]  # fmt: skip
LONGEST = {"doctor": 60, "first": 900}  # seconds; of the others 8 minutes
# A Python that only notes its arguments, but for what the script itself has it do.
NOTING = """#!/bin/sh
case "$1" in -) exec {python} "$@";; -c) exec {python} "$@";; */ready.py) exit 0;; esac
{note}
"""


def commands_of(stage: str, folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """A stage whose commands all fail with status 7: [the limit that each was called in, its arguments ...]."""
    noted = folder / "noted"
    noted.write_text("")
    note = f'printf "%s\\t" "${{LIMIT:-none}}" "$@" >> {noted}; echo >> {noted}; exit 7'
    for name, text in {
        "timeout": '#!/bin/sh\nLIMIT=$5; export LIMIT; shift 5; exec "$@"\n',
        "python": NOTING.format(python=sys.executable, note=note),
        "compute-sanitizer": f"#!/bin/sh\n{note}\n",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        **variables,
    }
    environment.pop("LIMIT", None)
    done = subprocess.run(["bash", SCRIPT, stage, folder / "out"], env=environment, capture_output=True, text=True)
    return done, [line.rstrip("\t").split("\t") for line in noted.read_text().splitlines()]


@pytest.mark.parametrize("off", [{}, {"LSTM_TRITON_LIMITS": "off"}, {"LSTM_TRITON_REHEARSAL": "1"}], ids=str)
def test_every_command_has_a_limit_unless_they_are_off(off: dict[str, str], tmp_path: Path) -> None:
    """And every step has its output and its line in the summary, whatever became of it."""
    for stage in STAGES if not off else ["first", "tests"]:
        done, found = commands_of(stage, tmp_path, **off)
        assert done.returncode == 7, stage + done.stderr
        limits = [limit for limit, *_ in found]
        if off or stage == "ahead":
            assert set(limits) == {"none"}
        else:
            assert sum(map(int, limits)) <= LONGEST.get(stage, 480), stage
        lines = [
            line for line in (tmp_path / "out/summary.txt").read_text().splitlines() if line.startswith(f"{stage}: ")
        ]
        assert len(lines) == len(found)
        for line in lines:
            name = re.fullmatch(rf"{stage}: ([\w-]+): FAILED, exit status 7, \d+ s", line)[1]
            assert (tmp_path / "out" / f"{name}.txt").exists()
        (tmp_path / "out/summary.txt").unlink()


COLLECTING = """
import contextlib, io, json, sys
import pytest
for selection in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *selection])
    print(json.dumps([int(code), [line for line in said.getvalue().splitlines() if "::" in line]]))
"""


def test_every_selection_of_tests_selects_some(tmp_path: Path) -> None:
    """Also every part of an expression; and what `first` tells apart is all there is, each once."""
    selections: dict[str, list[list[str]]] = {}
    for stage in ("first", "tests", "drop-in", "variants", "sanitizer"):
        for _, *arguments in commands_of(stage, tmp_path)[1]:
            if "pytest" in arguments:
                given = arguments[arguments.index("pytest") + 1 :]
                files = [argument for argument in given if argument.startswith("tests/")]
                expression = given[given.index("-k") + 1] if "-k" in given else ""
                selections.setdefault(stage, []).append([*files, *(["-k", expression] if expression else [])])
    whole = [one for stage in selections.values() for one in stage]
    assert len(whole) == 4 + 1 + 1 + 1 + 2
    parts = [
        [file, "-k", part]
        for file, *rest in whole
        for part in (rest[1].split(" or ") if rest else [])
        if "(" not in part and ")" not in part
    ]
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING, json.dumps(whole + parts)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(whole + parts)
    for selection, (code, names) in zip(whole + parts, found):
        assert code == 0, selection
        assert names, selection
    of_first = [name for _, names in found[:4] for name in names]
    assert len(of_first) == len(set(of_first))
    assert set(of_first) == set(found[4][1]), "all of the stage `tests`"


# --- what is missing


def fake_torch(cuda: str | None, error: str = "", available: bool = False) -> SimpleNamespace:
    def init() -> None:
        if error:
            raise RuntimeError(error)

    cuda_module = SimpleNamespace(is_available=lambda: available, init=init)
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda, hip=None), cuda=cuda_module)


class FakeTriton:
    """Whose driver says something on stderr, as a compiler would, and then cannot start."""

    __version__ = "3.7.1"

    def __init__(self, error: BaseException | None = None, said: str = "") -> None:
        self.error, self.said = error, said
        self.runtime = SimpleNamespace(driver=self)

    @property
    def active(self) -> SimpleNamespace:
        os.write(2, self.said.encode())
        if self.error is not None:
            raise self.error
        return SimpleNamespace(utils=None)


def complaints(monkeypatch: pytest.MonkeyPatch, gpu: bool = True, **modules) -> list[str]:
    def load(name: str):
        if name not in modules:
            raise ModuleNotFoundError(name)
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    known = SimpleNamespace(find_spec=lambda name: modules.get(name))
    monkeypatch.setattr(ready, "importlib", SimpleNamespace(import_module=load, util=known))
    return list(ready.missing(gpu))


TORCH, TRITON, PYTEST = fake_torch("12.8", available=True), FakeTriton(), SimpleNamespace(__version__="9.1")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, ""),
        ({"torch": fake_torch(None)}, "torch 2.13.0 is built without CUDA: install a build with it"),
        ({"torch": fake_torch("12.8", "No CUDA GPUs are available\nmore")}, "torch 2.13.0 sees no GPU: No CUDA GPUs are available"),
        ({"torch": SimpleNamespace(**vars(TORCH) | {"__version__": "2.5.1+cu121"})}, "torch 2.5.1+cu121 is too old: 2.11 or later is needed"),
        ({"torch": ImportError("libcudnn.so.9: cannot open\nx")}, "torch cannot be imported: libcudnn.so.9: cannot open"),
        ({"triton": FakeTriton(RuntimeError("Failed to find C compiler. Please specify"))}, "there is no C compiler"),
        ({"triton": FakeTriton(subprocess.CalledProcessError(1, ["gcc"]), "fatal error: Python.h: No such file\n")}, "Python.h is missing"),
        ({"triton": FakeTriton(AssertionError("libcuda.so cannot found!\n"))}, "libcuda.so.1 is not found"),
        ({"triton": FakeTriton(RuntimeError("0 active drivers ([])"))}, "Triton's driver cannot start: 0 active drivers"),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line(changed: dict, complaint: str, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    found = complaints(monkeypatch, **({"torch": TORCH, "triton": TRITON, "pytest": PYTEST} | changed))
    assert len(found) == bool(complaint)
    assert all(complaint in line and "\n" not in line for line in found)
    assert capfd.readouterr().err == "", "a compiler's own words are not for the terminal"


def test_everything_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaints(monkeypatch) == [
        f"{name} is not installed: pip install {name}" for name in ("torch", "triton", "pytest")
    ]
    broken = fake_torch(None), FakeTriton(RuntimeError())
    assert complaints(monkeypatch, False, torch=broken[0], triton=broken[1], pytest=PYTEST) == []
    monkeypatch.setattr(ready, "sys", SimpleNamespace(version_info=(3, 9, 2), executable="python"))
    (line,) = complaints(monkeypatch)
    assert line.startswith("Python 3.10 or later is needed, python is 3.9.2")


def test_a_machine_without_a_gpu_is_told_so_and_nothing_runs(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", SCRIPT, "first", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"on_gpu\.sh: torch \S+ (is built without CUDA|sees no GPU)[^\n]*\n", done.stderr)
    assert not any(tmp_path.iterdir())
    done = subprocess.run(command, env=environment | {"PYTHON": "no/python"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "on_gpu.sh: there is no no/python (the variable PYTHON names another)\n"


# --- rehearsals


def needed_by(names: list[str]) -> set[str]:
    """These distributions and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            with suppress(importlib.metadata.PackageNotFoundError):  # of another platform, or an extra
                wanted = importlib.metadata.requires(name) or []
                found.add(name)
                waiting += [re.match(r"[\w.-]+", one)[0] for one in wanted if "extra ==" not in one]
    return found


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python with PyTorch, Triton and pytest, which adds the folder it runs in to its path as 3.10 does."""
    bare = tmp_path / "site"
    bare.mkdir()
    for name in needed_by(["torch", "triton", "pytest"]):
        distribution = importlib.metadata.distribution(name)
        for first in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (bare / first).exists():
                (bare / first).symlink_to(distribution.locate_file(first))
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nunset PYTHONSAFEPATH\nPYTHONPATH="$PYTHONPATH:{bare}" exec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("stage", ["tune", "first"])
def test_a_stage_runs_with_nothing_installed(stage: str, bare_python: Path, tmp_path: Path) -> None:
    """Every part is tried, whatever became of the one before, and its output kept; from another folder."""
    for name in ("hypothesis", "tqdm", "numpy", "matplotlib", "platformdirs", "xdist"):
        assert not (tmp_path / "site" / name).exists()
    text = SCRIPT.read_text()
    for before, after in (
        ("--set first --mode forward train", "--set tiny --mode forward cold"),
        ("--repeat 15", "--repeat 1"),
        ('home=$(cd "$(dirname "$0")/.." && pwd)', f'home="{ROOT}"'),
    ):
        assert before in text
        text = text.replace(before, after)
    script = tmp_path / "on_gpu.sh"
    script.write_text(text)
    variables = {"PYTHON": "./python", "LSTM_TRITON_COMMIT": "abc", "LSTM_TRITON_REHEARSAL": "1"}
    environment = {**os.environ, **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", script, stage, "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not installed, and not needed: pytest-xdist" in done.stdout
    out = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.txt")}
    if stage == "tune":
        assert "tuning measures on a GPU: there is none here" in out["tune"]
        return
    assert "there is no GPU here" in out["compiled-for-doctor"]
    assert "GPU          none" in out["report"]
    for name in ("launches", "steps"):
        assert out[name].endswith("this script measures on a CUDA device, and there is none\n")
    for name in ("tests-fill", "tests-streams-nan", "tests-plans", "tests-others"):
        assert "needs a CUDA device" in out[name]
        assert "error" not in out[name]
    assert "training step" in out["host"]
    statuses = dict(line.split(": ")[1:] for line in out["summary"].splitlines())
    assert list(statuses) == ["compiled-for-doctor", "report", "launches", "tests-fill", "tests-streams-nan",
                              "compiled-for-first", "tests-plans", "tests-others", "steps", "host", "first"]  # fmt: skip
    assert {name for name, status in statuses.items() if "exit status 2" in status} == {
        "compiled-for-doctor", "launches", "compiled-for-first", "steps"}  # fmt: skip
    assert all(status.startswith("ok") for name, status in statuses.items() if "exit status" not in status)
    found = read_rows(tmp_path / "out/first.csv")
    assert not [row.error for row in found if row.error]
    assert {row.mode for row in found} == {"", "forward", "cold"}
    assert {row.commit for row in found} == {"abc"}
