"""Every notebook runs from top to bottom, and is committed with the outputs of a full run."""

from __future__ import annotations

import ast
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from processes import FOREVER
from traitlets.config import Config

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 12


@notebooks
def test_it_runs_at_the_small_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader's notebook does not run in Triton's interpreter unless it says so itself.
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = 'size = "small"'
    where = {"metadata": {"path": str(path.parent)}}
    limits = dict(timeout=None, startup_timeout=FOREVER, iopub_timeout=FOREVER)
    with tempfile.TemporaryDirectory() as folder:
        # By sockets in a folder of its own: a free port may be another kernel's before this one takes it.
        sockets = Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}})
        NotebookClient(notebook, kernel_name="python3", resources=where, config=sockets, **limits).execute()
    assert all(cell.get("execution_count") for cell in code_cells(notebook))


@notebooks
def test_it_is_committed_with_its_outputs(path: Path) -> None:
    """In order, of the full size, without errors, warnings or paths of the machine that they came from."""
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    texts = [output.get("text", "") or str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not [text for text in texts if re.search(r"/(home|tmp|root|work)/", text)]
    if path.stem != "quickstart":
        assert cells[0].source.startswith('size = "full"')
        assert cells[0].metadata["tags"] == ["parameters"]
        assert any("image/png" in output.get("data", {}) for output in outputs)


@notebooks
def test_it_holds_no_logic(path: Path) -> None:
    """No function or class is defined in a notebook: that belongs into a recipe, where it is tested."""
    for cell in code_cells(nbformat.read(path, as_version=4)):
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        nodes = list(ast.walk(ast.parse(source)))
        long = [n for n in nodes if isinstance(n, (ast.For, ast.While, ast.If)) and n.end_lineno - n.lineno > 6]
        assert not long, cell.source
        assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))], cell.source


@notebooks
def test_words_state_no_measured_number(path: Path) -> None:
    """A number that was measured is printed by a cell, not written beside it."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "", cell.source)
            assert not re.search(r"\d+\.\d+|\d+ ?%|\d+ times|\d ?ms\b", text), text


NUMBER = r"-?\d+\.\d+(?:e[-+]?\d+)?"


def test_the_index_says_what_the_notebooks_reached() -> None:
    """Every number with decimals in the last column of the index is printed by that recipe's notebook."""
    table = NOTEBOOKS[0].parent.joinpath("README.md").read_text().partition("## What each reaches")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    checked = 0
    for recipe, _, reached in rows[2:]:
        path = NOTEBOOKS[0].parent / f"{recipe}.ipynb"
        said = {float(number) for number in re.findall(NUMBER, reached)}
        if not path.exists():
            assert not said, f"{recipe} has no notebook to print them"
            continue
        outputs = [output for cell in code_cells(nbformat.read(path, as_version=4)) for output in cell.outputs]
        printed = {float(number) for output in outputs for number in re.findall(NUMBER, output.get("text", ""))}
        assert said <= printed, f"{recipe}: {said - printed}"
        checked += len(said)
    assert checked >= 10


def test_every_symptom_in_the_notebook_is_cured() -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == "debugging")
    cells = code_cells(nbformat.read(path, as_version=4))
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert printed.count("; gone") == 11
    assert "STILL THERE" not in printed
