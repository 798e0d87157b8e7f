"""Tables as text and as files: strict reading, whole writing, and whom a table speaks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lstm_triton.kernels.config import Config
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.problem import Problem, bucket_of, bucket_of_batch, bucket_of_hidden_size
from lstm_triton.planning.store import SHIPPED, file_name, new_table
from lstm_triton.planning.table import (
    SOURCES,
    Bout,
    Contest,
    Entry,
    Table,
    TableError,
    kernels_hash,
    load,
    parse,
    significant_tokens,
)

H100 = KNOWN["sm_90"]
CONFIG = Config("grid", "flags", True, True, 1, 16, 16, 256, 8)
PROBLEM = Problem("forward", 512, 32, 1, "bfloat16", "tf32")
BOUT = Bout(512, True, 32, 1, "bfloat16", "", "standard", "training", False)


def table(**changes) -> Table:
    entry = Entry(CONFIG, {CONFIG.encode(): 1.25, replace(CONFIG, num_warps=4).encode(): "spills 8 bytes"}, True)
    full = replace(new_table(H100, {"date": "2026-01-01"}), entries={bucket_of(PROBLEM): entry})
    return replace(full, contests={BOUT: Contest(2.0, 1.0)}, **changes)


def same(a: Table, b: Table) -> bool:
    return {**vars(a), "name": ""} == {**vars(b), "name": ""}


def test_a_table_survives_text_and_file(tmp_path: Path) -> None:
    assert same(parse(table().dump(), "x"), table())
    path = tmp_path / "folder" / "h100.json"
    table().save(path)
    assert same(load(path), table())
    assert load(path).name == "h100"
    assert [p.name for p in path.parent.iterdir()] == ["h100.json"]
    empty = new_table(H100, {})
    assert same(parse(empty.dump(), ""), empty)


def _without(key: str) -> str:
    data = json.loads(table().dump())
    del data[key]
    return json.dumps(data)


def test_what_was_host_bound_is_kept_and_old_tables_are_read() -> None:
    bound = replace(table().entries[bucket_of(PROBLEM)], host_bound=(CONFIG.encode(),))
    contests = {BOUT: Contest(2.0, 1.0, torch_host_bound=True)}
    full = replace(table(), entries={bucket_of(PROBLEM): bound}, contests=contests)
    assert same(parse(full.dump(), "x"), full)
    data = json.loads(table().dump())
    assert "host_bound" not in data["entries"][0]
    for name in ("ours_host_bound", "torch_host_bound"):
        del data["contests"][0][name]
    assert same(parse(json.dumps(data), "x"), table())


def _changed(*path, value) -> str:
    data = json.loads(table().dump())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (_changed("entries", 0, "measured", value={}), "the fastest config has no time"),
        (table().dump()[:-40], "not JSON"),
        ("[]", "format 'list', expected 1"),
        ("{}", "format None, expected 1"),
        (_changed("format", value=2), "format 2, expected 1"),
        (_without("entries"), "the field 'entries' is missing"),
        (_without("gpu"), "the field 'gpu' is missing"),
        (_changed("entries", value=3), "not iterable"),
        (_changed("entries", 0, "hidden_size", value="512"), "expected int, got '512'"),
        (_changed("entries", 0, "aligned", value=1), "expected bool, got 1"),
        (_changed("entries", 0, "hidden_size", value=True), "expected int, got True"),
        (_changed("entries", 0, "config", value="placement=grid"), "a config has the fields"),
        (_changed("entries", 0, "config", value=CONFIG.encode().replace("block_h=16", "block_h=17")), "power of two"),
        (_changed("entries", 0, "measured", value={CONFIG.encode(): -1.0}), "must be positive"),
        (_changed("entries", 0, "host_bound", value=["grid"]), "host-bound configs that have no time"),
        (_changed("entries", 0, "host_bound", value="grid"), "expected list, got 'grid'"),
        (_changed("contests", 0, "ours_host_bound", value=1), "expected bool, got 1"),
        (_changed("entries", 0, "measured", value={CONFIG.encode(): float("nan")}), "must be positive"),
        (_changed("contests", 0, "ours", value=0.0), "must be positive"),
        (_changed("contests", 0, "algorithm", value="magic"), "unknown algorithm"),
        (_changed("multiprocessors", value="132"), "expected int"),
    ],
)
def test_what_is_no_table_says_why(text: str, complaint: str) -> None:
    with pytest.raises(TableError, match=complaint):
        parse(text, "x")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(TableError, match="not text"):
        load(tmp_path / "t.json")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "t.json"
    table().save(path)
    before = path.read_text()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        replace(table(), gpu="other").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_table_speaks_for_its_gpu_and_kernels_only() -> None:
    assert table().mismatch(H100) == ""
    assert "other kernels" in replace(table(), kernels="0" * 64).mismatch(H100)
    for other in (replace(H100, name="H200"), replace(H100, multiprocessors=66), replace(H100, arch="sm_100")):
        assert "tuned on H100 (sm_90, 132 multiprocessors)" in table().mismatch(other)


def test_comments_do_not_change_the_kernels_hash() -> None:
    plain = "def f(x):\n    return x + 1\n"
    dressed = '"""About f."""\n\n\ndef f(x):  # short\n    """Adds.\n\n    One."""\n    # now\n    return x + 1\n'
    assert significant_tokens(plain) == significant_tokens(dressed)
    assert significant_tokens(plain) != significant_tokens(plain.replace("1", "2"))
    assert significant_tokens("if a:\n    b\nc\n") != significant_tokens("if a:\n    b\n    c\n")
    assert significant_tokens('x = "a"\n') != significant_tokens('x = "b"\n')


def test_every_kernel_source_is_in_the_hash() -> None:
    """Only what describes configs, compiles ahead of time or is no recurrence is left out."""
    folder = Path(__file__).parents[2] / "kernels"
    left_out = {path.name for path in folder.glob("*.py")} - set(SOURCES)
    named = {"__init__.py", "activate.py", "config.py", "compile.py", "listing.py", "matmul.py", "variants.py"}
    assert left_out == named
    assert len(kernels_hash()) == 64


def test_buckets() -> None:
    assert [bucket_of_batch(b) for b in (1, 16, 17, 100, 4096, 10**6)] == [8, 16, 32, 128, 4096, 4096]
    found = [bucket_of_hidden_size(h) for h in (1, 16, 17, 128, 129, 192, 256, 300, 512, 650, 1024, 1150, 8192)]
    assert found == [16, 16, 32, 128, 160, 192, 256, 320, 512, 768, 1024, 1280, 8192]
    for hidden_size in range(1, 2000):
        assert hidden_size <= bucket_of_hidden_size(hidden_size) <= max(16, 2 * hidden_size)
    # Neither T nor the precision of a type that has only one is part of a key; alignment is.
    assert bucket_of(PROBLEM) == bucket_of(replace(PROBLEM, precision="ieee", batch=17, hidden_size=504))
    assert bucket_of(PROBLEM) != bucket_of(replace(PROBLEM, hidden_size=511))


def test_file_names() -> None:
    assert file_name(replace(H100, name="NVIDIA H200")) == "nvidia-h200-132.json"
    assert file_name(replace(H100, name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", multiprocessors=42)) == (
        "nvidia-a100-sxm4-40gb-mig-3g-20gb-42.json"
    )


def test_shipped_tables_are_for_these_kernels() -> None:
    for path in SHIPPED.glob("*.json"):
        shipped = load(path)
        assert shipped.kernels == kernels_hash(), f"{path}: tune again, or do not ship it"
        assert shipped.entries
