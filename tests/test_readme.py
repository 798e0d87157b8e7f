"""What the README shows runs, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "README.md").read_text()


def test_the_code_runs() -> None:
    """All Python blocks, one after another, on the CPU."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["states"].c[1].shape == (8, 100, 1024)
    assert names["out"].is_nested
    assert "weight_hh_l0" in names["seen"].report()
    assert names["outs"].shape == (4, 8, 100, 128)
    assert torch.equal(names["h"][~names["active"]], torch.zeros(8, 512)[~names["active"]])


def test_every_proof_is_a_test() -> None:
    links = re.findall(r"\((tests/[\w/]+\.py)(?:#(\w+))?\)", PAGE)
    assert len(links) > 30
    for path, name in links:
        source = (ROOT / path).read_text()
        assert not name or f"def {name}(" in source, f"{path} has no {name}"
        marked = "pytest.mark.gpu" in source
        assert marked == Path(path).name.startswith("test_gpu"), path


def test_every_yes_has_its_proof() -> None:
    table = PAGE[PAGE.index("| | nn.LSTM | FlashRNN") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 20
    for row in table:
        *_, ours, proof = (cell.strip() for cell in row.strip("|").split("|"))
        assert ours.startswith("yes") == ("](tests/" in proof), row
