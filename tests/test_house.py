"""The folders lie on floors: no import runs up or in a circle, and what is public keeps its path.

CONTRIBUTING.md says what each folder is for.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lstm_triton

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "lstm_triton"
# From the ground up: a folder, or a file that lies flat, imports only what stands before it. "" is the front door,
# what `import lstm_triton` gives.
FLOORS = (
    "_version",
    "kernels",
    "variant",
    "reference",
    "planning",
    "tuning",
    "layer",
    "functional",
    "modules",
    "convert",
    "init",
    "explain",
    "diagnostics",
    "",
    "commands",
    "testing",
    "recipes/shared",
    "recipes",
    "__main__",
)
PUBLIC = {
    "lstm_triton": [
        *("LSTM", "LSTMCell", "__version__", "convert", "decompositions", "diagnostics", "explain", "functional"),
        *("init", "patch", "unpatch"),
    ],
    "lstm_triton.functional": ["States", "lstm"],
    "lstm_triton.diagnostics": ["Finding", "Layer", "Seen", "Thresholds", "kept_bytes", "of_losses", "watch"],
    "lstm_triton.init": ["chrono_", "default_", "xavier_orthogonal_"],
    "lstm_triton.convert": [
        *("from_flashrnn", "from_haste", "from_keras", "from_onnx"),
        *("to_flashrnn", "to_haste", "to_keras", "to_onnx"),
    ],
    "lstm_triton.variant": ["Variant"],
}
FILES = {path.relative_to(HOUSE).with_suffix("").as_posix(): path for path in sorted(HOUSE.rglob("*.py"))}
FILES |= {f"kernels/{path.stem}": path for path in sorted((HOUSE / "kernels").glob("*.py"))}  # which is a link


def file_of(name: str) -> str | None:
    """The file of a dotted name inside the package: "layer.op" -> "layer/op", "layer" -> "layer/__init__"."""
    path = name.replace(".", "/")
    package = f"{path}/__init__" if path else "__init__"
    return path if path in FILES else package if package in FILES else None


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:` is never executed."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {node for test in tests for statement in test.body for node in ast.walk(statement)}


def imports_of(name: str) -> Iterator[tuple[str, int]]:
    """(file, line) of all that a file imports from the package, inside functions too."""
    tree = ast.parse(FILES[name].read_text())
    package, skipped = name.split("/")[:-1], for_types_only(tree)
    for node in ast.walk(tree):
        wanted = []
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{FILES[name]}:{node.lineno} leaves the package"
            above = ["lstm_triton", *package][: len(package) + 2 - node.level] if node.level else []
            base = ".".join(filter(None, (*above, node.module)))
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        for full in wanted:
            if full.split(".")[0] == "lstm_triton":
                inner = full.removeprefix("lstm_triton").removeprefix(".")
                found = file_of(inner) or file_of(inner.rpartition(".")[0])
                assert found is not None, f"{FILES[name]}:{node.lineno} imports {full}, which is nowhere"
                yield found, node.lineno


IMPORTS = {name: sorted(set(imports_of(name))) for name in FILES}


def floor_of(name: str) -> str:
    if name == "__init__":
        return ""
    folder, _, _ = name.rpartition("/")
    return folder or name


def test_every_folder_has_its_floor() -> None:
    assert {floor_of(name) for name in FILES} == set(FLOORS)


def test_no_import_runs_up() -> None:
    """Also not out of a file of one folder through another folder and back."""
    wrong = [
        f"lstm_triton/{name}.py:{line} imports {found}: {floor_of(found) or 'lstm_triton'} lies above"
        for name, all_found in IMPORTS.items()
        for found, line in all_found
        if FLOORS.index(floor_of(found)) > FLOORS.index(floor_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def circle_from(name: str, way: tuple[str, ...], settled: set[str]) -> tuple[str, ...]:
    """The first circle of imports that this file leads into; () if there is none."""
    if name in way:
        return (*way[way.index(name) :], name)
    for found, _ in () if name in settled else IMPORTS[name]:
        if circle := circle_from(found, (*way, name), settled):
            return circle
    settled.add(name)
    return ()


def test_no_import_runs_in_a_circle() -> None:
    """Nor between files of one folder, which no floor keeps apart."""
    settled: set[str] = set()
    for name in FILES:
        circle = circle_from(name, (), settled)
        assert not circle, " -> ".join(f"lstm_triton/{file}.py" for file in circle)


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_public_keeps_its_path(module: str) -> None:
    there = importlib.import_module(module)
    assert sorted(PUBLIC[module]) == sorted(getattr(there, "__all__", PUBLIC[module]))
    for name in PUBLIC[module]:
        assert hasattr(there, name), f"{module}.{name}"


def test_what_lies_flat_is_public() -> None:
    flat = {path.stem for path in HOUSE.glob("*.py")} - {"__init__", "__main__", "_version"}
    assert flat <= {name.removeprefix("lstm_triton.") for name in PUBLIC} | set(PUBLIC["lstm_triton"])


def text_of(page: Path) -> str:
    """Of a notebook what its cells say, without what they printed."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


PAGES = [path for pattern in ("*.md", "lstm_triton/*.md", "perf/*.md", "notebooks/*") for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_pages_name_is_there(page: Path) -> None:
    """Every lstm_triton.NAME, every import of one, and every file of the repository."""
    text = text_of(page)
    dotted = set(re.findall(r"\blstm_triton(?:\.[A-Za-z_]\w*)+", text))
    for module, names in re.findall(r"\bfrom (lstm_triton[\w.]*) import ([\w, ]+)", text):
        dotted |= {f"{module}.{name.strip()}" for name in names.split(",")}
    for full in dotted:
        there = lstm_triton
        for at, name in enumerate(full.split(".")[1:], 2):
            path = ".".join(full.split(".")[:at])
            if not hasattr(there, name):
                assert file_of(path.removeprefix("lstm_triton.")), f"there is no {path}"
                importlib.import_module(path)
            there = getattr(there, name)
    for path in set(re.findall(r"(?<![\w/.-])(?:lstm_triton|kernels|tests|perf|notebooks)/[\w/.]*\w", text)):
        assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*")), f"there is no {path}"
